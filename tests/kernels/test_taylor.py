"""The chunked Taylor kernel against plain PyTorch, which in fp64 is the referee."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from kernel_checks import times_compiled
from torch import Tensor

import holdall
from bench import read_twice
from holdall.contract import forms
from holdall.kernels import taylor
from holdall.kernels.taylor_step import taylor_step
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.ops.linear_attention import (
    FEATURE_MAPS,
    FeatureMap,
    absorb,
    kernel_refusal,
    linear_attention,
    taylor_features,
)

MAP = FEATURE_MAPS["taylor"]
LENGTHS = (1, 63, 64, 65, 200)
LONG = (1000, 16384)


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a test's few tokens are several segments."""
    monkeypatch.setattr(taylor, "SEGMENT", 128)


def inputs(
    length: int, key: int, value: int, device: torch.device, dtype: torch.dtype = torch.float32,
    *, rows: int = 1, heads: int = 2, state: bool = True, seed: int = 0,
) -> list[Tensor | None]:  # fmt: skip
    """q, k, v as views into one projection, as a mixer makes them; and a state in fp32."""
    rng = torch.Generator().manual_seed(seed)
    sizes = [heads * key, heads * key, heads * value]
    x = torch.randn(rows, length, sum(sizes), generator=rng).to(device, dtype)
    q, k, v = (u.unflatten(-1, (heads, -1)) for u in x.split(sizes, dim=-1))
    if not state:
        return [q, k, v, None, None]
    seen = torch.randn(2, rows, 20, heads, max(key, value), generator=rng).to(device)
    s, z = absorb(seen[0, ..., :key], seen[1, ..., :value], None, None, feature_map=MAP)
    return [q, k, v, s, z]


