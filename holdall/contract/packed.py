"""States in fewer bits: packed between calls, in the bytes of a format, and unpacked before the next call.

    packed = pack(state, Format("int8"))         what is kept
    y_BTD, state = mixer(x_BTD, packed.unpack()) what the mixer reads and returns
    packed.bits_per_row                          counted from the tensors that are kept

Every tensor of floating-point numbers is stored by rows of its last dimension:

    fp32, bf16, fp16    x rounded                              saturating where x is finite
    fp8                 s, and x / s rounded to e4m3           s the least power of two >= max|x| / 448
    int8, int4, int2    s, and x / s rounded to an integer     s the least power of two >= max|x| / 127, 7, 1
    int1                s, and the sign of x, to mean s or -s  s the power of two nearest to mean|x|

s takes 8 bits, as in the Microscaling formats, and is that of one row of the last dimension: in s_BHKV of a
head and key, in k_BSHK of a token and head, in z_BHF of a head, in h_BEN of a channel, in past_BPD of a
token. A last dimension of 2, a complex number, counts as one with the dimension before it. Counters and token
ids stay as they are. A power of two costs at most one bit of precision, and what is unpacked is exact in any
dtype that has the format's digits: packed again it is the same, so a cache is rounded once, however often it
is carried.

In int2 and int1 a scale is worth 4 or 8 elements. There it is shared by as many dimensions, from the last, as
make up 32 elements; so in a cache with fewer per token, tokens share scales, and are rounded again when more
come. int2 has the values -s, 0 and s; int1 has no zero, but of a row in which all are.

How x / s is rounded:

    nearest        to the nearest value, half to even
    stochastic     up or down, so that the mean is right: a long sum does not lose what is smaller than a step
                   (not int1)
    feedback       to the nearest, and the error is kept, to 1/16 of a step, in 4 more bits; unpacking adds
                   it, so it is there when the state is changed and rounded next (int8 and int4)

An error that is fed back is a part of the state, and is counted: int4 with feedback takes the bits of int8.

Sources: Rouhani et al., "Microscaling Data Formats for Deep Learning", 2023, arXiv 2310.10537 (powers of two
as scales); Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, arXiv 1502.02551 (stochastic
rounding); Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014 (error feedback).
Letters: B batch row, R the rows that have a scale each, N elements of one, M bytes of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from holdall.contract.config import did_you_mean
from holdall.contract.state import State

FormatName = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4", "int2", "int1"]
Rounding = Literal["nearest", "stochastic", "feedback"]

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Formats without scales."""
LARGEST = {"fp8": 448, "int8": 127, "int4": 7, "int2": 1, "int1": 1}
"""The largest stored value of formats with scales."""
BITS_PER_CODE = {"int4": 4, "int2": 2, "int1": 1}
"""Bits of an element in formats that put several into a byte."""
BLOCK = 32
"""Elements that share a scale, at least, in int2 and int1, as in the Microscaling formats."""
REST_STEPS = 16
"""Steps of the kept error in one step of the format."""
NOT_FINITE = -128
"""The exponent of a row with NaN or infinity in it, which is unpacked as NaN."""
NOTHING = -127
"""The exponent of a row of zeros in int1, which is unpacked as zeros."""


