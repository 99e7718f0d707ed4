"""The selective scan's kernels against the plain form in the same dtype, both against fp64.

Letters: B row, T time, D channels, N state per channel, M member of a population.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_trains_under_vmap, times_compiled, traced
from torch import Tensor

import holdall
from holdall.contract.forms import KernelError
from holdall.kernels import selective_scan as kernel
from holdall.ops import selective_scan as ops
from holdall.testing import laws

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
NAMES = ("x", "dt", "a", "b", "c", "h", "dt_bias_D", "skip_D", "z_BTD")
FUSED = NAMES[6:]


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles of four tokens each are a segment."""
    monkeypatch.setattr(kernel, "TILE", 4)
    monkeypatch.setattr(kernel, "LEAST", 2)


def inputs(
    length: int, *, device: torch.device, dtype: torch.dtype = SINGLE, batch: int = 1, channels: int = 5,
    size: int = 3, fused: tuple[str, ...] = FUSED,
) -> dict[str, Tensor]:  # fmt: skip
    """All inputs by name; x and z as strided halves of one projection."""

    def draw(*shape: int, seed: int) -> Tensor:
        return laws.draw(*shape, dtype=DOUBLE, seed=seed).to(device)

    x, z = draw(batch, length, 2 * channels, seed=0).to(dtype).chunk(2, dim=-1)
    dt = draw(batch, length, channels, seed=1) - 2
    dt = (dt if "dt_bias_D" in fused else dt.exp()).to(dtype)
    b, c = (draw(batch, length, size, seed=seed).to(dtype) for seed in (2, 3))
    a, h = -draw(channels, size, seed=4).exp().float(), draw(batch, channels, size, seed=5).float()
    bias, skip = (draw(channels, seed=seed).float() for seed in (6, 7))
    given = dict(zip(NAMES, (x, dt, a, b, c, h, bias, skip, z), strict=True))
    return {name: u for name, u in given.items() if name not in FUSED or name in fused}


def plain(
    *args: Tensor, dt_bias_D: Tensor | None = None, skip_D: Tensor | None = None, z_BTD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What Mamba does in plain PyTorch."""
    x, dt, *rest = args
    if dt_bias_D is not None:
        dt = F.softplus(dt.to(dt_bias_D.dtype) + dt_bias_D)
    y, h = ops.selective_scan(x, dt, *rest)
    if skip_D is not None:
        y = torch.addcmul(y, x, skip_D.to(y.dtype))
    return y if z_BTD is None else y * F.silu(z_BTD), h


def call(function: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return function(*list(given.values())[:6], **{n: u for n, u in given.items() if n in FUSED})


def results(function: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, last state, and the gradients of all inputs pulled back from both together."""
    leaves = {name: u.detach().requires_grad_() for name, u in given.items()}
    y, h = call(function, leaves)
    ups = [laws.draw(*e.shape, dtype=e.dtype, seed=20 + i).to(e.device) for i, e in enumerate((y, h))]
    grads = torch.autograd.grad([y, h], list(leaves.values()), ups)
    return {"y": y, "last": h, **{f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}}


def check(given: dict[str, Tensor]) -> dict[str, Tensor]:
    got, other = results(kernel.selective_scan, given), laws.plainly(results, plain, given)
    truth = results(plain, {name: u.double() for name, u in given.items()})
    for name, mine in got.items():
        laws.assert_as_good_as_plain(name, mine, other[name], truth[name])
    return got


GPU_LENGTHS = [pytest.param(length, marks=pytest.mark.gpu) for length in (1000, 16384)]
MORE_LENGTHS = [pytest.param(length, marks=pytest.mark.full) for length in (63, 64)]


@pytest.mark.parametrize("length", [1, 65, *MORE_LENGTHS, *GPU_LENGTHS])
def test_lengths(length: int, device: torch.device) -> None:
    check(inputs(length, device=device))


@pytest.mark.parametrize("length", [18, *GPU_LENGTHS])
@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, length: int, device: torch.device) -> None:
    check(inputs(length, device=device, dtype=dtype, size=2))


