"""Gated linear attention: all pairs at once give the same, and options that do not fit.

Letters: B row, T and S time, D width, H heads, K key dim, V value dim.
"""

import pytest
import torch
import torch.nn.functional as F

from holdall.mixers.gla import GLAConfig
from holdall.testing import laws


@pytest.mark.parametrize("form", ["loop", "parallel"])
def test_it_is_decayed_attention_without_softmax(form: str) -> None:
    heads, length = 2, 40
    options = {"heads": heads, "key_ratio": 0.75, "value_ratio": 2.0, "gate_rank": 3, "tau": 4.0}
    mixer = laws.build(GLAConfig(width=16, form=form, **options)).double()
    x_BTD = laws.tokens(mixer, length)
    y_BTD, state = mixer(x_BTD)

    q, k, v, gate_BTE = mixer.qkvg(x_BTD).split([12, 12, 32, 32], dim=-1)
    log_a = F.logsigmoid(mixer.gate_up(mixer.gate_down(x_BTD))) / 4
    q, k, v, log_a = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in (q, k, v, log_a))
    until_BHTK = log_a.cumsum(2)
    between_BHTSK = until_BHTK[:, :, :, None] - until_BHTK[:, :, None]
    past_TS = torch.ones(length, length, dtype=torch.bool).tril()
    weight_BHTSK = between_BHTSK.exp() * past_TS[..., None]
    o_BHTV = torch.einsum("bhtk,bhsk,bhtsk,bhsv->bhtv", q / 6**0.5, k, weight_BHTSK, v)
    o_BHTV = o_BHTV / (o_BHTV.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm_weight_V
    want_BTD = mixer.out_proj(o_BHTV.transpose(1, 2).flatten(2) * F.silu(gate_BTE))
    laws.assert_close("output", y_BTD, want_BTD)
    s_BHKV = torch.einsum("bhsk,bhsk,bhsv->bhkv", weight_BHTSK[:, :, -1], k, v)
    laws.assert_close("state", state.s_BHKV, s_BHKV)


def test_published_decays_start_near_one() -> None:
    """Half to the power 1 / 16 where the logits are zero: half of a token is forgotten after 16 more."""
    mixer = GLAConfig(width=16).build()
    with torch.no_grad():
        mixer.gate_up.weight.zero_()
        mixer.gate_up.bias.zero_()
        _, one = mixer(torch.ones(1, 1, 16))
        _, two = mixer(torch.ones(1, 2, 16))
    torch.testing.assert_close(two.s_BHKV, one.s_BHKV * (1 + 0.5 ** (1 / 16)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "key_ratio [*] width = 8 is not a multiple of heads 3"),
        ({"value_ratio": 0.3}, "value_ratio [*] width = 4.8 is not a multiple"),
        ({"key_ratio": 0.0}, "key_ratio = 0"),
        ({"kernel": 1}, "kernel = 1 must be at least 2"),
        ({"tau": 0.0}, "tau = 0.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GLAConfig(width=16, **options)