def everything(function, args: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs, final state, and the gradients of all inputs from all of these at once."""
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in args]
    out = function(*leaves)
    rng = torch.Generator().manual_seed(7)
    ups = [torch.randn(y.shape, generator=rng).to(y.device, y.dtype) for y in out]
    loss = sum((y * up.to(y.dtype)).sum() for y, up in zip(out, ups, strict=True))
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [*(y.detach() for y in out), *grads]


def plain(q, k, v, s, z, feature_map=MAP):
    return linear_attention(q, k, v, s, z, feature_map=feature_map, normalise=True)


ROUNDED = FeatureMap(
    features=lambda x: taylor_features(x.float()).bfloat16().float(), size=MAP.size, scores=MAP.scores
)
"""The map whose features enter products in bfloat16, which PyTorch's own products would round to as well."""


def assert_as_good_as_plain(function, reference, args: list[Tensor | None]) -> None:
    """Errors against fp64 are at most twice those of plain PyTorch in the same dtype.

    Beside bfloat16 tokens the states are sums in fp32, of products whose factors are bfloat16.
    """
    exact = everything(reference, args, torch.float64)
    ours, theirs = everything(function, args), everything(reference, args)
    rounded = everything(functools.partial(reference, feature_map=ROUNDED), args)
    tokens = next(x for x in args if x is not None).dtype
    for index, (mine, other, coarse, want) in enumerate(zip(ours, theirs, rounded, exact, strict=True)):
        other = coarse if mine.dtype != tokens else other
        error, allowed = ((u.double() - want).norm() / want.norm() for u in (mine, other))
        # one token alone is its own value, which plain PyTorch returns without any rounding
        floor = torch.finfo(mine.dtype).eps * (2 if mine.dtype == torch.float32 else 0.5)
        assert error <= 2 * allowed + floor, f"tensor {index}: {error:.2e} against {allowed:.2e}"


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", [*LENGTHS, *(pytest.param(n, marks=pytest.mark.gpu) for n in LONG)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_plain(device, short_segments, length, state, dtype) -> None:
    assert_as_good_as_plain(taylor.taylor_attention, plain, inputs(length, 8, 16, device, dtype, state=state))


def test_sizes(device, short_segments) -> None:
    """Neither keys nor values a power of two; the other sizes on a GPU."""
    assert_as_good_as_plain(taylor.taylor_attention, plain, inputs(150, 12, 48, device, heads=1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("key", "value"), [(8, 32), (8, 128), (16, 64), (16, 112), (24, 64), (24, 128), (32, 32), (32, 128)]
)
def test_sizes_of_language_models(device, short_segments, key, value) -> None:
    args = inputs(300, key, value, device, torch.bfloat16, heads=3)
    assert_as_good_as_plain(taylor.taylor_attention, plain, args)


@pytest.mark.gpu
def test_segments_of_their_real_length(device) -> None:
    """Also several rows and heads; with bf16, what a language model runs."""
    args = inputs(2049, 16, 64, device, torch.bfloat16, rows=3, heads=5)
    assert_as_good_as_plain(taylor.taylor_attention, plain, args)


def test_no_state_wanted(device, short_segments) -> None:
    q, k, v, s, z = inputs(150, 8, 16, device)
    y, *after = taylor.taylor_attention(q, k, v, s, z, want_state=False)
    torch.testing.assert_close(y, taylor.taylor_attention(q, k, v, s, z)[0], rtol=0, atol=0)
    assert after == [None, None]


@pytest.mark.parametrize("used", ["output", "state"])
def test_gradients_of_one_result_alone(device, short_segments, used) -> None:
    part = slice(0, 1) if used == "output" else slice(1, 3)
    # the state's own part of the gradient of q is zero: q is left out where only the state is used
    q, *args = inputs(150, 8, 16, device)

    def partly(function):
        return lambda *a, **options: function(q.to(a[0].dtype), *a, **options)[part]

    assert_as_good_as_plain(partly(taylor.taylor_attention), partly(plain), args)


@pytest.mark.parametrize("state", [False, True])
def test_absorb(device, short_segments, state) -> None:
    _, *args = inputs(150, 8, 16, device, state=state)
    assert_as_good_as_plain(taylor.absorb, functools.partial(absorb, feature_map=MAP), args)


def test_absorb_is_the_state_of_the_whole_and_stores_no_other(device, short_segments, monkeypatch) -> None:
    """To the bit: the same launches but for the outputs', and no states before the segments, which only
    queries ask for."""
    stored = []

    def prefix(sizes, *args, real=taylor._Sizes.prefix, **options):
        found = real(sizes, *args, **options)
        stored.append([states.numel() for states in found[:2]])
        return found

    monkeypatch.setattr(taylor._Sizes, "prefix", prefix)
    q, *args = inputs(300, 8, 16, device)
    _, *want = taylor.taylor_attention(q, *args)
    for got, state in zip(taylor.absorb(*args), want, strict=True):
        assert torch.equal(got, state)
    features = taylor.FEATURES(8)
    assert stored == [[2 * 3 * features * 16, 2 * 3 * features], [0, 0]]


def test_what_is_timed_as_reading_twice_is_prefix_linear_attention(device, short_segments) -> None:
    """Of bench/read_twice.py, whose other ways are only slower or of another model."""

    def theirs(q, k, v, prefix_k, prefix_v, feature_map=MAP):
        return plain(q, k, v, *absorb(prefix_k, prefix_v, None, None, feature_map=feature_map), feature_map)

    sizes = (140, 16), (140, 16), (140, 64), (70, 16), (70, 64)
    args = [read_twice.drawn(*size, 1, device.type)[:, :, :1] for size in sizes]
    assert_as_good_as_plain(read_twice.read_twice, theirs, args)


@pytest.mark.parametrize("prefix", [70, 140])
def test_a_prefix_without_direction_then_causal(device, short_segments, prefix) -> None:
    """Prefix linear attention: what was read without direction comes in as the state."""

    def prefix_then(read, attend):
        def both(q, k, v, **options):
            return attend(q, k, v, *read(k[:, :prefix], v[:, :prefix], **options), **options)

        return both

    args = inputs(150, 8, 16, device, state=False)[:3]
    ours = prefix_then(taylor.absorb, taylor.taylor_attention)
    theirs = prefix_then(
        lambda k, v, feature_map=MAP: absorb(k, v, None, None, feature_map=feature_map), plain
    )
    assert_as_good_as_plain(ours, theirs, args)


def test_populations(device, short_segments) -> None:
    """Under vmap a population is a larger batch, backward too; a state that all share is repeated."""
    members = [inputs(140, 8, 16, device, seed=seed) for seed in range(2)]
    s, z = members[0][3:]
    stacked = [torch.stack([m[i] for m in members]) for i in range(3)]

    def alone(*a):
        return taylor.taylor_attention(*a, s, z)

    together = everything(torch.func.vmap(alone), stacked)

    def one_by_one(*a):
        return tuple(map(torch.stack, zip(*(alone(*(x[i] for x in a)) for i in range(2)), strict=True)))

    for got, want in zip(together, everything(one_by_one, stacked), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.compile
def test_compiles_as_one_graph(device) -> None:
    args = inputs(70, 8, 16, device)
    compiled = torch.compile(taylor.taylor_attention, fullgraph=True, backend="aot_eager")
    for got, want in zip(everything(compiled, args), everything(taylor.taylor_attention, args), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_same_bits_twice(device, short_segments) -> None:
    args = inputs(260, 8, 16, device)
    once, again = (everything(taylor.taylor_attention, args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.gpu("tens of GB")
def test_more_than_two_billion_elements(device) -> None:
    """Offsets are 64 bits wide: the last row of a huge batch equals itself alone."""
    rows, length, width = 70, 16384, 2048
    x = torch.empty(rows, length, width, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    x[-1] = torch.randn(length, width, device=device)
    x[:-1] = x[-1]
    q, k, v = x[..., :16], x[..., 16:32], x[..., 32:96]
    q, k, v = (u.unflatten(-1, (1, -1)) for u in (q, k, v))
    y, s, _ = taylor.taylor_attention(q, k, v)
    alone, s_alone, _ = taylor.taylor_attention(q[-1:], k[-1:], v[-1:])
    assert torch.equal(y[-1:], alone)
    assert torch.equal(s[-1:], s_alone)


@pytest.mark.gpu
def test_in_a_cuda_graph(device, assert_replays) -> None:
    leaves = [x.requires_grad_() for x in inputs(1000, 16, 64, device, torch.bfloat16)]

    def train() -> list[Tensor]:
        out = taylor.taylor_attention(*leaves)
        return [*out, *torch.autograd.grad(sum(x.float().sum() for x in out), leaves)]

    assert_replays(train)


@pytest.mark.gpu
def test_a_new_length_compiles_nothing(device) -> None:
    kernels = [taylor._sums, taylor._prefix, taylor._outputs, taylor._grad_q, taylor._grad_kv]
    for length in (600, 1500):
        everything(taylor.taylor_attention, inputs(length, 16, 64, device, torch.bfloat16))
    before = times_compiled(*kernels)
    for length in (1, 17, 512, 777, 1024, 2048, 5000):
        everything(taylor.taylor_attention, inputs(length, 16, 64, device, torch.bfloat16))
    assert times_compiled(*kernels) == before


def test_says_why_not(device) -> None:
    q, k, v, *_ = inputs(5, 8, 16, device)
    with pytest.raises(forms.KernelError, match="float64"):
        taylor.taylor_attention(q.double(), k.double(), v.double())
    with pytest.raises(forms.KernelError, match="65504"):
        taylor.taylor_attention(q.half(), k.half(), v.half())
    wide = torch.zeros(1, 5, 1, 129, device=device)
    with pytest.raises(forms.KernelError, match="head widths <= 128"):
        taylor.taylor_attention(q, k, wide)


@pytest.mark.parametrize("name", ["taylor", "prefix-linear-attention"])
def test_the_mixer_runs_it(device, name) -> None:
    """The kernel form of a mixer gives what its parallel form gives, in pieces too."""
    options = {"width": 32, "heads": 2, "feature_dim": 8}
    torch.manual_seed(0)
    ours = holdall.build(name, form="kernel", **options).to(device)
    plainly = holdall.build(name, form="parallel", **options).to(device)
    plainly.load_state_dict(ours.state_dict())
    x_BTD = torch.randn(2, 80, 32, device=device)
    for cuts in ((80,), (70, 9, 1)):
        states: list = [None, None]
        for x in x_BTD.split(cuts, dim=1):
            (y, states[0]), (want, states[1]) = ours(x, states[0]), plainly(x, states[1])
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        for got, want in zip(*states, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_op_takes_the_step_for_one_token_unless_gradients_are_wanted(device) -> None:
    how = {"feature_map": MAP, "normalise": True, "form": "kernel"}
    for length, chunked in ((1, False), (2, True), (1, True)):
        args = inputs(length, 4, 8, device)
        if length == 1 and chunked:
            args = [args[0].detach().requires_grad_(), *args[1:]]
        got = linear_attention(*args, **how)
        want = (taylor.taylor_attention if chunked else taylor_step)(*args)
        assert all(map(torch.equal, got, want))
    one = inputs(1, 4, 8, device)
    kept = [u.clone() for u in one[3:]]
    linear_attention(*one, **how)
    assert all(map(torch.equal, one[3:], kept))
    _, *given = linear_attention(*one, **how, inplace=True)
    assert [u.data_ptr() for u in given] == [u.data_ptr() for u in one[3:]]


def test_a_copied_mixer_keeps_its_kernel(device) -> None:
    """`copy.deepcopy` and pickle make another object of a map, as of all that a mixer holds."""
    args, how = inputs(3, 4, 8, device), {"normalise": True, "form": "kernel"}
    want = linear_attention(*args, feature_map=MAP, **how)
    for copied in (copy.deepcopy(MAP), pickle.loads(pickle.dumps(MAP))):
        assert copied is not MAP
        assert kernel_refusal(4, 8, torch.float64, feature_map=copied) == kernel_refusal(
            4, 8, torch.float64, feature_map=MAP
        )
        assert all(map(torch.equal, linear_attention(*args, feature_map=copied, **how), want))
        assert all(
            map(torch.equal, absorb(*args[1:], feature_map=copied), absorb(*args[1:], feature_map=MAP))
        )


def test_the_op_has_no_kernel_for_other_maps(device) -> None:
    elu = FEATURE_MAPS["elu1"]
    q, k, v, *_ = inputs(3, 4, 8, device)
    assert "Taylor map" in kernel_refusal(4, 8, torch.float32, feature_map=elu)
    with pytest.raises(forms.KernelError):
        linear_attention(q, k, v, None, feature_map=elu, normalise=True, form="kernel")
    with pytest.raises(forms.KernelError, match="Taylor map"):
        absorb(k, v, None, None, feature_map=elu, form="kernel")


def test_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    fits, too_wide = TaylorConfig(width=64), TaylorConfig(width=256)
    assert fits.resolved_form(cpu) == "parallel"
    assert fits.resolved_form(cuda) == "kernel"
    assert too_wide.resolved_form(cuda) == "parallel"
    assert fits.resolved_form(cuda, torch.float64) == "parallel"
    with forms.strict(), pytest.raises(forms.KernelError, match="head widths <= 128"):
        too_wide.resolved_form(cuda)
    with forms.strict():
        assert fits.resolved_form(cuda) == "kernel"
    # there is none for a long filter that strict could miss
    with forms.strict():
        assert BaseConvConfig(filter="long").resolved_form(cuda) == "parallel"
