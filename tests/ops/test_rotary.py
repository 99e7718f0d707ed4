"""Rotary positions: turned queries and keys know their distance and nothing else."""

from collections.abc import Callable

import laws
import pytest
import torch
from torch import Tensor

from holdall.mixers.attention import AttentionConfig
from holdall.model import seeded
from holdall.ops.rotary import rotate, standard_frequencies

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