@dataclass(frozen=True)
class Format:
    """What a state is stored in. Raises ValueError for an unknown one."""

    name: str
    """The format of each element."""
    rounding: str = "nearest"
    """How a value comes to be one of the format's."""

    all: ClassVar[tuple[str, ...]] = get_args(FormatName)

    def __post_init__(self) -> None:
        if self.name not in self.all:
            raise ValueError(f"unknown format '{self.name}'. {did_you_mean(self.name, self.all)}")
        if self.rounding not in (known := get_args(Rounding)):
            raise ValueError(f"unknown rounding '{self.rounding}'. {did_you_mean(self.rounding, known)}")
        if self.rounding == "stochastic" and self.name == "int1":
            raise ValueError("int1 keeps the sign alone, which is not rounded: leave +stochastic out")
        if self.rounding == "feedback" and self.name not in ("int8", "int4"):
            raise ValueError(f"error feedback is for int8 and int4, not for {self.name}")

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format of "int8", "int8+stochastic" or "int8+feedback"; raises ValueError for another."""
        name, _, rounding = text.partition("+")
        return cls(name, rounding or "nearest")  # checked above

    def __str__(self) -> str:
        return self.name if self.rounding == "nearest" else f"{self.name}+{self.rounding}"


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a state, as it is kept."""

    format: Format
    """What its elements are stored in."""
    sizes: torch.Size
    """Its sizes."""
    dtype: torch.dtype
    """Its dtype, which it gets back."""
    codes: Tensor
    """The stored elements: (B, R, N), or (B, R, M) bytes with two, four or eight elements in each."""
    exponents_BR: Tensor | None = None
    """log2 of the scales, in int8."""
    rest_BRM: Tensor | None = None
    """The kept errors, two in a byte."""

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """The tensors that are stored."""
        return tuple(t for t in (self.codes, self.exponents_BR, self.rest_BRM) if t is not None)

    def unpack(self) -> Tensor:
        """The tensor again, in its own dtype."""
        if self.exponents_BR is None:
            return self.codes.to(self.dtype).view(self.sizes)
        length = _row_length(self.sizes, self.format)
        wide = torch.promote_types(self.dtype, torch.float32)
        bits = BITS_PER_CODE.get(self.format.name)
        x_BRN = (_from_bytes(self.codes, length, bits) if bits else self.codes).to(wide)
        if self.rest_BRM is not None:
            x_BRN += _from_bytes(self.rest_BRM, length) / REST_STEPS
        scale_BR = _power_of_two(self.exponents_BR).to(wide)
        scale_BR = scale_BR.masked_fill(self.exponents_BR == NOT_FINITE, math.nan)
        scale_BR = scale_BR.masked_fill(self.exponents_BR == NOTHING, 0)
        return (x_BRN * scale_BR[..., None]).to(self.dtype).view(self.sizes)


@dataclass(frozen=True)
class PackedState:
    """A mixer's state, as it is kept between calls."""

    kind: type
    """The NamedTuple that the state is."""
    tensors: tuple[PackedTensor | Tensor, ...]
    """Its tensors in order; those of integers as they are."""

    def unpack(self) -> State:
        """The state again, of the mixer's own kind and dtypes."""
        return self.kind(*(t if isinstance(t, Tensor) else t.unpack() for t in self.tensors))

    @property
    def bits_per_row(self) -> int:
        """Bits of all that is kept of one batch row, scales and counters included."""
        kept = [t for part in self.tensors for t in ((part,) if isinstance(part, Tensor) else part.kept)]
        return sum(8 * tensor.element_size() * tensor.shape[1:].numel() for tensor in kept)


def pack(state: State, format: Format, generator: torch.Generator | None = None) -> PackedState:
    """A mixer's state in a format, whatever its tensors are; the state is left as it is.

    generator: for stochastic rounding, on the state's device.
    """
    packed = (_pack(t, format, generator) if t.is_floating_point() else t for t in state)
    return PackedState(type(state), tuple(packed))