@pytest.mark.parametrize("fused", [(), FUSED[:1], FUSED[1:2], FUSED[2:]], ids=str)
def test_every_part_by_itself(fused: tuple[str, ...], device: torch.device) -> None:
    check(inputs(6, device=device, batch=2, fused=fused))


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 1), (33, 2), pytest.param(2048, 24, marks=pytest.mark.gpu)]
)
def test_channels_and_states_of_any_number(channels: int, size: int, device: torch.device) -> None:
    check(inputs(17, device=device, channels=channels, size=size))


@pytest.mark.parametrize("length", [8, 9, 29])
def test_segments_of_time_are_the_whole(length: int, device: torch.device, short_segments: None) -> None:
    assert kernel.segments(2, 29, 5) == (4, 2)
    check(inputs(length, device=device, batch=2, size=2))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [8, 16])
@pytest.mark.parametrize("block", [32, 64])
def test_other_tiles_and_blocks(
    tile: int, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "TILE", tile)
    for config in (kernel.FORWARD, kernel.BACKWARD):
        monkeypatch.setitem(config, "BLOCK", block)
    check(inputs(100, device=device, channels=100))


def test_the_same_bits_twice(device: torch.device) -> None:
    given = inputs(20, device=device, batch=2, channels=33, size=1)
    first, second = (results(kernel.selective_scan, given) for _ in range(2))
    for name, u in first.items():
        laws.assert_bitwise(name, second[name], u)


@pytest.mark.parametrize("dt", [1e-4, 100.0])
def test_steps_of_any_size(dt: float, device: torch.device) -> None:
    given = inputs(18, device=device, channels=32, fused=(), size=2)
    given["dt"] *= dt
    for name, u in check(given).items():
        assert u.isfinite().all(), name


def test_softplus_is_exact_wherever_its_argument_is(device: torch.device) -> None:
    """With x = B = C = 1 and A = 0 the first output is dt."""
    raw = torch.linspace(-80, 80, 161, device=device)
    one = torch.ones(1, 1, 161, device=device)
    y, _ = kernel.selective_scan(
        one, raw.expand(1, 1, -1), torch.zeros(161, 1, device=device), one[..., :1], one[..., :1],
        torch.zeros(1, 161, 1, device=device), dt_bias_D=torch.zeros(161, device=device),
    )  # fmt: skip
    truth = F.softplus(raw.double(), threshold=1000)
    assert ((y.flatten() - truth) / truth).abs().max() < 4e-7


# ------------------------------------------------------------------------------------------------- one token


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("fused", [FUSED, ()], ids=["fused", "alone"])
@torch.no_grad()
def test_one_token(dtype: torch.dtype, fused: tuple[str, ...], device: torch.device) -> None:
    given = inputs(1, device=device, dtype=dtype, batch=3, channels=33, fused=fused)
    other = laws.plainly(call, plain, dict(given))
    truth = call(plain, {name: u.double() for name, u in given.items()})
    before = given["h"].clone()
    got = call(kernel.selective_scan, given)
    for name, mine, theirs, right in zip(("y", "state"), got, other, truth, strict=True):
        laws.assert_as_good_as_plain(name, mine, theirs, right)
    laws.assert_bitwise("the state given", given["h"], before)

    fused_parts = {name: u for name, u in given.items() if name in FUSED}
    y, h = kernel.selective_scan(*list(given.values())[:6], **fused_parts, inplace=True)
    assert h is given["h"]
    laws.assert_bitwise("y in place", y, got[0])
    laws.assert_bitwise("state in place", h, got[1])


# ---------------------------------------------------------------------------- vmap, autocast, compile, mixer


