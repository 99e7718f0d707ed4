"""One-way messages: what the state of a model says to somebody who has nothing else, in bits.

A sender reads the context of a row; the states of all layers are its message. A receiver gets the bytes, and
nothing else of the sender's, and answers every question from a copy of that state. Whatever the model is,

    b  >=  I(X; message)  >=  H - sum_i H(X_i | message)
    H - sum_i H(X_i | message)  >=  H - sum_i E[-log2 p_i(X_i)]                      any probabilities p
    H - sum_i H(X_i | message)  >=  H - K (h(a) + (1 - a) log2(V - 1))               Fano

so the larger of the right sides, both of which can be measured, is conveyed, and is never more than was sent.
What is measured are means over a few rows; `sent_at_least` is what they prove about b with 95% confidence.

    message = send(states, Format("int4"))      bytes, and their bits
    states = receive(message.data, model)       all that the receiver has
    converse(model, exchange, Format("int4"))   bits sent, bits conveyed, accuracy

This is the argument by which Arora et al., "Just read twice", 2024, arXiv 2407.05483, and "Zoology", 2023,
arXiv 2312.04927, bound the state of recurrent models from below, run on a model. It says nothing of a row
that the weights have been trained on, which they may know by heart: rows have to be fresh.

Letters: b bits of the message, X the answers, X_i one of K, H their entropy, I the mutual information, V the
values that each may have, p_i what the receiver expects of X_i, E the mean over rows, a its accuracy, h the
binary entropy. Of shapes: B rows, N tokens of the context, Q questions of a row, T tokens of a question, V
values, R rows that are asked at once, D width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from holdall.contract import (
    POSITION_FIELDS,
    Format,
    Mixer,
    Position,
    State,
    StateError,
    map_state,
    misfit,
    pack,
    select_rows,
    trim,
)
from holdall.contract.packed import PackedTensor
from holdall.language_model import LanguageModel
from holdall.model import seeded
from holdall.tasks.information import Asked, answer_bits, recall_bits

CONFIDENCE = 0.95
"""Of the lower bound on what was sent."""
ELEMENTS_AT_ONCE = 1 << 23
"""Elements of copied states, or of logits, that are held at a time."""

# --------------------------------------------------------------------------------------- who sends and reads


@runtime_checkable
class Reader(Protocol):
    """What can send and receive: `Model` is one."""

    @property
    def mixers(self) -> Sequence[Mixer]: ...

    def __call__(self, tokens_BT: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        """Logits of the next T tokens, (B, T, V), and the states after them."""
        ...


class Bare(nn.Module):
    """Mixers one after another between an embedding and a head: no norms, no residual stream.

    Args:
        embedding_VD: of the tokens. head_VD: whose products with the last outputs are the logits; it may have
            other lines than there are tokens.
        mixers: of the embedding's width.
    """

    def __init__(self, embedding_VD: Tensor, mixers: Sequence[Mixer], head_VD: Tensor) -> None:
        super().__init__()
        self.embedding_VD, self.head_VD = nn.Parameter(embedding_VD), nn.Parameter(head_VD)
        self.layers = nn.ModuleList(mixers)
        self.requires_grad_(False)

    @property
    def mixers(self) -> list[Mixer]:
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, tokens_BT: Tensor, states: Sequence[State] | None = None) -> tuple[Tensor, list[State]]:
        x_BTD, after = self.embedding_VD[tokens_BT], []
        before: Sequence[State | None] = states or [None] * len(self.layers)
        for mixer, state in zip(self.mixers, before, strict=True):
            ids = {"tokens_BT": tokens_BT} if mixer.reads_tokens else {}
            x_BTD, state = mixer(x_BTD, state, **ids)
            after.append(state)
        return x_BTD @ self.head_VD.T, after


class _Layers(nn.Module):
    """A model that gives the outputs of its last layer, with `logits` of its own, as one that gives these."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.mixers = model, list(model.layers)

    def forward(self, tokens_BT: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        y_BTD, after = self.model(tokens_BT, states)
        return self.model.logits(y_BTD), after


def reader(model: Any, vocab: int = 0) -> Reader:
    """What reads tokens for a model.

    Args:
        model: a `Model` or `LanguageModel`; a mixer alone, which is put between a random embedding and head;
            or anything with `mixers` that returns logits and states, as a `Model` does, or with `layers` and
            `logits`, as models built by hand have.
        vocab: tokens of a mixer's embedding.

    Raises ValueError, naming the mixer, where states cannot be handed over: a mixer that reads all tokens at
    once and continues from none.
    """
    if isinstance(model, LanguageModel):
        model = model.model
    if isinstance(model, Mixer):
        model = _between(model, vocab)
    elif not hasattr(model, "mixers"):
        model = _Layers(model)
    for depth, mixer in enumerate(model.mixers):
        if "splits" in mixer.refusals and not mixer.prefix:
            why = mixer.refusals["splits"]
            raise ValueError(f"layer {depth}, {mixer.owner}, has no state to send: {why}")
    return model


def _between(mixer: Mixer, vocab: int) -> Bare:
    """A mixer between a random embedding and a random head, in the dtype of its weights."""
    if vocab < 2:
        raise ValueError(f"{mixer.owner} alone needs an embedding: say of how many tokens, vocab")
    weight, width = next(mixer.parameters()), mixer.config.width
    with seeded(0):
        embedding_VD, head_VD = torch.randn(2, vocab, width).to(weight).unbind()
    return Bare(embedding_VD, [mixer], head_VD * width**-0.5)


# --------------------------------------------------------------------------------------------- the message


@dataclass(frozen=True)
class Message:
    """The states of all layers as bytes. Bits are of one row, counted from the tensors that are in them."""

    data: bytes
    """A safetensors file: its tensors are the message, its header says their sizes, which both sides know."""
    element_bits: int
    """Bits of the states' elements."""
    scale_bits: int
    """Bits of the scales that formats of few bits have, and of errors that are fed back."""
    other_bits: int
    """Bits of counters and token ids, which stay as they are."""

    @property
    def bits(self) -> int:
        """Bits of the whole message."""
        return self.element_bits + self.scale_bits + self.other_bits


@torch.no_grad()
def send(states: Sequence[State], format: Format, generator: torch.Generator | None = None) -> Message:
    """States as bytes, in a format; "fp32" leaves states of at most that precision as they are.

    Args:
        states: one per layer, and one more of learned positions.
        generator: for stochastic rounding, on the states' device.
    """
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, list[Any]] = {}
    elements = scales = others = 0
    for layer, state in enumerate(map(trim, states)):
        parts = zip(type(state)._fields, pack(state, format, generator).tensors, strict=True)
        for field, part in parts:
            name = f"{layer}.{field}"
            if isinstance(part, Tensor):
                tensors[name] = part
                others += _bits(part)
                continue
            sizes[name] = [list(part.sizes), str(part.dtype).removeprefix("torch.")]
            rest = {"exponents": part.exponents_BR, "rest": part.rest_BRM}
            kept = {f"{name}.{what}": tensor for what, tensor in rest.items() if tensor is not None}
            tensors |= {f"{name}.codes": part.codes, **kept}
            elements += _bits(part.codes)
            scales += sum(map(_bits, kept.values()))
    about = {"format": str(format), "sizes": json.dumps(sizes)}
    data = tensors_to_bytes({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, about)
    return Message(data, elements, scales, others)


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.element_size() * tensor.shape[1:].numel()


@torch.no_grad()
def receive(data: bytes, model: Any) -> list[State]:
    """The states that are in the bytes of a message, for the mixers of `model`, on its device.

    Raises StateError, naming the layer, if they are no message or are another model's.
    """
    try:
        tensors, about = tensors_from_bytes(data), _about(data)
        format, sizes = Format.parse(about["format"]), json.loads(about["sizes"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise StateError(f"these {len(data)} bytes are no message, or a damaged one: {error}") from None
    mixers = reader(model).mixers
    weights = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    owners = [(mixer.state_type, mixer.state_fields(torch.float32), mixer.owner) for mixer in mixers]
    if any(f"{len(owners)}.{field.name}" in tensors for field in POSITION_FIELDS):
        owners.append((Position, POSITION_FIELDS, "a model with learned positions"))
    states = []
    for layer, (kind, fields, owner) in enumerate(owners):
        found = {field.name: _unpacked(tensors, f"{layer}.{field.name}", format, sizes) for field in fields}
        if missing := [name for name, tensor in found.items() if tensor is None]:
            raise StateError(f"the message has no {', '.join(missing)} of layer {layer}, as {owner} needs")
        state: State = kind(*found.values())  # type: ignore[arg-type]
        if why := misfit(state, kind, fields, owner, layer=f" of layer {layer}"):
            raise StateError(f"the message is another model's: {why}")
        states.append(state if weights is None else map_state(state, lambda t: t.to(weights.device)))
    if tensors:
        raise StateError(f"the message is of more than the model's {len(mixers)} layers: {sorted(tensors)}")
    return states


def _about(data: bytes) -> Mapping[str, str]:
    """What a safetensors file says of itself: eight bytes for the length of a header, which is JSON."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})


def _unpacked(
    tensors: dict[str, Tensor], name: str, format: Format, sizes: Mapping[str, Any]
) -> Tensor | None:
    """Take one tensor of a state out of a message's; None if it is not there."""
    if name not in sizes:
        return tensors.pop(name, None)
    shape, dtype = sizes[name]
    codes, exponents, rest = (tensors.pop(f"{name}.{what}", None) for what in ("codes", "exponents", "rest"))
    if codes is None:
        return None
    return PackedTensor(format, torch.Size(shape), getattr(torch, dtype), codes, exponents, rest).unpack()


# -------------------------------------------------------------------------------------------- the exchange


class Exchange(NamedTuple):
    """What is sent and asked: contexts, and questions whose answers are drawn as `asked` says."""

    context_BN: Tensor
    """What the sender reads."""
    question_BQT: Tensor
    """The tokens of each question; what the receiver expects after the last of them is its answer."""
    values_BQV: Tensor
    """The tokens that an answer may be, (B, Q, V), with 1 for B or Q where they are the same for all."""
    answer_BQ: Tensor
    """The answers, as places among these V."""
    asked: Asked
    """How many answers a row has, among how many values, and whether they are distinct."""

    @property
    def entropy_bits(self) -> float:
        """H, the entropy of a row's answers."""
        return answer_bits(*self.asked)


@dataclass(frozen=True, kw_only=True)
class Conveyed:
    """What came of sending the same rows' states in one format. All bits are of a row."""

    format: str
    """What the states were sent in."""
    rows: int
    """Rows that were sent."""
    entropy_bits: float
    """H, what there was to be said."""
    message_bits: int
    """What was sent, scales and counters included."""
    element_bits: int
    """What of it was elements of states."""
    accuracy: float
    """The share of all questions that were answered right."""
    fano_bits: float
    """What this accuracy takes at least."""
    probability_bits: float
    """H less the mean of the answers' cross-entropies; below zero where the receiver is surer than right."""
    conveyed_bits: float
    """The larger of both, and at least 0."""
    at_least_bits: float
    """What the message must have had at least, with 95% confidence (`sent_at_least`)."""

    @property
    def efficiency(self) -> float:
        """Bits conveyed for each bit of the message."""
        return self.conveyed_bits / self.message_bits if self.message_bits else 0.0

    @property
    def element_efficiency(self) -> float:
        """Bits conveyed for each bit of the states' elements, without scales and counters."""
        return self.conveyed_bits / self.element_bits if self.element_bits else 0.0


@torch.no_grad()
def converse(
    model: Any,
    exchange: Exchange,
    format: Format,
    *,
    seed: int = 0,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Conveyed:
    """Send the state of every row, and have all questions answered from the bytes.

    Where logits are NaN or infinite, as rounded states may make them, all values are equally likely.

    Args:
        model: as in `reader`.
        seed: of stochastic rounding.
        watch: called with the rows that are done and with all of them.
    """
    party = reader(model, _tokens(exchange))
    generator = torch.Generator(exchange.context_BN.device).manual_seed(seed)
    message, right, surprise = None, [], []
    for row in range(len(exchange.context_BN)):
        _, states = party(exchange.context_BN[row : row + 1])
        message = send(states, format, generator)
        row_right, row_surprise = _answered(party, exchange, row, receive(message.data, party))
        right.append(row_right)
        surprise.append(row_surprise)
        watch(row + 1, len(exchange.context_BN))
    if message is None:
        raise ValueError("an exchange needs at least one row")
    return _conveyed(exchange, message, format, torch.tensor(right), torch.tensor(surprise))


def _tokens(exchange: Exchange) -> int:
    """The tokens that an embedding needs."""
    parts = (exchange.context_BN, exchange.question_BQT, exchange.values_BQV)
    return 1 + max(int(part.max()) for part in parts)


def _answered(party: Reader, exchange: Exchange, row: int, states: list[State]) -> tuple[float, float]:
    """How many of a row's questions are answered right, and the sum of their cross-entropies in bits."""
    question_QT, answer_Q = exchange.question_BQT[row], exchange.answer_BQ[row]
    values_QV = exchange.values_BQV[min(row, len(exchange.values_BQV) - 1)].expand(len(answer_Q), -1)
    right = surprise = 0.0
    for part in _parts(len(answer_Q), states):
        question_RT, values_RV, answer_R = question_QT[part], values_QV[part], answer_Q[part]
        copies = [select_rows(state, [0] * len(answer_R)) for state in states]
        logits_RTV, _ = party(question_RT, copies)
        logits_RV = logits_RTV[:, -1].gather(1, values_RV).double()
        # who gets NaN or infinities out of rounded states has nothing to go by, and guesses
        logits_RV = logits_RV.where(logits_RV.isfinite().all(1, keepdim=True), 0)
        right += float((logits_RV.argmax(1) == answer_R).sum())
        surprise -= float(logits_RV.log_softmax(1).gather(1, answer_R[:, None]).sum()) / math.log(2)
    return right, surprise


def _parts(questions: int, states: Sequence[State]) -> Iterator[slice]:
    """Questions that are asked at once: as many as copies of the state fit."""
    elements = sum(tensor.numel() for state in states for tensor in state)
    step = max(1, min(questions, ELEMENTS_AT_ONCE // max(1, elements)))
    return (slice(start, start + step) for start in range(0, questions, step))


# ---------------------------------------------------------------------------------------------- statistics


def _conveyed(
    exchange: Exchange, message: Message, format: Format, right_B: Tensor, surprise_B: Tensor
) -> Conveyed:
    asked, entropy = exchange.asked, exchange.entropy_bits
    accuracy = right_B.double().mean().item() / asked.questions
    fano = recall_bits(asked.questions, asked.values, accuracy, asked.distinct)
    probability = entropy - surprise_B.double().mean().item()
    conveyed = max(0.0, fano, probability)
    return Conveyed(
        format=str(format),
        rows=len(right_B),
        entropy_bits=entropy,
        message_bits=message.bits,
        element_bits=message.element_bits,
        accuracy=accuracy,
        fano_bits=fano,
        probability_bits=probability,
        conveyed_bits=conveyed,
        # below chance, where Fano's bound is 0, a list of errors may be short
        at_least_bits=min(conveyed, sent_at_least(asked, right_B, surprise_B)),
    )


def sent_at_least(asked: Asked, right_B: Tensor, surprise_B: Tensor, confidence: float = CONFIDENCE) -> float:
    """Bits that a row's message must have had for these answers, with this confidence; at least 0.

    All answers follow from the messages and a list of corrections. The list is the shorter of two, and one
    more bit says which: the answers in an arithmetic code with the receiver's probabilities; or the number of
    guesses that are right, which ones these are, and the values of the others. Whatever the code, uniform
    answers have a description that is s bits shorter than their entropy with a probability of at most 2^-s
    (Kraft's and Markov's inequalities). So in a share `confidence` of all exchanges of n rows

        n b + 1 + corrections  >  n H - log2(1 / (1 - confidence))

    This needs no assumption about the model and holds for any number of rows, also if all of them agree. It
    bounds the size of the message, and not the mean information I(X; message), of which a few rows say
    little: that one row in twenty conveys nothing does not show in ten.

    Args:
        right_B: answers of a row that are right, of `asked.questions`.
        surprise_B: the sum of the cross-entropies of a row's answers, in bits.
    """
    rows, count = len(right_B), len(right_B) * asked.questions
    wrong = count - round(right_B.double().sum().item())
    named = math.log2((count + 1) * math.comb(count, wrong)) + wrong * math.log2(max(1, asked.values - 1))
    corrections = 1 + min(surprise_B.double().sum().item(), named)
    return max(0.0, answer_bits(*asked) - (corrections - math.log2(1 - confidence)) / rows)
