"""Models built by hand for MQAR: an embedding, a few of Holdall's own mixers with weights set, a linear head.

Nothing is trained: each construction is a theorem about recall with its weights written down, and the model
that comes of it answers rows of `holdall.tasks.mqar`. The layers stand bare, one after another, without the
norms, residuals and MLPs of the backbone, since a norm would round what is meant to be exact.

    from holdall.theory import by_hand
    model = by_hand.constructions()["attention"](vocab=8192, length=256).build()
    rows = MQAR(vocab=8192, length=256, pairs=64, filler="key-free").generate(16)
    by_hand.right(model, rows).double().mean()      # 1.0

Two kinds of code stand for a token, each a row of D numbers or fewer:

    signs    the bits of its number as +1 and -1; `random_signs` draws them instead
    p-hot    its number in base c^(1/p), each of the p digits one-hot; p = 1 is one-hot

p-hot codes are those of Arora et al., "Just read twice", 2024, arXiv 2407.05483, definition G.10.

Letters: B rows, T tokens, N tokens of a row, K questions of a row, D width, V vocabulary, c the tokens that a
code tells apart, p its digits.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from holdall import mixers
from holdall.contract import Config, Mixer, MixerConfig, did_you_mean
from holdall.settings import PositiveInt, Range
from holdall.tasks.data import Questions, Rows
from holdall.tasks.mqar import Batch

WIDEST = 4096
"""Largest width that a construction builds: beyond it, its dense maps would take gigabytes."""
VALUES_AT_ONCE = 1 << 24
"""Activations of one layer that `right` holds at once, which bounds its memory."""


@dataclass(frozen=True, kw_only=True)
class ByHandConfig(Config):
    """Base of the constructions: what all need to know of the rows that they answer."""

    vocab: Annotated[int, Range(least=4, most=2**20)] = 256
    """V, the tokens of the vocabulary: the lower half are keys, the upper half values."""
    length: PositiveInt = 64
    """N, the tokens of the longest row."""

    name: ClassVar[str]
    """Its name in the registry and on the command line."""
    claim: ClassVar[str]
    """The theorem, in a sentence or two."""
    sizes: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Options of the models that a frontier shows of it."""

    @property
    def label(self) -> str:
        """What pictures and tables call it, with the options that differ among `sizes`."""
        return f"{self.name} by hand"

    @property
    def useful(self) -> bool:
        """Whether its size is not beyond what rows of this kind can use."""
        return True

    @abstractmethod
    def build(self, dtype: torch.dtype = torch.float64) -> HandBuilt:
        """The model, all weights in `dtype`."""

    @abstractmethod
    def used_state(self, context_len: int) -> int:
        """Elements of a row's state that carry something after so many tokens.

        The tensors hold more (`HandBuilt.state_elements`): a mixer's keys and values have the sizes that its
        options allow, and where a construction leaves a part of them empty, it is carried all the same.
        """

    def promised(self, rows: Batch) -> Tensor | None:
        """Which questions the theorem says are right, (B, K) of bool; None where it gives a share only.

        By default all of them. Rows have the filler "key-free".
        """
        return torch.ones_like(rows.positions, dtype=torch.bool)

    def remark(self, rows: Batch, right_BK: Tensor) -> str:
        """What the theorem says of these rows beside what was answered, in a sentence."""
        promised_BK = self.promised(rows)
        if promised_BK is None:
            return (
                "the theorem says no more than that fewer pairs, or a larger state, make more answers right"
            )
        agree, count = int((promised_BK == right_BK).sum()), right_BK.numel()
        share = float(promised_BK.double().mean())
        return f"{agree:,} of {count:,} questions as the theorem says, which promises {share:.2%}"


C = TypeVar("C", bound=type[ByHandConfig])
_known: dict[str, type[ByHandConfig]] = {}


def construction(name: str, *, claim: str) -> Callable[[C], C]:
    """Register a construction's config under its name."""

    def register(config: C) -> C:
        config.name, config.claim = name, claim
        _known[name] = config
        return config

    return register


def constructions() -> dict[str, type[ByHandConfig]]:
    """All constructions by name, in the order of the documentation."""
    import holdall.theory.by_hand_attention
    import holdall.theory.by_hand_conv  # noqa: F401 - they register what they define

    return dict(_known)


def configured(wanted: str, **rows: int) -> ByHandConfig:
    """The construction that "NAME" or "NAME:option=value,option=value" names, for rows of that kind.

    rows: `vocab` and `length`.
    Raises KeyError, TypeError or ValueError for an unknown name or option, or a value that does not fit.
    """
    name, options = mixers.options_of(wanted)
    if name not in (known := constructions()):
        raise KeyError(f"unknown construction '{name}'. {did_you_mean(name, known)}")
    return known[name].from_dict({**rows, **options})


# ------------------------------------------------------------------------------------------------ model


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a model is made of, all counted."""

    layers: int
    """Mixers."""
    width: int
    """D."""
    parameters: int
    """Of embedding, mixers and head."""
    non_zeros: int
    """Parameters of the mixers that are not zero."""
    state_elements: int
    """Elements of a row's state after the row, all layers, those of empty parts too."""
    used_state: int
    """Elements of these that carry something."""


