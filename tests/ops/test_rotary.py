"""Rotary positions: turned queries and keys know their distance and nothing else."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdall.mixers.attention import QKV, AttentionConfig
from holdall.mixers.repeat_attention import RepeatAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import seeded
from holdall.ops.rotary import rotary_dims, rotate, standard_frequencies
from holdall.recipes.presets import preset
from holdall.testing import laws

DOUBLE, K = torch.float64, 8
FREQUENCY = standard_frequencies(K, 10000.0, torch.zeros((), dtype=torch.float64))


def turned(x_K: Tensor, position: int, **how) -> Tensor:
    return rotate(x_K[None, None, None], torch.tensor([[position]]), FREQUENCY, **how)[0, 0, 0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_the_distance_only(interleaved: bool) -> None:
    q, k = (laws.draw(K, dtype=DOUBLE, seed=i) for i in range(2))
    products = [
        turned(q, 7 + at, interleaved=interleaved) @ turned(k, at, interleaved=interleaved)
        for at in (0, 1, 50, 1000)
    ]
    for product in products[1:]:
        assert abs(product - products[0]) < 1e-10
    assert (
        abs(turned(q, 8, interleaved=interleaved) @ turned(k, 0, interleaved=interleaved) - products[0])
        > 1e-3
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_keeps_lengths_and_position_zero_turns_nothing(interleaved: bool) -> None:
    x = laws.draw(K, dtype=DOUBLE)
    laws.assert_close("at 0", turned(x, 0, interleaved=interleaved), x)
    laws.assert_close("length", turned(x, 123, interleaved=interleaved).norm(), x.norm())


def test_interleaved_pairs_are_the_halves_in_another_order() -> None:
    x = laws.draw(K, dtype=DOUBLE)
    order = torch.arange(K).unflatten(0, (2, -1)).T.flatten()  # 0, 4, 1, 5, ...
    laws.assert_close("order", turned(x[order], 9, interleaved=True), turned(x, 9)[order])


def test_each_pair_turns_as_a_complex_number() -> None:
    x_BTHK, position_BT = laws.draw(2, 5, 3, K, dtype=DOUBLE), torch.arange(10).view(2, 5)
    angle = position_BT[..., None] * FREQUENCY
    want = (
        torch.view_as_complex(x_BTHK.unflatten(-1, (-1, 2)))
        * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    )
    got = rotate(x_BTHK, position_BT, FREQUENCY, interleaved=True)
    laws.assert_close("turned", got, torch.view_as_real(want).flatten(-2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_features_beyond_the_frequencies_stay(interleaved: bool) -> None:
    x_BTHK = laws.draw(1, 4, 2, K + 3, dtype=DOUBLE)
    y_BTHK = rotate(x_BTHK, torch.arange(4)[None], FREQUENCY, interleaved=interleaved)
    laws.assert_bitwise("rest", y_BTHK[..., K:], x_BTHK[..., K:])
    assert not torch.equal(y_BTHK[:, 1:, :, :K], x_BTHK[:, 1:, :, :K])


def test_angles_are_not_computed_in_bf16() -> None:
    """At position 1001, bf16 would turn by 1000."""
    x = torch.tensor([1.0, 0.0], dtype=torch.bfloat16)[None, None, None]
    y = rotate(x, torch.tensor([[1001]]), torch.ones(1, dtype=DOUBLE))[0, 0, 0]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[0].item(), torch.tensor(1001.0).cos().item(), atol=4e-3, rtol=0)


def test_gradcheck_of_a_rotation() -> None:
    x_BTHK = laws.draw(1, 3, 1, 6, dtype=DOUBLE).requires_grad_()
    for interleaved in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, i=interleaved: rotate(
                x, torch.arange(3)[None], standard_frequencies(4, 10000.0, x), interleaved=i
            ),
            x_BTHK,
        )


def test_standard_frequencies() -> None:
    torch.testing.assert_close(
        standard_frequencies(4, 100.0, torch.zeros((), dtype=DOUBLE)),
        torch.tensor([1.0, 0.1], dtype=DOUBLE),
        rtol=1e-15,
        atol=0,
    )


PARTS = [(70, 0.5), (6, 0.5), (7, 0.25), (9, 0.6), (8, 0.5), (8, 0.8), (8, 1.0), (5, 0.0), (7, 0.1)]
"""Dimensions of a head and the share of them: 35, 3, 1, 5, 4, 6, 8, 0 and 0 of them set the frequencies."""


def turned_by_hand(x: list[float], position: int, share: float, base: float) -> list[float]:
    """flash-attention's rotation of one head: halves of 2P dimensions, P = ceil(d / 2), d = int(share K)."""
    d = int(share * len(x))
    exponents, y = [i / d for i in range(0, d, 2)], list(x)
    for first, exponent in enumerate(exponents):
        second, angle = first + len(exponents), position / base**exponent
        y[first] = x[first] * math.cos(angle) - x[second] * math.sin(angle)
        y[second] = x[second] * math.cos(angle) + x[first] * math.sin(angle)
    return y


