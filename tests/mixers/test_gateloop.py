"""GateLoop: all pairs at once give the same, gates that are zero, gates that never let go, and its options.

Letters: B row, T and S time, D width, H heads.
"""

import pytest
import torch
import torch.nn.functional as F

from holdall.mixers.gateloop import GateLoop, GateLoopConfig
from holdall.testing import laws

both_forms = pytest.mark.parametrize("form", ["loop", "parallel"])


@pytest.mark.parametrize("heads", [1, 4, 16])
@both_forms
def test_it_is_attention_with_relative_positions_that_the_tokens_decide(form: str, heads: int) -> None:
    length = 40
    mixer = laws.build(GateLoopConfig(width=16, heads=heads, chunk=16, form=form)).double()
    x_BTD = laws.tokens(mixer, length)
    q, k, v, gate_BTD = mixer.qkvg(x_BTD).chunk(4, dim=-1)
    q, k, v = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in (q, k, v))
    c_BTH = torch.view_as_complex(mixer.transition(x_BTD).unflatten(-1, (heads, 2)))
    until_BHT = torch.polar(c_BTH.abs().sigmoid(), c_BTH.angle()).cumprod(1).transpose(1, 2)
    between_BHTS = (until_BHT[..., :, None] / until_BHT[..., None, :]).tril()
    o_BHTV = (q @ k.mT * between_BHTS.real) @ v
    s_BHKV = torch.einsum("bhs,bhsk,bhsv->bhkv", between_BHTS[:, :, -1], k + 0j, v + 0j)
    want_BTD = mixer.out_proj(o_BHTV.transpose(1, 2).flatten(2) * F.silu(gate_BTD))
    y_BTD, state = mixer(x_BTD)
    laws.assert_close("output", y_BTD, want_BTD)
    laws.assert_close("state", state.s_BHKV2, torch.view_as_real(s_BHKV))


def open_wide(mixer: GateLoop, angle: float) -> None:
    """Gates that turn by nearly the same angle all the time, and keep nearly all."""
    with torch.no_grad():
        mixer.transition.weight.mul_(0.01)
        mixer.transition.bias.copy_(14 * torch.tensor([angle]).cos().repeat(mixer.transition.bias.shape[0]))
        mixer.transition.bias[1::2] = 14 * torch.tensor(angle).sin()


@torch.no_grad()
def test_after_5000_tokens_of_turning_with_a_long_memory_it_errs_no_more_than_the_loop() -> None:
    mixer = laws.build(GateLoopConfig(width=16))
    open_wide(mixer, 2.0)
    x_BTD = laws.tokens(mixer, 5_000, batch=1)
    plain = laws.plainly(laws.outcome, laws.loop_of(mixer, torch.float32), x_BTD)
    truth = laws.named(*laws.twin(mixer, dtype=torch.float64)(x_BTD.double()))
    for name, got in laws.named(*mixer(x_BTD)).items():
        laws.assert_as_good_as_plain(name, got, plain[name], truth[name])


@both_forms
def test_a_gate_of_zero_keeps_half_and_does_not_turn(form: str) -> None:
    mixer = laws.build(GateLoopConfig(width=16, form=form)).double()
    x_BTD = laws.tokens(mixer, 5)
    x_BTD[:, 2] = 0  # as a padding token's embedding might be; with a zero bias its gates are zero
    with torch.no_grad():
        mixer.transition.bias.zero_()
        _, before = mixer(x_BTD[:, :2])
        _, after = mixer(x_BTD[:, :3])
    laws.assert_close("state", after.s_BHKV2, 0.5 * before.s_BHKV2)
    x_BTD.requires_grad_()
    grads = torch.autograd.grad(mixer(x_BTD)[0].sum(), [x_BTD, *mixer.parameters()])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("options", "message"), [({"heads": 3}, "not a multiple of heads 3"), ({"chunk": 0}, "chunk = 0")]
)
def test_options_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateLoopConfig(width=16, **options)