def test_members_of_a_population_have_parameters_of_their_own(device: torch.device) -> None:
    given = inputs(5, device=device, batch=2, size=2)
    own = ("x", "dt", "a", "b", "h", "dt_bias_D", "skip_D", "z_BTD")  # and c is shared
    stacked = {
        name: torch.stack((u, u + 0.1 * laws.draw(*u.shape, dtype=SINGLE, seed=30 + i).to(device)))
        if name in own else u
        for i, (name, u) in enumerate(given.items())
    }  # fmt: skip
    dims = {name: 0 if name in own else None for name in given}

    def under_vmap(*args: Tensor, **fused: Tensor) -> tuple[Tensor, Tensor]:
        leaves = dict(zip(given, (*args, *fused.values()), strict=True))
        return torch.func.vmap(lambda one: call(kernel.selective_scan, one), in_dims=(dims,))(leaves)

    def one_by_one(*args: Tensor, **fused: Tensor) -> tuple[Tensor, ...]:
        leaves = dict(zip(given, (*args, *fused.values()), strict=True))
        members = [{name: u[m] if name in own else u for name, u in leaves.items()} for m in range(2)]
        ends = [call(kernel.selective_scan, member) for member in members]
        return tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    got, want = results(under_vmap, stacked), results(one_by_one, stacked)
    for name, u in want.items():
        torch.testing.assert_close(got[name], u, msg=lambda text, name=name: f"{name}: {text}")


def test_several_gradients_at_once(device: torch.device) -> None:
    """The backward itself under vmap."""
    leaves = {name: u.detach().requires_grad_() for name, u in inputs(5, device=device, size=2).items()}
    y, _ = call(kernel.selective_scan, leaves)
    wanted, ups = list(leaves.values()), laws.draw(2, *y.shape, dtype=SINGLE).to(device)
    together = torch.autograd.grad(y, wanted, ups, is_grads_batched=True, retain_graph=True)
    for i, up in enumerate(ups):
        for got, want in zip(together, torch.autograd.grad(y, wanted, up, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want)


def mixers_of(device: torch.device, **options: Any) -> tuple[Any, Any]:
    """The same weights in the kernel's form and in the plain one."""
    built = [
        laws.build(holdall.describe("mamba").configure(width=8, state=2, form=form, **options)).to(device)
        for form in ("kernel", "parallel")
    ]
    assert [mixer.form for mixer in built] == ["kernel", "parallel"]
    return built[0], built[1]


@pytest.mark.parametrize("options", [{}, {"inner_norm": True, "bias": True, "dt_rank": 3}], ids=str)
def test_a_mixer_in_pieces_is_the_plain_one(options: dict[str, Any], device: torch.device) -> None:
    """A norm of 3 ranks must not count the zeros that fill them up to 8."""
    fast, other = mixers_of(device, **options)
    x = laws.draw(2, 9, 8, dtype=SINGLE).to(device)
    with torch.no_grad():
        want = laws.plainly(laws.outcome, other, x)
        truth = laws.outcome(laws.twin(other, dtype=DOUBLE).to(device), x.double())
        for sizes in ([9], [3, 5, 1], [6, 1, 1, 1]):
            for inplace in (False, True):
                got = laws.named(*laws.read_in_pieces(functools.partial(fast, inplace=inplace), x, sizes))
                for name, u in got.items():
                    laws.assert_as_good_as_plain(f"{name} in {sizes}", u, want[name], truth[name])


def test_a_mixers_gradients_are_the_plain_ones(device: torch.device) -> None:
    """With projections filled up, to 8 ranks and 8 inputs and outputs of the state, here of 1 and 4."""
    fast, other = mixers_of(device)
    down, up, sizes = fast._narrow_projections(fill=True)
    assert (len(down), up.shape[1], sizes) == (16, 8, [8, 2, 2, 4])
    x = laws.draw(2, 9, 8, dtype=SINGLE).to(device)

    def gradients(mixer: Any, x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(mixer(x)[0].square().sum(), list(mixer.parameters())))

    got, plain = gradients(fast, x), laws.plainly(gradients, other, x)
    truth = gradients(laws.twin(other, dtype=DOUBLE).to(device), x.double())
    for (name, _), *three in zip(fast.named_parameters(), got, plain, truth, strict=True):
        laws.assert_as_good_as_plain(name, *three)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_population_trains_under_vmap(autocast: bool, device: torch.device) -> None:
    fast, _ = mixers_of(device)
    x = laws.draw(2, 2, 6, 8, dtype=SINGLE).to(device)
    assert_trains_under_vmap(fast, x, autocast=autocast)


@torch.no_grad()
def test_a_step_in_place_under_vmap(device: torch.device) -> None:
    fast, _ = mixers_of(device)
    x = laws.draw(3, 2, 1, 8, dtype=SINGLE).to(device)
    state = fast(x.flatten(0, 1))[1]
    states = [type(state)(*(u.unflatten(0, (3, 2)).clone() for u in state)) for _ in range(2)]

    def step(x: Tensor, state: Any, inplace: bool) -> Any:
        return fast(x, state, inplace=inplace)

    y, new = torch.func.vmap(functools.partial(step, inplace=False))(x, states[0])
    z, _ = torch.func.vmap(functools.partial(step, inplace=True))(x, states[1])
    laws.assert_bitwise("y", z, y)
    laws.assert_bitwise("the state", states[1].h_BEN, new.h_BEN)


@pytest.mark.compile
@traced
def test_one_graph_under_compile(device: torch.device) -> None:
    fast, _ = mixers_of(device)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = laws.draw(2, 5, 8, dtype=SINGLE).to(device).requires_grad_()
    with torch.no_grad():
        _, state = fast(x[:, :4])
        for inplace in (False, True):
            given = [laws.map_state(state, torch.clone) for _ in range(2)]
            got, want = (
                laws.named(*f(x[:, :1], s, inplace=inplace))
                for f, s in zip((compiled, fast), given, strict=True)
            )
            for name, tensor in want.items():
                torch.testing.assert_close(got[name], tensor)
    (got_x,), (want_x,) = (torch.autograd.grad(f(x, state)[0].square().sum(), x) for f in (compiled, fast))
    torch.testing.assert_close(got_x, want_x)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    with pytest.raises(KernelError, match="float64"):
        call(kernel.selective_scan, {n: u.double() for n, u in inputs(3, device=device).items()})
    assert "float64" in holdall.describe("mamba").configure().kernel_refusal(device, DOUBLE)


@pytest.mark.gpu
def test_a_cuda_graph_replays_training_and_steps(device: torch.device, assert_replays: Any) -> None:
    given = inputs(100, device=device, dtype=HALF, batch=2)
    leaves = {name: u.detach().requires_grad_() for name, u in given.items()}
    with torch.no_grad():
        ups = [torch.randn_like(end) for end in call(kernel.selective_scan, leaves)]
    token = {name: u[:, :1] if name in ("x", "dt", "b", "c", "z_BTD") else u for name, u in given.items()}

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(kernel.selective_scan, leaves), list(leaves.values()), ups)

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        return call(kernel.selective_scan, token)

    assert_replays(train)
    assert_replays(step)


