"""The index problem by hand: n fair bits in a linear attention of F features, whose accuracy is known.

    S = sum_i x_i c_i          y_i = c_i . S / |c_i|^2 = x_i + crosstalk          answer: the sign of y_i

c_i is the code of index i, x_i the bit as -1 or 1. With F random signs for a code, the crosstalk of the n - 1
others has variance (n - 1) / F, so that a bit is right with probability

    Phi(sqrt(F / (n - 1)))             S in full precision
    Phi(sqrt(2 F / (pi n)))            of each element of S the sign alone

and with one-hot codes, F = n, every bit is right from one bit per feature: no model does better. One-way
communication of the index problem takes n (1 - h(a)) bits at accuracy a, h being the binary entropy (Ablayev,
"Lower bounds for one-way probabilistic communication complexity", 1996).

The mixer is `linear-attention` with the identity map and no normaliser. A token is x_i c_i, or x_i in place i
where there are more features than indices; keys are its code, queries that code over |c_i|^2, and values 1,
by their bias. A head has one value, so that the heads together carry exactly F elements. A question is the
token of a 1, which adds 1 to its own answer: the bias of the output takes it away.

Letters: S the state; x_i bit i, c_i its code, y_i what is read of it; n indices, F features, Phi the
distribution function of the normal distribution, a accuracy. Of shapes: N indices, F features, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdall.contract import Config
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.model import seeded
from holdall.settings import PositiveInt, Seed
from holdall.theory.messages import Bare

CERTAIN = 50.0
"""The logit of an answer that has no crosstalk."""
LARGEST = 1 << 28
"""Elements of the largest matrix that is built, 1 GiB."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig(Config):
    """A linear attention that holds bits."""

    bits: PositiveInt = 1024
    """Bits to hold, n."""
    features: PositiveInt = 1024
    """Features, F: elements of the state."""
    one_hot: bool = False
    """One-hot codes, one feature for each bit, instead of random signs."""
    seed: Seed = 0
    """Seed of the random codes."""

    def validate(self) -> None:
        if self.one_hot and self.features != self.bits:
            raise ValueError(
                f"one-hot codes of {self.bits} bits have {self.bits} features, not {self.features}"
            )
        if any(side * self.features > LARGEST for side in (self.bits, self._width)):
            raise ValueError(
                f"{self.bits:,} bits in {self.features:,} features take matrices of more than {LARGEST:,} "
                "elements: lower one of them, or take a number of features with more divisors"
            )

    def predicted(self, format: str = "fp32") -> float | None:
        """The accuracy of the theory, for states in full precision or in one bit; None for other formats."""
        if self.one_hot:
            return 1.0
        if format == "int1":
            return normal_below(math.sqrt(2 * self.features / (math.pi * self.bits)))
        if format in ("fp32", "bf16", "fp16"):  # whose rounding is far below the crosstalk
            return normal_below(math.sqrt(self.features / (self.bits - 1))) if self.bits > 1 else 1.0
        return None

    def codes(self) -> Tensor:
        """c, (N, F) of signs, or one-hot."""
        if self.one_hot:
            return torch.eye(self.bits)
        generator = torch.Generator().manual_seed(self.seed)
        return 2.0 * torch.randint(2, (self.bits, self.features), generator=generator) - 1

    def build(self) -> Bare:
        """The model, in fp32: tokens 2 i and 2 i + 1 are a 0 and a 1 of bit i, logits 0 and 1 the answers."""
        code_NF = self.codes()
        # where there are more features than indices, a place for each index, and heads with several features
        spread = self.features >= self.bits
        width = self._width
        token_ND = torch.eye(self.bits, width) if spread else code_NF
        config = LinearAttentionConfig(
            width=width, heads=width, feature_dim=self.features // width, feature_map="identity",
            normalise=False, bias=True, chunk=16,
        )  # fmt: skip
        with seeded(0):  # what it draws is thrown away
            mixer = config.build()
        with torch.no_grad():
            for weight in mixer.parameters():
                weight.zero_()
            q_FD, k_FD, _ = mixer.qkv.weight.split(mixer.sizes)
            k_FD[:, : self.bits] = code_NF.T if spread else torch.eye(width)
            q_FD.copy_(k_FD / code_NF[0].square().sum())
            mixer.qkv.bias.split(mixer.sizes)[2].fill_(1)
            mixer.out_proj.weight[0].fill_(1)
            mixer.out_proj.bias[0] = -1
        head_VD = torch.zeros(2, width)
        # the logarithm of the odds of a bit is 2 y / variance
        sure = CERTAIN if self.one_hot else self.features / max(1, self.bits - 1)
        head_VD[:, 0] = torch.tensor([-sure, sure])
        return Bare(torch.stack((-token_ND, token_ND), dim=1).flatten(0, 1), [mixer], head_VD)

    @property
    def _width(self) -> int:
        """F, or where that is more than the bits, the smallest divisor that has a place for each of them."""
        if self.features < self.bits:
            return self.features
        heads = range(self.features // self.bits, 0, -1)
        return self.features // next(each for each in heads if self.features % each == 0)


def normal_below(x: float) -> float:
    """Phi, the distribution function of the normal distribution."""
    return (1 + math.erf(x / math.sqrt(2))) / 2