class HandBuilt(nn.Module):
    """Embedding, layers one after another, and a linear head; `ByHandConfig.build` makes them."""

    def __init__(
        self, config: ByHandConfig, embedding_VD: Tensor, layers: Sequence[Mixer], head_VD: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding_VD = nn.Parameter(embedding_VD)
        self.layers: Any = nn.ModuleList(layers)  # of mixers, which a ModuleList does not say
        self.head_VD = nn.Parameter(head_VD)
        self.to(embedding_VD.dtype).requires_grad_(False)

    def forward(
        self, tokens_BT: Tensor, states: Sequence[Any] | None = None, *, want_state: bool = True
    ) -> tuple[Tensor, list[Any]]:
        """Read T more tokens of each row: the last layer's outputs (B, T, D), and each layer's state."""
        x_BTD, after = self.embedding_VD[tokens_BT], []
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            x_BTD, state = layer(x_BTD, state, want_state=want_state)
            after.append(state)
        return x_BTD, after

    def logits(self, y_BTD: Tensor) -> Tensor:
        """Scores of all tokens, (..., V), from the last layer's outputs."""
        return y_BTD @ self.head_VD.T

    def between(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """The embeddings, then each layer's outputs, (B, T, D) each."""
        x_BTD = self.embedding_VD[tokens_BT]
        yield x_BTD
        for layer in self.layers:
            x_BTD, _ = layer(x_BTD, want_state=False)
            yield x_BTD

    def state_elements(self, context_len: int) -> int:
        """Elements of one row's state after so many tokens, all layers."""
        return sum(layer.state_elements(context_len) for layer in self.layers)

    def report(self) -> Report:
        """What the model is made of, and its state after a row of the length that it was built for."""
        length = self.config.length
        return Report(
            layers=len(self.layers),
            width=self.embedding_VD.shape[1],
            parameters=sum(weight.numel() for weight in self.parameters()),
            non_zeros=sum(int(weight.count_nonzero()) for weight in self.layers.parameters()),
            state_elements=self.state_elements(length),
            used_state=self.config.used_state(length),
        )


def blank(config: MixerConfig) -> Any:
    """A mixer with all weights zero."""
    with torch.device("meta"):  # draws nothing
        mixer = config.build()
    mixer = mixer.to_empty(device="cpu").requires_grad_(False)
    for weight in mixer.parameters():
        weight.zero_()
    return mixer


@torch.no_grad()
def right(
    model: HandBuilt,
    rows: Rows | Questions,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Which questions a model answers with the value asked for, (B, K) of bool, on the device of the rows.

    watch: called with the rows that are done and with all of them, after each part.
    """
    if not isinstance(rows, Questions):
        rows = Questions(rows.tokens, rows.positions, rows.answers)
    tokens_BN, at_BK, answer_BK = rows
    answers, (count, length), device = [], tokens_BN.shape, model.embedding_VD.device
    step = max(1, VALUES_AT_ONCE // (length * max(length, model.embedding_VD.shape[1])))
    for start in range(0, count, step):
        part = slice(start, start + step)
        y_BTD, _ = model(tokens_BN[part].to(device), want_state=False)
        y_BKD = y_BTD.gather(1, at_BK[part, :, None].to(device).expand(-1, -1, y_BTD.shape[2]))
        answers.append(model.logits(y_BKD).argmax(-1).to(answer_BK.device))
        watch(min(start + step, count), count)
    return torch.cat(answers) == answer_BK


# ------------------------------------------------------------------------------------------------ codes


def bits_of(count: int) -> int:
    """Bits that tell so many tokens apart: the logarithm to base 2, rounded up, at least 1."""
    return max(1, math.ceil(math.log2(count)))


def signs(count: int) -> Tensor:
    """The bits of 0 .. count - 1 as +1 and -1, (count, bits), the lowest bit first."""
    bit_F = torch.arange(bits_of(count))
    return 2.0 * (torch.arange(count)[:, None] >> bit_F & 1) - 1.0


def random_signs(count: int, features: int, seed: int) -> Tensor:
    """Independent fair signs, (count, features); the seed alone decides them."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, (count, features), generator=generator) - 1.0


@functools.lru_cache(maxsize=16)
def base_of(count: int, digits: int) -> int:
    """The smallest base in which so many digits write all of 0 .. count - 1, at least 2."""
    base = max(2, round(count ** (1 / digits)) - 1)
    while base**digits < count:
        base += 1
    return base


def p_hot(count: int, digits: int) -> Tensor:
    """The numbers 0 .. count - 1 with each digit one-hot, (count, digits * base), the lowest digit first."""
    base = base_of(count, digits)
    digit_VP = torch.arange(count)[:, None] // base ** torch.arange(digits) % base
    return nn.functional.one_hot(digit_VP, base).flatten(1).double()
