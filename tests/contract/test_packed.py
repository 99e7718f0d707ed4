"""States in fewer bits: errors are within a step, what is stored packs to itself, all bits are counted."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdall import mixers
from holdall.contract import Format, bytes_per_row, pack

NEAREST = [Format(name) for name in Format.all]
FORMATS = [
    *NEAREST,
    *(Format(name, "stochastic") for name in Format.all if name != "int1"),
    Format("int8", "feedback"),
    Format("int4", "feedback"),
]
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "int2": 2, "int1": 1}
SHARED = ("int2", "int1")
"""Formats in which several rows of the last dimension share a scale."""


class Some(NamedTuple):
    x_BHV: Tensor
    seen_B: Tensor


class Only(NamedTuple):
    x: Tensor


def some(x: Tensor) -> Some:
    return Some(x, torch.arange(len(x)))


def drawn(seed: int, heads: int, values: int, spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, with zeros and a row of nothing else among them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, heads, values, generator=rng, dtype=torch.float64)
    x *= 10 ** (spread * torch.randn(3, heads, 1, generator=rng, dtype=torch.float64))
    x[torch.rand(x.shape, generator=rng) < 0.1] = 0
    x[0, 0] = 0
    return x.to(dtype)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


VALUES = st.sampled_from((1, 3, 4, 5, 8, 9))
"""Elements of a row; two would be a complex number."""
SIZES = given(st.integers(0, 10**6), st.integers(1, 3), VALUES, st.sampled_from((0.0, 1.0, 4.0)))


def steps(format: Format, x: Tensor) -> Tensor:
    """The distance of the format's values around each x, from the format's definition."""
    if format.name.startswith("int"):
        rows = (-2, -1) if format.name in SHARED else -1
        most = x.abs().amax(rows, keepdim=True) / {"int8": 127, "int4": 7, "int2": 1}[format.name]
        step = torch.where(most > 0, 2.0 ** torch.log2(most).ceil(), 0).expand_as(x)
        return step / 16 if format.rounding == "feedback" else step
    digits, lowest = {"fp32": (24, -126), "bf16": (8, -126), "fp16": (11, -14), "fp8": (4, -6)}[format.name]
    scale = torch.ones(())
    if format.name == "fp8":
        most = x.abs().amax(-1, keepdim=True) / 448
        scale = torch.where(most > 0, 2.0 ** torch.log2(most).ceil(), 1)
    exponent = torch.log2((x / scale).abs()).floor().clamp(min=lowest)
    return scale * 2.0 ** (exponent + 1 - digits)


@pytest.mark.parametrize("format", [format for format in FORMATS if format.name != "int1"], ids=str)
@settings(max_examples=25, deadline=None)
@SIZES
def test_an_element_moves_by_half_a_step_at_most_and_stays_when_packed_again(
    format: Format, seed: int, heads: int, values: int, spread: float
) -> None:
    if format.name == "fp16":
        spread = min(spread, 0.5)  # no saturation
    state = some(drawn(seed, heads, values, spread))
    x, before = state.x_BHV.double(), state.x_BHV.clone()
    kept = pack(state, format, rng(seed))
    after: Any = kept.unpack()
    assert torch.equal(state.x_BHV, before)
    assert after.x_BHV.dtype == torch.float32
    assert torch.equal(after.seen_B, state.seen_B)
    bound = steps(format, x) * (1 if format.rounding == "stochastic" else 0.5)
    assert ((after.x_BHV.double() - x).abs() <= bound * (1 + 1e-12)).all()
    again = pack(after, format, rng(seed + 1)).unpack()
    assert torch.equal(again[0], after.x_BHV)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(max_examples=25, deadline=None)
@SIZES
def test_bits_are_those_of_the_tensors_that_are_kept(
    format: Format, seed: int, heads: int, values: int, spread: float
) -> None:
    kept = pack(some(drawn(seed, heads, values, spread)), format, rng())
    tensors = kept.tensors[0].kept  # type: ignore[union-attr]
    stored = sum(len(tensor.contiguous().view(torch.uint8).flatten()) for tensor in tensors)
    assert kept.bits_per_row == 8 * stored / 3 + 64  # the counter is as it was
    if format.name in SHARED:  # so few elements have one scale, and whole bytes
        assert kept.bits_per_row == 8 * math.ceil(BITS[format.name] * heads * values / 8) + 8 + 64
        return
    odd = values % 2 * 4  # half a byte is filled up
    each = BITS[format.name] * values + (odd if format.name == "int4" else 0)
    each += 8 * (format.name in ("fp8", "int8", "int4"))
    each += (4 * values + odd) * (format.rounding == "feedback")
    assert kept.bits_per_row == heads * each + 64


@settings(max_examples=50, deadline=None)
@SIZES
def test_one_bit_keeps_the_sign_and_a_size_within_the_root_of_two_of_the_mean(
    seed: int, heads: int, values: int, spread: float
) -> None:
    x = drawn(seed, heads, values, spread)
    kept = pack(some(x), Format("int1"))
    after: Any = kept.unpack()
    for before, back in zip(x, after.x_BHV, strict=True):
        mean = before.double().abs().mean()
        if mean == 0:
            assert not back.any()
            continue
        assert torch.equal(back > 0, before >= 0)
        (size,) = back.abs().unique().tolist()
        assert math.frexp(size)[0] == 0.5
        assert 0.5**0.5 <= size / mean <= 2**0.5
    again = pack(after, Format("int1")).unpack()
    assert torch.equal(again[0], after.x_BHV)


def test_blocks_of_few_bits_have_32_elements_and_never_two_batch_rows() -> None:
    sizes_and_scales = [((2, 64), 1), ((2, 3, 64), 3), ((2, 8, 4), 1), ((2, 5, 8, 4), 5), ((2, 3, 40, 2), 3)]
    for sizes, scales in [*sizes_and_scales, ((2,), 1), ((2, 0, 3), 0), ((2, 100, 1, 1), 1)]:
        for name in SHARED:
            tensor: Any = pack(Only(torch.randn(sizes)), Format(name)).tensors[0]
            assert tensor.exponents_BR.numel() == 2 * scales, (name, sizes)
            assert tensor.unpack().shape == sizes
    x = torch.tensor([[3.0, -1.0, 0.0, 2.0, -3.0], [1e-3, 0, 0, 0, -1e-3]])
    assert pack(Only(x), Format("int2")).unpack()[0][0].tolist() == [4.0, 0.0, 0.0, 0.0, -4.0]
    assert pack(Only(x), Format("int1")).unpack()[0][0].tolist() == [2.0, -2.0, 2.0, 2.0, -2.0]
    tensor = pack(Only(x), Format("int1")).tensors[0]
    assert tensor.codes[0].tolist() == [[0b01101]]


def test_scales_belong_to_a_head_and_key_and_never_to_two_batch_rows() -> None:
    complex_numbers = [((2, 6, 2), 1), ((2, 3, 6, 2), 3)]
    for sizes, scales in [
        ((2, 3, 4, 5), 12),
        ((2, 7), 1),
        ((2,), 1),
        ((2, 2), 1),
        ((2, 0, 3), 0),
        *complex_numbers,
    ]:
        tensor: Any = pack(Only(torch.randn(sizes)), Format("int8")).tensors[0]
        assert tensor.exponents_BR.shape == (2, scales), sizes
        assert tensor.unpack().shape == sizes


def test_a_row_of_another_size_changes_no_other() -> None:
    x = drawn(0, 3, 8, 0.0)
    larger = x.clone()
    larger[1, 2] *= 1000
    for format in NEAREST:
        one, other = (pack(some(each), format).unpack()[0] for each in (x, larger))
        same = torch.ones(3, 3, dtype=torch.bool)
        same[1, slice(None) if format.name in SHARED else 2] = False
        assert torch.equal(one[same], other[same])


def test_stochastic_rounding_is_right_in_the_mean_and_nearest_is_not() -> None:
    x = torch.full((1, 4000, 8), 0.3)
    x[..., 0] = 64  # a step of 1 in int8
    for name, step in (("int8", 1.0), ("int4", 16.0)):
        mean = pack(some(x), Format(name, "stochastic"), rng()).unpack()[0][..., 1:].mean()
        deviation = step * math.sqrt(0.3 / step * (1 - 0.3 / step) / (4000 * 7))
        assert abs(mean - 0.3) < 5 * deviation
        assert not pack(some(x), Format(name)).unpack()[0][..., 1:].any()
    for name, largest, step in (("fp16", 1.0, 2.0**-24), ("fp8", 448.0, 2.0**-9), ("bf16", 1.0, 2.0**-9)):
        x.fill_(0.3 * step if name != "bf16" else 0.25 + 0.3 * step)[..., 0] = largest
        mean = (pack(some(x), Format(name, "stochastic"), rng()).unpack()[0][..., 1:].double() / step).mean()
        assert abs(mean - x[0, 0, 1].double() / step) < 5 * math.sqrt(0.3 * 0.7 / (4000 * 7))
    same = [pack(some(x), Format("int8", "stochastic"), rng(seed)).unpack()[0] for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_a_long_sum_loses_what_is_smaller_than_half_a_step() -> None:
    def sum_of(term: float, rounding: Any) -> Tensor:
        state, random = some(torch.zeros(1, 1, 400)), rng()
        state.x_BHV[..., 0] = 100  # a step of 1
        for _ in range(round(16 / term)):
            state.x_BHV[..., 1:] += term
            state = pack(state, Format("int8", rounding), random).unpack()
        return state.x_BHV[..., 1:]

    assert not sum_of(0.25, "nearest").any()
    assert (sum_of(0.25, "feedback") == 16).all()
    assert not sum_of(1 / 64, "feedback").any()  # whose step is 1/16
    for term in (0.25, 1 / 64):
        assert abs(sum_of(term, "stochastic").mean() - 16) < 5 * math.sqrt(16 / 399)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_nan_and_infinity_are_not_hidden(format: Format) -> None:
    x = torch.ones(1, 3, 4)
    x[0, 0, 1], x[0, 1, 1] = math.nan, math.inf
    after = pack(some(x), format, rng()).unpack()[0]
    if format.name in ("fp32", "bf16", "fp16"):
        assert torch.equal(after[0, 0].isnan(), x[0, 0].isnan())
        assert torch.equal(after[0, 1], x[0, 1])
    elif format.name in SHARED:
        assert after.isnan().all()
        return
    else:
        assert after[0, :2].isnan().all()
    assert torch.equal(after[0, 2], x[0, 2])


def test_what_is_too_large_for_16_bits_saturates() -> None:
    x = torch.tensor([[[1e30, -7e4]]])
    assert pack(some(x), Format("fp16")).unpack()[0].tolist() == [[[65504.0, -65504.0]]]


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_state_of_another_dtype_packs_to_itself_and_to_no_more_bits(
    format: Format, dtype: torch.dtype
) -> None:
    state = some(drawn(0, 3, 8, 0.3, dtype))
    kept = pack(state, format, rng())
    after: Any = kept.unpack()
    assert after.x_BHV.dtype == dtype
    exact = format.rounding != "feedback" or dtype == torch.float64  # 12 bits do not fit into 16
    if exact:
        again = pack(after, format, rng(1)).unpack()
        assert torch.equal(again[0], after.x_BHV)
    assert BITS[format.name] > 16 or kept.bits_per_row <= 64 + 3 * 8 * 16
    if format.name == "fp32":
        assert kept.bits_per_row == 64 + 3 * 8 * min(32, 8 * dtype.itemsize)
        assert dtype == torch.float64 or torch.equal(after.x_BHV, state.x_BHV)


def test_formats_are_parsed_and_others_refused() -> None:
    assert [str(Format.parse(str(format))) for format in FORMATS] == list(map(str, FORMATS))
    for text, why in (
        ("int7", "unknown format 'int7'"),
        ("int8+feedbak", "Did you mean 'feedback'"),
        ("fp8+feedback", "is for int8 and int4"),
        ("int2+feedback", "is for int8 and int4"),
        ("int1+stochastic", "leave .stochastic out"),
    ):
        with pytest.raises(ValueError, match=why):
            Format.parse(text)


@pytest.mark.parametrize("name", mixers.names())
def test_every_mixer_s_state_can_be_kept_in_every_format(name: str) -> None:
    mixer = mixers.entry(name).configure(width=16).build()
    x_BTD = torch.randn(2, 9, 16, generator=rng())
    ids = {"tokens_BT": torch.arange(9).expand(2, 9)} if mixer.reads_tokens else {}
    with torch.no_grad():
        _, state = mixer(x_BTD, **ids)
        more = {key: value[:, :1] for key, value in ids.items()}
        for format in FORMATS:
            kept = pack(state, format, rng())
            after = kept.unpack()
            assert type(after) is type(state)
            y_BTD, _ = mixer(x_BTD[:, :1], after, **more)  # its border takes it
            assert y_BTD.isfinite().all()
            floats = sum(t[0].numel() for t in state if t.is_floating_point())
            whole = sum(8 * t[0].numel() * t.element_size() for t in state if not t.is_floating_point())
            assert kept.bits_per_row >= whole + floats * BITS[format.name]
            if format == Format("fp32"):
                assert kept.bits_per_row == 8 * bytes_per_row(state)
                assert all(map(torch.equal, after, state))