def _pack(x: Tensor, format: Format, generator: torch.Generator | None) -> PackedTensor:
    wide_BRN = _rows(x, format).to(torch.promote_types(x.dtype, torch.float32))
    random = format.rounding == "stochastic"
    if format.name in PLAIN:
        # never wider than it was, as a cache is in bf16 beside activations in bf16
        narrow = min((PLAIN[format.name], x.dtype), key=lambda dtype: dtype.itemsize)
        codes = _to_float(wide_BRN, narrow, generator, random)
        return PackedTensor(format, x.shape, x.dtype, codes)
    largest = LARGEST[format.name]
    most_BR = wide_BRN.abs().amax(-1) if wide_BRN.numel() else wide_BRN.new_zeros(wide_BRN.shape[:2])
    if format.name == "int1":
        return PackedTensor(
            format, x.shape, x.dtype, _to_bytes(wide_BRN >= 0, 1), _mean_exponents(wide_BRN, most_BR)
        )
    mantissa_BR, exponent_BR = torch.frexp(most_BR / largest)  # a mantissa of 1/2 is a power of two itself
    exponent_BR = (exponent_BR - (mantissa_BR == 0.5).int()).clamp(-126, 127)
    y_BRN = wide_BRN / _power_of_two(exponent_BR).to(wide_BRN.dtype)[..., None]
    y_BRN = y_BRN.nan_to_num_(0, 0, 0).clamp_(-largest, largest)
    exponents_BR = exponent_BR.masked_fill(~most_BR.isfinite(), NOT_FINITE).to(torch.int8)
    if format.name == "fp8":
        codes = _to_float(y_BRN, torch.float8_e4m3fn, generator, random)
        return PackedTensor(format, x.shape, x.dtype, codes, exponents_BR)
    whole_BRN, rest_BRM = _random_round(y_BRN, generator) if random else y_BRN.round(), None
    if format.rounding == "feedback":
        fine_BRN = (REST_STEPS * y_BRN).round()
        whole_BRN = ((fine_BRN + REST_STEPS // 2) / REST_STEPS).floor()
        rest_BRM = _to_bytes(fine_BRN - REST_STEPS * whole_BRN)
    bits = BITS_PER_CODE.get(format.name)
    codes = _to_bytes(whole_BRN, bits) if bits else whole_BRN.to(torch.int8)
    return PackedTensor(format, x.shape, x.dtype, codes, exponents_BR, rest_BRM)


def _mean_exponents(x_BRN: Tensor, most_BR: Tensor) -> Tensor:
    """log2 of the powers of two nearest to mean|x|, by ratio: an error of at most sqrt(2)."""
    mean_BR = x_BRN.double().abs().mean(-1) if x_BRN.numel() else most_BR
    mantissa_BR, exponent_BR = torch.frexp(mean_BR)
    exponent_BR = (exponent_BR - (mantissa_BR < math.sqrt(0.5)).int()).clamp(-126, 127)
    exponent_BR = exponent_BR.masked_fill(most_BR == 0, NOTHING)
    return exponent_BR.masked_fill(~most_BR.isfinite(), NOT_FINITE).to(torch.int8)


def _row_length(sizes: torch.Size, format: Format) -> int:
    """Elements that share a scale: the last dimension's, with the one before it for complex numbers, and in
    int2 and int1 with as many as make up a block."""
    dims, joined = sizes[1:], 1 + (len(sizes) > 2 and sizes[-1] == 2)
    if format.name in ("int2", "int1"):
        while joined < len(dims) and dims[-joined:].numel() < BLOCK:
            joined += 1
    return dims[-joined:].numel()


def _rows(x: Tensor, format: Format) -> Tensor:
    """(B, R, N): no two batch rows share a scale."""
    length = _row_length(x.shape, format)
    return x.reshape(x.shape[0], x.shape[1:].numel() // max(length, 1), length)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to a whole power of -1022 to 1023, in fp64: exactly, as no library's `pow` promises."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _random_round(y: Tensor, generator: torch.Generator | None) -> Tensor:
    """Down or up to an integer, with the probabilities that make the mean y; integers stay."""
    below = y.floor()
    draw = torch.rand(y.shape, generator=generator, dtype=y.dtype, device=y.device)
    return below + (draw < y - below)


def _to_float(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None, random: bool) -> Tensor:
    """x in a floating-point format; what is finite stays finite."""
    about = torch.finfo(dtype)
    if random:
        x = x.double()  # whose exponents reach below those of all formats
        # the values of a format with p binary digits are 2^(e + 1 - p) apart between 2^e and 2^(e + 1), and
        # evenly below its smallest normal number
        lowest, digits = round(math.log2(about.tiny)), 1 - round(math.log2(about.eps))
        apart = _power_of_two((torch.frexp(x).exponent - 1).clamp(min=lowest) + 1 - digits)
        finite = x.isfinite()
        x = torch.where(finite, _random_round(torch.where(finite, x / apart, 0), generator) * apart, x)
    if dtype.itemsize >= x.element_size():
        return x.to(dtype)
    return torch.where(x.isfinite(), x.clamp(about.min, about.max), x).to(dtype)


def _to_bytes(whole_BRN: Tensor, bits: int = 4) -> Tensor:
    """Integers of a few bits, the first of a byte lowest; a row is filled up with zeros to whole bytes.

    They are from -8 to 7 in 4 bits, -2 to 1 in 2 bits, and 0 or 1 in one.
    """
    per_byte = 8 // bits
    padded_BRN = torch.nn.functional.pad(whole_BRN.to(torch.int16), (0, -whole_BRN.shape[-1] % per_byte))
    codes = (padded_BRN & ((1 << bits) - 1)).view(
        *padded_BRN.shape[:-1], padded_BRN.shape[-1] // per_byte, per_byte
    )
    return (codes << _shifts(bits, codes.device)).sum(-1).to(torch.uint8)


def _from_bytes(packed_BRM: Tensor, length: int, bits: int = 4) -> Tensor:
    """The integers of `_to_bytes`, of rows of this length; those of one bit as -1 and 1."""
    codes = (packed_BRM[..., None].to(torch.int16) >> _shifts(bits, packed_BRM.device)) & ((1 << bits) - 1)
    sign = 1 << bits >> 1
    whole = 2 * codes - 1 if bits == 1 else (codes ^ sign) - sign
    return whole.to(torch.int8).flatten(-2)[..., :length]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int16, device=device)
