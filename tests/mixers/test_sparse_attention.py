"""Sparse attention where it must be something known: Zoology's train form, a sliding window, a plain sort."""

import pytest
import torch
from torch import Tensor

from holdall.mixers import sparse_attention as module
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.sparse_attention import Kept, SparseAttention, SparseAttentionConfig
from holdall.testing import laws

DOUBLE = torch.float64


def build(form: str = "auto", **options) -> SparseAttention:
    return laws.build(SparseAttentionConfig(width=8, heads=2, chunk=8, form=form, **options)).to(DOUBLE)


def textbook(mixer: SparseAttention, x_BTD: Tensor, keys: int) -> Tensor:
    """Scores of all pairs, softmax over the `keys` best of each prefix, found by sorting it."""
    q, k, v = mixer.project(x_BTD, torch.zeros(1, dtype=torch.long))
    gate_BT, z_BT = mixer.select(x_BTD).unbind(-1)
    visible_BTS = torch.zeros(len(x_BTD), x_BTD.shape[1], x_BTD.shape[1], dtype=torch.bool)
    for row, z_T in enumerate(z_BT.tolist()):
        for t in range(len(z_T)):
            best = sorted(range(t + 1), key=lambda j: (z_T[j], j), reverse=True)[:keys]
            visible_BTS[row, t, best] = True
    score = torch.einsum("bthk,bshk->bhts", q, k) / 4**0.5 + z_BT.sigmoid().log()[:, None, None]
    p = score.masked_fill(~visible_BTS[:, None], -torch.inf).softmax(-1)
    return mixer.out_proj(torch.einsum("bhts,bshv->bthv", p, v).flatten(2)) * gate_BT.sigmoid()[..., None]


@pytest.mark.claim("mixers/sparse_attention.py", "SigmoidLookups trains")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("keys", [1, 5, 8, 20, 50])
@torch.no_grad()
def test_every_query_sees_the_best_keys_of_its_prefix(form: str, keys: int) -> None:
    mixer, x_BTD = build(form, keys=keys), laws.draw(2, 40, 8, dtype=DOUBLE)
    x_BTD[:, 10:20] = x_BTD[:, :10]  # equal scores
    y_BTD = mixer(x_BTD)[0]
    laws.assert_close("y", y_BTD, textbook(mixer, x_BTD, keys))
    laws.assert_bitwise("y in training", mixer.train()(x_BTD)[0], y_BTD)
    assert mixer.state_elements(1000) == mixer.state_elements(2000)


@pytest.mark.parametrize("chunk", [3, 8, 40])
@pytest.mark.parametrize("keys", [1, 5, 20])
def test_chunks_side_by_side_and_spans_of_them_in_turn_are_the_loop(
    chunk: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a state of which one row has read more than the other, with equal scores; gradients too."""
    monkeypatch.setattr(module, "SPAN", 2)
    loop = build("loop", keys=keys)
    mixer = laws.build(SparseAttentionConfig(width=8, heads=2, keys=keys, chunk=chunk)).to(DOUBLE)
    mixer.load_state_dict(loop.state_dict())
    x_BTD = laws.draw(2, 40, 8, dtype=DOUBLE)
    x_BTD[:, 10:20] = x_BTD[:, :10]
    with torch.no_grad():
        _, first = loop(x_BTD[:, :7])
        _, fresh = loop(torch.zeros_like(x_BTD[:, :7]))
    state = Kept(*(torch.stack((a[0], b[1])) for a, b in zip(first, fresh, strict=True)))
    state = state._replace(seen_B=torch.tensor([7, 2]).clamp(max=keys))

    def read(which: SparseAttention) -> dict[str, Tensor]:
        x = x_BTD.clone().requires_grad_()
        found = laws.named(*which(x, state))
        up = laws.draw(*found["output"].shape, dtype=DOUBLE, seed=3)
        gradients = torch.autograd.grad(found["output"], [x, *which.parameters()], up)
        return found | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}

    got = read(mixer)
    for name, right in read(loop).items():
        laws.assert_close(name, got[name], right)


@pytest.mark.claim("mixers/sparse_attention.py", "Weights")
@torch.no_grad()
def test_with_room_for_all_and_no_preference_it_is_zoologys_train_form() -> None:
    mixer, x_BTD = build(keys=40), laws.draw(2, 40, 8, dtype=DOUBLE)
    mixer.select.weight[1] = 0
    q, k, v = mixer.project.qkv(x_BTD).unflatten(-1, (3, 2, 4)).unbind(2)
    future = torch.full((40, 40), -torch.inf, dtype=DOUBLE).triu(1)
    p = (torch.einsum("bthk,bshk->bhts", q, k / 4**0.5) + future).softmax(-1)
    attended_BTD = mixer.out_proj(torch.einsum("bhts,bshv->bthv", p, v).flatten(2))
    selection_BT1 = torch.sigmoid(x_BTD @ mixer.select.weight[:1].T)
    laws.assert_close("y", mixer(x_BTD)[0], attended_BTD * selection_BT1)


@pytest.mark.claim("mixers/sparse_attention.py", "with w_key = 0")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_without_preference_the_newest_are_kept_a_gated_sliding_window(form: str) -> None:
    mixer, x_BTD = build(form, keys=5), laws.draw(2, 40, 8, dtype=DOUBLE)
    mixer.select.weight[1] = 0
    window = SlidingWindowConfig(width=8, heads=2, window=5).build().to(DOUBLE)
    window.load_state_dict({n: t for n, t in mixer.state_dict().items() if not n.startswith("select")})
    gate_BT1 = torch.sigmoid(x_BTD @ mixer.select.weight[:1].T)
    laws.assert_close("y", mixer(x_BTD)[0], window(x_BTD)[0] * gate_BT1)


@pytest.mark.claim("mixers/sparse_attention.py", "the choice has")
def test_what_is_kept_is_learned() -> None:
    mixer = build(keys=5)
    mixer(laws.draw(2, 40, 8, dtype=DOUBLE))[0].square().sum().backward()
    assert (mixer.select.weight.grad.abs().amax(1) > 1e-3).all()


@torch.no_grad()
def test_a_token_of_great_score_is_never_forgotten() -> None:
    mixer, x_BTD = build(keys=2), laws.draw(1, 60, 8, dtype=DOUBLE)
    x_BTD[0, 3] = 100 * mixer.select.weight[1]
    _, state = mixer(x_BTD)
    assert state.z_BS[0, 0] == state.z_BS.max()
    assert mixer.state_elements(60) == 2 * (2 * 8 + 1) + 1


@pytest.mark.parametrize("options", [{"keys": 0}, {"chunk": 0}, {"heads": 3}])
def test_bad_settings_name_the_numbers(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}( =)? {value}"):
        SparseAttentionConfig(width=8, **options)