@pytest.mark.parametrize(("head_dim", "share"), PARTS)
@torch.no_grad()
def test_a_share_of_a_head_is_turned_as_in_flash_attention(head_dim: int, share: float) -> None:
    """Queries and keys of rows that have read differently many tokens; values stay."""
    project = QKV(2 * head_dim, 2, share, 500.0, bias=True, kv_heads=1).double()
    x_BTD, seen_B = laws.draw(2, 3, 2 * head_dim, dtype=DOUBLE), torch.tensor([0, 11])
    rows = project.qkv(x_BTD).unflatten(-1, (4, head_dim))
    want = rows.clone()
    for b, t, h in itertools.product(range(2), range(3), range(3)):
        turned = turned_by_hand(rows[b, t, h].tolist(), int(seen_B[b]) + t, share, 500.0)
        want[b, t, h] = torch.tensor(turned, dtype=DOUBLE)
    laws.assert_close("queries, keys and values", torch.cat(project(x_BTD, seen_B), dim=2), want)


def test_the_published_attention_of_a_billion_turns_18_pairs() -> None:
    layer = preset("attention-1b", 50257).layers[0]
    assert isinstance(layer, AttentionConfig)
    dims = rotary_dims(layer.resolved_head_dim, layer.rotary)
    frequency_F = standard_frequencies(dims, layer.rotary_base, torch.zeros(()))
    assert dims == 35
    assert frequency_F.tolist() == pytest.approx([10000 ** (-2 * i / 35) for i in range(18)], rel=1e-14)


@pytest.mark.parametrize("config", [AttentionConfig, SlidingWindowConfig, RepeatAttentionConfig])
@pytest.mark.parametrize(("head_dim", "share"), [(1, 1.0), (7, 1.0), (3, 1.0)])
def test_more_pairs_than_a_head_has_are_refused(config: type, head_dim: int, share: float) -> None:
    """flash-attention has no room for them either; a pair fewer would be another model."""
    with pytest.raises(ValueError, match=f"of heads of {head_dim} dimensions makes .* even number"):
        config(width=2 * head_dim, heads=2, rotary=share)


def scaled_by_hand(frequency: float, factor: float, low: float, high: float, context: float) -> float:
    """Llama 3.1's frequencies, by wavelengths as its code has them."""
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def test_frequencies_are_scaled_as_in_llama_3_and_by_interpolation() -> None:
    plain = [500_000 ** (-2 * i / 64) for i in range(32)]
    llama = 32.0, 1.0, 4.0, 8192.0
    got = standard_frequencies(64, 500_000.0, torch.zeros(()), llama).tolist()
    want = [scaled_by_hand(frequency, *llama) for frequency in plain]
    assert got == pytest.approx(want, rel=1e-14)
    untouched, divided = (
        sum(a == pytest.approx(b / by) for a, b in zip(got, plain, strict=True)) for by in (1, 32)
    )
    assert 0 < untouched < 32 - divided < 32  # and some lie between
    got = standard_frequencies(64, 500_000.0, torch.zeros(()), (4.0,)).tolist()
    assert got == pytest.approx([frequency / 4 for frequency in plain], rel=1e-14)


@pytest.mark.parametrize("scaling", [(4.0, 1.0), (0.0,), (8.0, 4.0, 1.0, 64.0), (8.0, 1.0, 4.0, 0.0)])
def test_scaling_that_means_nothing_is_refused(scaling: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rotary_scaling = "):
        AttentionConfig(width=8, rotary_scaling=scaling)


@pytest.mark.parametrize("interleaved", [False, True])
def test_more_frequencies_than_a_head_has_pairs_are_refused(interleaved: bool) -> None:
    with pytest.raises(ValueError, match="2 pairs to turn are more than heads of 3 dimensions have"):
        rotate(torch.zeros(1, 1, 1, 3), torch.tensor([[1]]), torch.ones(2), interleaved=interleaved)


def test_angles_keep_their_digits_at_great_positions() -> None:
    x_BTHK, position_BT = laws.draw(1, 3, 1, K, dtype=DOUBLE), torch.tensor([[99_989, 99_990, 100_003]])
    truth = rotate(x_BTHK, position_BT, FREQUENCY)
    got = rotate(x_BTHK.float(), position_BT, standard_frequencies(K, 10000.0, torch.zeros(())))
    assert laws.distance(got, truth) < 4 * torch.finfo(torch.float32).eps * laws.size(truth)


@pytest.mark.compile
def test_compiled_a_layer_makes_its_angles_once() -> None:
    """Within the loops over queries and keys they would be made for each number."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    with seeded(0):
        mixer = AttentionConfig(width=16, heads=2, rotary=0.5).build()
    x_BTD = laws.draw(2, 24, 16, dtype=torch.float32).requires_grad_()

    def pull(function: Callable[..., tuple[Tensor, object]]) -> tuple[Tensor, Tensor]:
        y_BTD, _ = function(x_BTD, want_state=False)
        return y_BTD.detach(), torch.autograd.grad(y_BTD.square().sum(), x_BTD)[0]

    (y_BTD, dx_BTD), codes = run_and_get_code(pull, torch.compile(mixer))
    for name, got, want in zip(("output", "gradient"), (y_BTD, dx_BTD), pull(mixer), strict=True):
        laws.assert_close(name, got, want)
    written = "\n".join(codes)
    assert written.count("ops.holdall.rotary_turn.default(") == 1
    assert "cos()" not in written
    assert "sin()" not in written