@pytest.mark.gpu
def test_a_new_length_compiles_nothing(device: torch.device) -> None:
    kernels = kernel._forward_kernel, kernel._backward_kernel, kernel._ends_kernel
    for length in (64, 1000):  # one segment, and several
        results(kernel.selective_scan, inputs(length, device=device))
    before = times_compiled(*kernels)
    for length in (2, 16, 63, 128, 2048):
        results(kernel.selective_scan, inputs(length, device=device))
    assert times_compiled(*kernels) == before


@pytest.mark.gpu("tens of GB")
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    """The last row of many is as if alone, where its offset is beyond 2^31."""
    given = inputs(1 << 20, device=device, channels=32, size=1, dtype=HALF)
    many = {n: u.expand(66, *u.shape[1:]) if u.ndim == 3 else u for n, u in given.items()}
    many = {n: u.contiguous() for n, u in many.items()}
    many["x"][:-1] = 0
    assert many["x"].numel() > 1 << 31
    with torch.no_grad():
        want, got = (call(kernel.selective_scan, each) for each in (given, many))
    for name, one, u in zip(("y", "state"), want, got, strict=True):
        torch.testing.assert_close(
            u[-1:], one, rtol=2e-2, atol=2e-2, msg=lambda text, name=name: f"{name}: {text}"
        )
