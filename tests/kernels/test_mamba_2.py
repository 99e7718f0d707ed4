"""Mamba-2's kernels against the mixer's plain form in the same dtype, both against fp64.

Letters: B row, T time, D width, M member of a population.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from holdall.contract.forms import KernelError
from holdall.kernels import mamba_2 as kernel
from holdall.mixers.mamba_2 import Mamba2Config, Mamba2State
from holdall.testing import laws

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
WIDTH = 32
SMALL = {"state": 3, "head_dim": 16, "chunk": 16}
"""Four heads."""

pytestmark = pytest.mark.usefixtures("poisoned")


def mixer_of(form: str, dtype: torch.dtype, device: torch.device, **options: Any) -> nn.Module:
    """Always the same weights, rounded to `dtype`."""
    mixer = laws.build(Mamba2Config(**{"width": WIDTH, **SMALL, **options}, form=form)).to(device)
    for i, parameter in enumerate(mixer.parameters()):
        parameter.data += 0.1 * laws.draw(*parameter.shape, dtype=SINGLE, seed=50 + i).to(device)
    return mixer.to(dtype)


def pull(mixer: nn.Module, x_BTD: Tensor, state: Any) -> dict[str, Tensor]:
    """Output and last state, and the gradients of input, state and weights pulled back from them together."""
    x_BTD = x_BTD.detach().requires_grad_()
    state = state and Mamba2State(*(u.detach().requires_grad_() for u in state))
    y_BTD, after = mixer(x_BTD, state)
    ups = [laws.draw(*u.shape, dtype=DOUBLE, seed=20 + i).to(u) for i, u in enumerate((y_BTD, *after))]
    leaves = {"x": x_BTD, **(state._asdict() if state else {}), **dict(mixer.named_parameters())}
    found = torch.autograd.grad([y_BTD, *after], list(leaves.values()), ups)
    gradients = {f"gradient of {name}": each for name, each in zip(leaves, found, strict=True)}
    return {"output": y_BTD, **after._asdict(), **gradients}


def pulls(mixer: nn.Module, xs: list[Tensor], state: Mamba2State | None) -> dict[str, Tensor]:
    """The same of several draws of tokens, one after the other."""
    runs = [pull(mixer, x_BTD, state) for x_BTD in xs]
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}


def check(
    length: int, device: torch.device, dtype: torch.dtype = SINGLE, *, batch: int = 2, carried: bool = True,
    **options: Any,
) -> None:  # fmt: skip
    fast, other = (mixer_of(form, dtype, device, **options) for form in ("kernel", "parallel"))
    exact = copy.deepcopy(other).double()
    assert (fast.form, other.form, exact.form) == ("kernel", "parallel", "parallel")
    state = other.init_state(batch, dtype=dtype, device=device)
    state = (
        Mamba2State(*(laws.draw(*u.shape, dtype=DOUBLE, seed=9).to(u) for u in state)) if carried else None
    )
    # several draws tell more of a head's few numbers, where they cost little
    xs = [
        laws.draw(batch, length, fast.config.width, dtype=DOUBLE, seed=seed).to(device, dtype)
        for seed in range(4 if device.type == "cuda" else 1)
    ]
    got, again = (pulls(fast, xs, state) for _ in range(2))
    plain = laws.plainly(pulls, other, xs, state)
    truth = pulls(exact, [x.double() for x in xs], state and Mamba2State(*(u.double() for u in state)))
    for name, mine in got.items():
        laws.assert_bitwise(name, mine, again[name])
        laws.assert_as_good_as_plain(name, mine, plain[name], truth[name])


GPU_LENGTHS = [pytest.param(length, marks=pytest.mark.gpu) for length in (1000, 16384)]
MORE_LENGTHS = [pytest.param(length, marks=pytest.mark.full) for length in (63, 64)]


@pytest.mark.parametrize("length", [1, 65, *MORE_LENGTHS, *GPU_LENGTHS])
def test_lengths(length: int, device: torch.device) -> None:
    check(length, device)


@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
@pytest.mark.parametrize("length", [40, pytest.param(130, marks=pytest.mark.full), *GPU_LENGTHS])
def test_half_precision(dtype: torch.dtype, length: int, device: torch.device) -> None:
    check(length, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"width": 128, "state": 24, "head_dim": 64},
        {"width": 128, "state": 128, "head_dim": 64},
        {"width": 128, "state": 50, "head_dim": 128},
        {"width": 96, "state": 16, "head_dim": 24, "groups": 4},
    ],
    ids=str,
)
def test_sizes_of_real_models(options: dict[str, int], dtype: torch.dtype, device: torch.device) -> None:
    check(300, device, dtype, batch=3, **options)


@pytest.mark.parametrize(
    ("groups", "dtype"),
    [
        *((1, SINGLE), (2, HALF), (4, SINGLE)),
        *(pytest.param(*other, marks=pytest.mark.full) for other in ((1, HALF), (2, SINGLE), (4, HALF))),
    ],
    ids=str,
)
def test_groups_from_a_fresh_state(groups: int, dtype: torch.dtype, device: torch.device) -> None:
    check(40, device, dtype, carried=False, groups=groups, state=5)


def test_biases_of_the_projections(device: torch.device) -> None:
    """The first projection is filled up, and its bias with it."""
    check(20, device, bias=True)


def test_gradients_of_the_state_alone_and_of_the_output_alone(device: torch.device) -> None:
    fast, other = (mixer_of(form, SINGLE, device) for form in ("kernel", "parallel"))
    x = laws.draw(2, 40, WIDTH, dtype=SINGLE).to(device)
    for which in range(3):
        found = []
        for mixer in (fast, other):
            leaf = x.clone().requires_grad_()
            y, state = mixer(leaf)
            found.append(torch.autograd.grad((y, *state)[which].square().sum(), leaf)[0])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [-120.0, -20.0, 30.0])
def test_steps_of_any_size(bias: float, device: torch.device) -> None:
    """So small that nothing is kept, so large that all is forgotten."""
    fast, other = (mixer_of(form, SINGLE, device) for form in ("kernel", "parallel"))
    x = laws.draw(2, 40, WIDTH, dtype=SINGLE).to(device)
    found = []
    for mixer in (fast, other):
        mixer.dt_bias.data.fill_(bias)
        found.append(pull(mixer, x, None))
    for name, mine in found[0].items():
        torch.testing.assert_close(
            mine, found[1][name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_in_pieces_it_is_the_whole(device: torch.device) -> None:
    mixer = mixer_of("kernel", SINGLE, device)
    x = laws.draw(2, 70, WIDTH, dtype=SINGLE).to(device)
    with torch.no_grad():
        want, end = mixer(x)
        ys, state = [], None
        for piece in x.split([1, 2, 40, 27], dim=1):
            y, state = mixer(piece, state)
            ys.append(y)
        assert mixer(x, want_state=False)[1] is None
    torch.testing.assert_close(torch.cat(ys, 1), want, rtol=1e-4, atol=1e-5)
    for one, other in zip(state, end, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_members_of_a_population_have_weights_of_their_own(device: torch.device) -> None:
    mixer = mixer_of("kernel", SINGLE, device)
    weights = {
        name: torch.stack((w, w + 0.1 * laws.draw(*w.shape, dtype=SINGLE, seed=i).to(device)))
        .detach()
        .requires_grad_()
        for i, (name, w) in enumerate(mixer.named_parameters())
    }
    x_MBTD = laws.draw(2, 2, 35, WIDTH, dtype=SINGLE).to(device).requires_grad_()

    def run(own: dict[str, Tensor], x_BTD: Tensor) -> Tensor:
        return functional_call(mixer, own, (x_BTD,))[0]

    alone = torch.stack([run({name: w[m] for name, w in weights.items()}, x_MBTD[m]) for m in range(2)])
    together = vmap(run)(weights, x_MBTD)
    torch.testing.assert_close(together, alone)
    leaves = [x_MBTD, *weights.values()]
    up = laws.draw(*alone.shape, dtype=SINGLE).to(device)
    for name, one, other in zip(
        ("x", *weights),
        torch.autograd.grad(together, leaves, up),
        torch.autograd.grad(alone, leaves, up),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.gpu("tens of GB")
def test_rows_may_be_more_than_32_bits_count() -> None:
    """The last row of 2^31 numbers through the convolution equals that row alone."""
    mixer = mixer_of("kernel", HALF, torch.device("cuda"), width=512, state=16, head_dim=128)
    channels = mixer.config.conv_channels
    x = torch.randn(2**31 // (1024 * channels) + 1, 1024, 512, dtype=HALF, device="cuda")
    with torch.no_grad():
        y, _ = mixer(x)
        torch.testing.assert_close(y[-1:], mixer(x[-1:])[0])


@pytest.mark.gpu
def test_it_is_recorded_in_a_graph(assert_replays: Callable[[Callable[[], Sequence[Tensor]]], None]) -> None:
    mixer = mixer_of("kernel", HALF, torch.device("cuda"), width=64)
    x = torch.randn(2, 100, 64, dtype=HALF, device="cuda").requires_grad_()

    def train() -> list[Tensor]:
        y, after = mixer(x)
        ends = y.float().square().sum() + sum(u.float().square().sum() for u in after)
        return [y, *after, *torch.autograd.grad(ends, [x, *mixer.parameters()])]

    assert_replays(train)


@pytest.mark.compile
def test_it_compiles_whole(device: torch.device) -> None:
    mixer = mixer_of("kernel", SINGLE, device)
    x = laws.draw(2, 20, WIDTH, dtype=SINGLE).to(device)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (mixer, compiled):
        y, state = run(x)
        found.append([y, *state, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_multiplies_in_bfloat16(device: torch.device) -> None:
    mixer = mixer_of("kernel", SINGLE, device)
    x = laws.draw(2, 20, WIDTH, dtype=SINGLE).to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        y, state = mixer(x)
    assert (y.dtype, state.s_BHNV.dtype) == (HALF, SINGLE)
    torch.testing.assert_close(y.float(), mixer(x)[0], rtol=0.1, atol=0.1)


def test_what_it_cannot_do_is_refused(device: torch.device) -> None:
    with pytest.raises(KernelError, match="8192 elements of state per head, not 200 times 64"):
        Mamba2Config(width=64, state=200, form="kernel").build().to(device)(
            torch.zeros(1, 2, 64, device=device)
        )
    assert "taps" in kernel.kernel_refusal(64, 64, 9)
    assert not kernel.kernel_refusal(64, 128, 4)
