"""The gated convolution's kernel against the loop in fp64, beside plain PyTorch in the same dtype."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import times_compiled
from torch import Tensor

from holdall.contract import Mixer, forms
from holdall.contract.rollback import LOST
from holdall.kernels import gated_conv as kernel
from holdall.mixers.base_conv import BaseConvConfig, ConvState
from holdall.mixers.gated_short_conv import GatedShortConvConfig
from holdall.ops import gated_conv as ops
from holdall.testing import laws

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
DEFINITION = functools.partial(ops.gated_conv, form="loop")
NAMES = ("x", "projected", "projection_bias", "weight", "bias", "past")

ZOOLOGY = {"halves": False, "silu": "none", "skip": True, "bias": True}
ZOOLOGY_SILU = {"halves": False, "silu": "both", "skip": True, "bias": True}
BASED = {"halves": True, "silu": "conv", "skip": False, "bias": False}


pytestmark = pytest.mark.usefixtures("poisoned")


def draw(
    batch: int, length: int, channels: int, taps: int, *,
    halves: bool, bias: bool, projection_bias: bool = True, **how: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """The tensors by name, in fp64, and the other arguments."""
    sizes = {
        "x": None if halves else (batch, length, channels),
        "projected": (batch, length, channels * (1 + halves)),
        "projection_bias": (channels * (1 + halves),) if projection_bias else None,
        "weight": (channels, taps),
        "bias": (channels,) if bias else None,
        "past": (batch, taps - 1, channels),
    }
    return {
        name: laws.draw(*size, dtype=DOUBLE, seed=seed)
        for seed, (name, size) in enumerate(sizes.items())
        if size is not None
    }, how


def pulled(function: Callable, tensors: dict[str, Tensor], how: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs from both of them together."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    ends = function(*(leaves.get(name) for name in NAMES), **how)
    ups = [laws.draw(*end.shape, dtype=DOUBLE, seed=10 + i).to(end) for i, end in enumerate(ends)]
    grads = torch.autograd.grad(ends, list(leaves.values()), ups)
    results = {"y": ends[0], "next past": ends[1]}
    results |= {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in results.items()}


def moved(tensors: dict[str, Tensor], *args: Any) -> dict[str, Tensor]:
    return {name: tensor.to(*args) for name, tensor in tensors.items()}


def check(
    tensors: dict[str, Tensor], how: dict[str, Any], dtype: torch.dtype, device: torch.device,
    definition: Callable = DEFINITION,
) -> None:  # fmt: skip
    """At most twice as far from the truth as plain PyTorch, in all outputs and gradients."""
    rounded = moved(tensors, device, dtype)
    truth = pulled(definition, moved(rounded, DOUBLE), how)
    plain = laws.plainly(pulled, ops.gated_conv, rounded, how)
    got = pulled(kernel.gated_conv, rounded, how)
    for name in plain:
        laws.assert_as_good_as_plain(name, got[name], plain[name], truth[name])


@pytest.mark.parametrize("form", [ZOOLOGY_SILU, BASED], ids=["zoology", "based"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_outputs_and_all_gradients(form: dict, dtype: torch.dtype, length: int, device: torch.device) -> None:
    tensors, how = draw(2, length, 20, 3, **form)
    check(tensors, how, dtype, device)


@pytest.mark.parametrize("taps", [2, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_numbers_of_taps(taps: int, length: int, device: torch.device) -> None:
    tensors, how = draw(3, length, 5, taps, **BASED)
    check(tensors, how, SINGLE, device)


@pytest.mark.parametrize(
    ("halves", "silu", "skip", "bias", "projection_bias"),
    [
        (False, "none", False, False, False),
        (True, "none", True, False, True),
        (True, "both", True, True, False),
        (False, "conv", False, True, True),
        (False, "both", True, False, True),
        (True, "none", False, True, True),
    ],
)
def test_options(
    halves: bool, silu: str, skip: bool, bias: bool, projection_bias: bool, device: torch.device
) -> None:
    options = {"halves": halves, "bias": bias, "projection_bias": projection_bias, "silu": silu, "skip": skip}
    tensors, how = draw(2, 40, 20, 3, **options)
    check(tensors, how, SINGLE, device)


def test_fp16(device: torch.device) -> None:
    tensors, how = draw(2, 20, 16, 4, **ZOOLOGY_SILU)
    check(tensors, how, torch.float16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [ZOOLOGY_SILU, BASED], ids=["zoology", "based"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "length", "channels"), [(2, 1000, 208), (9, 333, 1792), (3, 16384, 48)])
def test_long(
    form: dict, dtype: torch.dtype, batch: int, length: int, channels: int, device: torch.device
) -> None:
    tensors, how = draw(batch, length, channels, 3, **form)
    check(tensors, how, dtype, device, definition=ops.gated_conv)


def test_views_are_read_where_they_are(device: torch.device) -> None:
    """Tokens and gate out of the middle of larger tensors, in an order of their own, give the same bits."""
    tensors, how = draw(2, 9, 16, 3, **ZOOLOGY)
    tensors = moved(tensors, device, SINGLE)
    large = torch.full((12, 2, 80), torch.nan, device=device)
    large[2:11, :, 16:32] = tensors["x"].transpose(0, 1)
    large[2:11, :, 48:64] = tensors["projected"].transpose(0, 1)
    views = {**tensors, "x": large[2:11, :, 16:32].transpose(0, 1)}
    views["projected"] = large[2:11, :, 48:64].transpose(0, 1)
    views["past"] = tensors["past"].repeat_interleave(2, dim=-1)[..., ::2]
    want, got = (pulled(kernel.gated_conv, each, how) for each in (tensors, views))
    for name, tensor in want.items():
        laws.assert_bitwise(name, got[name], tensor)


def test_gradients_that_are_views(device: torch.device) -> None:
    """Gradients come in as they are: from a sum as one number seen everywhere, or transposed."""
    tensors, how = draw(2, 9, 16, 3, **BASED)
    leaves = {name: tensor.requires_grad_() for name, tensor in moved(tensors, device, SINGLE).items()}
    y_BTD, _ = kernel.gated_conv(*(leaves.get(name) for name in NAMES), **how)
    up_DTB = laws.draw(16, 9, 2, dtype=SINGLE).to(device)
    for up_BTD in (torch.ones((), device=device).expand_as(y_BTD), up_DTB.permute(2, 1, 0)):
        got, want = (
            torch.autograd.grad(y_BTD, list(leaves.values()), up, retain_graph=True)
            for up in (up_BTD, up_BTD.contiguous())
        )
        assert all(map(torch.equal, got, want))


def test_the_same_bits_twice(device: torch.device) -> None:
    tensors, how = draw(2, 70, 20, 3, **BASED)
    first, second = (pulled(kernel.gated_conv, moved(tensors, device, HALF), how) for _ in range(2))
    for name, tensor in first.items():
        laws.assert_bitwise(name, second[name], tensor)


@pytest.mark.parametrize("length", [1, 2, 8])
@pytest.mark.parametrize("taps", [2, 3, 5])
def test_a_past_given_away_is_written_over(length: int, taps: int, device: torch.device) -> None:
    tensors, how = draw(2, length, 12, taps, **BASED)
    args = [moved(tensors, device, SINGLE).get(name) for name in NAMES]
    with torch.no_grad():
        y_BTD, next_BPD = kernel.gated_conv(*args, **how)
        given = args[-1].clone()
        z_BTD, after_BPD = kernel.gated_conv(*args[:-1], given, **how, inplace=True)
    laws.assert_bitwise("y", z_BTD, y_BTD)
    laws.assert_bitwise("past", after_BPD, next_BPD)
    assert after_BPD is given


@pytest.mark.parametrize("form", [ZOOLOGY_SILU, BASED], ids=["zoology", "based"])
@pytest.mark.parametrize("length", [1, 5, 6, 70])
def test_a_past_in_a_ring(length: int, form: dict, device: torch.device) -> None:
    """Rows of their own counts. What a call does not write stays, and what it does not see may be NaN."""
    (tensors, how), taps, slots = draw(2, length, 12, 3, **form), 3, 7
    seen_B, slot_S = torch.tensor([1, 12], device=device), torch.arange(slots, device=device)
    old_BS = (seen_B[:, None] - 1 - slot_S) % slots >= taps - 1
    # before the first token of a row is a zero
    unread_BS = (slot_S >= seen_B[:, None]).cpu()
    ring_BPD = laws.draw(2, slots, 12, dtype=DOUBLE, seed=9).masked_fill(unread_BS[..., None], 0)
    kept = {**tensors, "past": ring_BPD}
    check(kept, {**how, "seen_B": seen_B}, SINGLE, device)
    args = [moved(kept, device, SINGLE).get(name) for name in NAMES]
    at_BP = (seen_B[:, None] - torch.tensor([2, 1], device=device)) % slots
    narrow_BPD = args[-1].take_along_dim(at_BP[..., None], 1)
    spoilt_BPD = args[-1].masked_fill(old_BS[..., None], torch.nan)
    with torch.no_grad():
        want_BTD, _ = kernel.gated_conv(*args[:-1], narrow_BPD, **how)
        plain_BTD, next_BPD = ops.gated_conv(*args[:-1], spoilt_BPD, seen_B, **how)
        for inplace in (False, True):
            given = spoilt_BPD.clone()
            y_BTD, after_BPD = kernel.gated_conv(*args[:-1], given, seen_B, **how, inplace=inplace)
            laws.assert_bitwise("y", y_BTD, want_BTD)
            torch.testing.assert_close(y_BTD, plain_BTD)
            torch.testing.assert_close(after_BPD, next_BPD, equal_nan=True)
            assert (after_BPD is given) == inplace
            if not inplace:
                torch.testing.assert_close(given, spoilt_BPD, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 6])
def test_a_row_that_gave_back_too_much_is_nan_and_no_other(length: int, device: torch.device) -> None:
    tensors, how = draw(2, length, 12, 3, **BASED)
    tensors["past"] = laws.draw(2, 7, 12, dtype=DOUBLE)
    args = [moved(tensors, device, SINGLE).get(name) for name in NAMES]
    right_BTD, _ = kernel.gated_conv(*args, torch.tensor([9, 9], device=device), **how)
    y_BTD, _ = kernel.gated_conv(*args, torch.tensor([9, LOST], device=device), **how)
    laws.assert_bitwise("the other row", y_BTD[0], right_BTD[0])
    if length < 6 or device.type == "cuda":  # more is not the kernel's, and on a CPU nobody can be lost
        assert y_BTD[1].isnan().all()


def test_mixed_dtypes(device: torch.device) -> None:
    """As under autocast: a product in bf16, tokens, parameters and state in fp32."""
    tensors, how = draw(2, 9, 16, 3, **ZOOLOGY_SILU)
    tensors = moved(tensors, device, SINGLE)
    tensors["projected"] = tensors["projected"].bfloat16()
    got = pulled(kernel.gated_conv, tensors, how)
    want = pulled(kernel.gated_conv, moved(tensors, SINGLE), how)
    for name, tensor in want.items():
        assert got[name].dtype == (HALF if name == "gradient of projected" else SINGLE), name
        torch.testing.assert_close(got[name], tensor.to(got[name].dtype))


MEMBERS = 3


@pytest.mark.parametrize(
    "form", [pytest.param(ZOOLOGY, id="zoology", marks=pytest.mark.full), pytest.param(BASED, id="based")]
)
@pytest.mark.parametrize(
    "own",
    [
        {*NAMES},
        {"projection_bias", "weight", "bias"},
        {"x", "projected", "past"},
        {"projected", "weight"},
    ],
    ids=["all", "parameters", "tokens", "gate and taps"],
)
def test_a_population_is_its_members(form: dict, own: set[str], device: torch.device) -> None:
    """Under vmap, with tensors of its own or shared, each member gets and learns what it would alone."""
    members = [moved(draw(2, 9, 12, 3, **form)[0], device, SINGLE) for _ in range(MEMBERS)]
    how = draw(2, 9, 12, 3, **form)[1]
    for i, member in enumerate(members):
        for name in own & member.keys():
            member[name] = member[name] + 0.1 * i
    names = list(members[0])
    own = own & set(names)
    stacked = [
        torch.stack([m[name] for m in members]) if name in own else members[0][name].clone() for name in names
    ]
    dims = tuple(0 if name in own else None for name in names)

    def one(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        return kernel.gated_conv(*(given.get(name) for name in NAMES), **how)

    leaves = [tensor.requires_grad_() for tensor in stacked]
    ends = torch.func.vmap(one, in_dims=dims)(*leaves)
    ups = [laws.draw(*end[0].shape, dtype=DOUBLE, seed=10 + i).to(end) for i, end in enumerate(ends)]
    grads = torch.autograd.grad(ends, leaves, [up.expand_as(end) for up, end in zip(ups, ends, strict=True)])
    alone = [pulled(kernel.gated_conv, member, how) for member in members]
    for i, want in enumerate(alone):
        laws.assert_bitwise("y", ends[0][i], want["y"])
        laws.assert_bitwise("past", ends[1][i], want["next past"])
    for name, grad in zip(names, grads, strict=True):
        wants = torch.stack([want[f"gradient of {name}"] for want in alone])
        torch.testing.assert_close(grad, wants if name in own else wants.sum(0), msg=f"gradient of {name}")


def test_several_gradients_at_once(device: torch.device) -> None:
    """The backward has a rule of its own for vmap."""
    tensors, how = draw(2, 9, 12, 3, **BASED)
    leaves = {name: tensor.requires_grad_() for name, tensor in moved(tensors, device, SINGLE).items()}
    y_BTD, _ = kernel.gated_conv(*(leaves.get(name) for name in NAMES), **how)
    ups = laws.draw(2, *y_BTD.shape, dtype=SINGLE).to(device)

    def grads(up: Tensor, **batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y_BTD, list(leaves.values()), up, retain_graph=True, **batched)

    for name, *both, got in zip(leaves, *map(grads, ups), grads(ups, is_grads_batched=True), strict=True):
        laws.assert_bitwise(name, got, torch.stack(both))


def test_a_past_given_away_within_vmap(device: torch.device) -> None:
    tensors, how = draw(2, 1, 12, 3, **BASED)
    args = [moved(tensors, device, SINGLE).get(name) for name in NAMES[:-1]]
    past = torch.stack([laws.draw(2, 2, 12, dtype=SINGLE, seed=i).to(device) for i in range(2)])
    given = past.clone()
    with torch.no_grad():
        wants = [kernel.gated_conv(*args, each, **how) for each in past]
        y, after = torch.func.vmap(lambda each: kernel.gated_conv(*args, each, **how, inplace=True))(given)
    for i, (want_y, want_after) in enumerate(wants):
        for name, got, want in (("y", y, want_y), ("past", after, want_after), ("given", given, want_after)):
            laws.assert_bitwise(name, got[i], want)


@pytest.mark.compile
# torch's own, while it imports the compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_as_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    tensors, how = draw(2, 9, 12, 3, **BASED)
    tensors = moved(tensors, device, SINGLE)
    compiled = torch.compile(kernel.gated_conv, fullgraph=True, backend="aot_eager")
    want, got = (pulled(function, tensors, how) for function in (kernel.gated_conv, compiled))
    for name, tensor in want.items():
        laws.assert_bitwise(name, got[name], tensor)
    args = [tensors.get(name) for name in NAMES]
    with torch.no_grad():
        y_BTD, next_BPD = compiled(*(a if a is None else a.clone() for a in args), **how, inplace=True)
    laws.assert_bitwise("y", y_BTD, want["y"])
    laws.assert_bitwise("past", next_BPD, want["next past"])


@pytest.mark.gpu
def test_runs_within_a_cuda_graph(device: torch.device, assert_replays: Any) -> None:
    tensors, how = draw(4, 65, 96, 3, **BASED)
    leaves = {name: x.requires_grad_() for name, x in moved(tensors, device, HALF).items()}
    args = [leaves.get(name) for name in NAMES]

    def train() -> list[Tensor]:
        ends = kernel.gated_conv(*args, **how)
        grads = torch.autograd.grad(ends, list(leaves.values()), [torch.ones_like(end) for end in ends])
        return [*ends, *grads]

    assert_replays(train)


@pytest.mark.gpu
def test_no_length_is_compiled_for(device: torch.device) -> None:
    counts = []
    for length, batch in ((100, 2), (16, 2), (17, 3), (101, 1), (1024, 16)):
        tensors, how = draw(batch, length, 48, 3, **BASED)
        pulled(kernel.gated_conv, moved(tensors, device, HALF), how)
        counts.append(times_compiled(kernel._forward_kernel, kernel._backward_kernel))
    assert len(set(counts)) == 1, counts


@pytest.mark.gpu("tens of GB")
def test_beyond_32_bit_offsets(device: torch.device) -> None:
    """In a projection of more than 2^32 elements the last tokens of each row are what they are alone."""
    batch, length, channels, last = 2, 300_000, 3584, 30
    projected = torch.empty(batch, length, 2 * channels, dtype=HALF, device=device)
    projected[:, :-last].fill_(0.1)
    end = torch.randn(batch, last, 2 * channels, device=device).to(HALF)
    projected[:, -last:] = end
    weight = torch.randn(channels, 3, device=device).to(HALF)
    past = torch.zeros(batch, 2, channels, dtype=HALF, device=device)
    y, after = kernel.gated_conv(None, projected.requires_grad_(), None, weight, None, past, silu="conv")
    z, then = kernel.gated_conv(None, end.requires_grad_(), None, weight, None, past + 0.1, silu="conv")
    assert torch.equal(y[:, -last:], z)
    assert torch.equal(after, then)
    up = torch.randn_like(z)
    ups = torch.zeros_like(y)
    ups[:, -last:] = up
    (got,) = torch.autograd.grad(y, projected, ups)
    (want,) = torch.autograd.grad(z, end, up)
    assert torch.equal(got[:, -last:], want)
    assert not got[:, : -last - 2].any()


# ------------------------------------------------------------------------------------------------- refusals


def test_what_it_cannot_take_is_refused_with_the_reason(device: torch.device) -> None:
    tensors, how = draw(1, 2, 4, 9, **BASED)
    with pytest.raises(forms.KernelError, match="2 to 8 taps, not 9"):
        kernel.gated_conv(*(moved(tensors, device, SINGLE).get(name) for name in NAMES), **how)
    with pytest.raises(forms.KernelError, match="float64"):
        kernel.gated_conv(*(moved(tensors, device).get(name) for name in NAMES), **how)
    assert "2 to 8 taps" in BaseConvConfig(kernel=9).kernel_refusal(device, SINGLE)
    with pytest.raises(forms.KernelError, match="short filter only"):
        BaseConvConfig(width=8, filter="long", form="kernel").build()


# --------------------------------------------------------------------------------------------- the mixers


# of BaseConv, and, where there is a bias, of the convolution between two gates, slices of one projection
MIXERS = [
    {},
    {"activation": "silu", "kernel": 4},
    {"expand": 4},
    {"bias": False},
    {"bias": True, "kernel": 4},
]


def mixer(device: torch.device, form: str, options: dict[str, Any], dtype: torch.dtype = SINGLE) -> Mixer:
    config = GatedShortConvConfig if "bias" in options else BaseConvConfig
    return laws.build(config(width=12, form=form, **options)).to(device, dtype)


@pytest.mark.parametrize("options", MIXERS, ids=str)
@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "bf16"])
def test_the_mixer_in_its_kernel_form(options: dict, dtype: torch.dtype, device: torch.device) -> None:
    """Outputs, state and gradients of parameters, tokens and state, from a state, against the loop."""
    x_BTD = laws.draw(2, 10, 12, dtype=dtype).to(device)
    past = 3 if options.get("kernel") else 2
    state = ConvState(laws.draw(2, past, 24 if "expand" in options else 12, dtype=dtype, seed=1).to(device))

    def results(form: str, kind: torch.dtype) -> dict[str, Tensor]:
        each = mixer(device, form, options, dtype).to(kind)
        leaf, start = x_BTD.to(kind).requires_grad_(), state.past_BPD.to(kind).requires_grad_()
        y_BTD, after = each(leaf, ConvState(start))
        ends = (y_BTD, after.past_BPD)
        ups = [laws.draw(*end.shape, dtype=dtype, seed=4 + i).to(end) for i, end in enumerate(ends)]
        grads = torch.autograd.grad(ends, [leaf, start, *each.parameters()], ups)
        names = ("y", "past", "x", "start", *dict(each.named_parameters()))
        return dict(zip(names, (*ends, *grads), strict=True))

    got, truth = results("kernel", dtype), results("loop", DOUBLE)
    for name, plain in laws.plainly(results, "parallel", dtype).items():
        laws.assert_as_good_as_plain(name, got[name], plain, truth[name])


@pytest.mark.parametrize("options", MIXERS, ids=str)
def test_the_mixer_under_autocast(options: dict, device: torch.device) -> None:
    """Parameters, tokens and state stay fp32, products are bf16."""
    x_BTD = laws.draw(2, 10, 12, dtype=SINGLE).to(device)
    results = []
    for form, cast in (("kernel", True), ("parallel", True), ("loop", False)):
        each = mixer(device, form, options)
        with torch.autocast(device.type, torch.bfloat16, enabled=cast):
            y_BTD, after = each(x_BTD)
        grads = torch.autograd.grad((y_BTD.float().square().sum()), list(each.parameters()))
        assert after.past_BPD.dtype == SINGLE
        results.append([y_BTD.float(), after.past_BPD, *grads])
    for got, plain, truth in zip(*results, strict=True):
        bound = 2 * laws.distance(plain, truth) + 2 * torch.finfo(HALF).eps * laws.size(truth)
        assert laws.distance(got, truth) <= bound


@pytest.mark.parametrize("options", MIXERS, ids=str)
def test_a_population_of_mixers(options: dict, device: torch.device) -> None:
    stage, *copies = (mixer(device, "kernel", options) for _ in range(3))
    with torch.no_grad():
        for parameter in copies[1].parameters():
            parameter.mul_(1.1)
    parameters, buffers = torch.func.stack_module_state(copies)
    x_NBTD = laws.draw(2, 2, 10, 12, dtype=SINGLE).to(device)

    def one(parameters: dict, buffers: dict, x_BTD: Tensor) -> Tensor:
        call = torch.func.functional_call
        return call(stage, (parameters, buffers), (x_BTD,), {"want_state": False})[0]

    y_NBTD = torch.func.vmap(one)(parameters, buffers, x_NBTD)
    grads = torch.autograd.grad(y_NBTD.square().sum(), list(parameters.values()))
    for i, alone in enumerate(copies):
        y_BTD, _ = alone(x_NBTD[i], want_state=False)
        torch.testing.assert_close(y_NBTD[i], y_BTD)
        own = torch.autograd.grad(y_BTD.square().sum(), list(alone.parameters()))
        for got, want in zip(grads, own, strict=True):
            torch.testing.assert_close(got[i], want)
