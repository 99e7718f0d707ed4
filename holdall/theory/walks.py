"""Three constructions on one row of MQAR, step by step: what layers hold and look at, and what they answer.

Everything that a walk shows is read off the model as it runs: the activations between its layers, the
matrices that its mixers apply along the row, its state after each token, its answers.

    walks = walks_of(row())
    walks[0].steps[3].grid_TJ       # the attention weights

Letters: T tokens of the row, J tokens that an output takes from, D channels, K questions, N the length, S
distances, V vocabulary, L lines of a table, F signs of a code, p digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from holdall.analysis.matrix import exact_matrices
from holdall.contract import Mixer
from holdall.tasks.mqar import MQAR, Batch
from holdall.theory.by_hand import HandBuilt, Report, bits_of, right
from holdall.theory.by_hand_attention import AttentionByHand, LinearAttentionByHand
from holdall.theory.by_hand_conv import ShiftsByHand

VOCAB, LENGTH, PAIRS = 32, 24, 4
SEED = 12
"""Of the row: its four questions are 4, 10, 12 and 18 tokens from their keys."""
TRIALS = 96
"""Rows over which accuracies by number of distances are taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One thing to see, with what there is to say about it."""

    title: str
    says: str
    layer: int | None = None
    """The activations to show: 0 for the embeddings, l for what layer l gives; None for none."""
    grid_TJ: Tensor | None = None
    """What each token takes from each, (T, J)."""
    grid_says: str = ""
    """What the grid's entries are."""
    table: bool = False
    """Whether the state is shown as a table."""
    linked: bool = False
    """Whether each question has found its value."""
    answered: bool = False
    """Whether the answers are there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """A construction on the row."""

    name: str
    title: str
    groups: tuple[tuple[str, int, int], ...]
    """Channels that belong together: a name, and from and up to which channel."""
    activations_LDT: tuple[Tensor, ...]
    """Embeddings, then each layer's outputs, (D, T) each."""
    steps: tuple[Step, ...]
    report: Report
    width_says: str
    """How the width follows from the row, in words."""
    answers_K: Tensor
    """The tokens that the model answers with."""
    table_TLF: Tensor | None = None
    """Linear attention's state as a table after each token, (T, L, F)."""
    right_SK: Tensor | None = None
    """Of a convolution: which questions are right with distances 1 .. S, of bool; S counts from 1."""
    accuracy_S: Tensor | None = None
    """And the accuracy over `TRIALS` rows."""
    report_S: tuple[Report, ...] = ()
    """And what each of these models is made of."""


def row() -> Batch:
    """The row that is walked through."""
    return MQAR(vocab=VOCAB, length=LENGTH, pairs=PAIRS, power=1.0, filler="key-free").generate(1, seed=SEED)


def walks_of(rows: Batch) -> tuple[Walk, ...]:
    """Attention, linear attention behind a window, and BaseConv by all shifts, on one row (1, T)."""
    return attention(rows), linear_attention(rows), convolution(rows)


ASKED = (
    "A row shows pairs of a key (a letter) and its value (a number). Later it shows some keys again, among "
    "other tokens: at each, the model must answer with the value that followed that key."
)


@torch.no_grad()
def attention(rows: Batch) -> Walk:
    """The previous token, then one attention head."""
    model = AttentionByHand(vocab=VOCAB, length=LENGTH).build()
    before, recall = model.layers
    code = bits_of(VOCAB)
    between = list(model.between(rows.tokens))
    steps = (
        Step(title="The row", says=ASKED),
        Step(
            title="Each token as a code",
            says=f"A token is written as {code} signs, the bits of its number, twice: that is the whole "
            "width. More tokens in the row do not need more channels, only a larger vocabulary needs a"
            " bit more.",
            layer=0,
        ),
        Step(
            title="Layer 1: the previous token beside each",
            says="A convolution of two taps moves the second code down by one token. Now a value stands "
            "beside the key before it: every token knows itself, and what came just before.",
            layer=1,
            grid_TJ=_response(before, code, LENGTH),
            grid_says="what the second code of each token is made of",
        ),
        Step(
            title="Layer 2: look for the same token",
            says="Each token compares its own code with the second code of every token before it, all at "
            "once and at any distance. At a question one earlier token matches: the value that "
            "followed this key. The comparison is one product of two codes, whatever the distance, so it"
            " takes no channels of its own.",
            layer=1,
            grid_TJ=exact_matrices(recall, between[1])[-1].matrix_TJX[..., 0].real,
            grid_says="attention weights: how much each token takes from each",
            linked=True,
        ),
        Step(
            title="The answers",
            says="What attention takes is the first code of the match: the value itself. The head reads it "
            "off. All questions are right, at any distance. The price is the state: the codes of all "
            "tokens are kept, so it grows with the row.",
            layer=2,
            linked=True,
            answered=True,
        ),
    )
    return _walk(
        model,
        rows,
        between,
        title="Attention",
        groups=(("this token", 0, code), ("previous token", code, 2 * code)),
        steps=steps,
        width_says="2 log₂ V: the same for any length of the row",
    )


@torch.no_grad()
def linear_attention(rows: Batch) -> Walk:
    """A window of two tokens, then a table with a line per key."""
    config = LinearAttentionByHand(vocab=VOCAB, length=LENGTH)
    model, lines, code = config.build(), config.resolved_lines, bits_of(VOCAB)
    before, recall = model.layers
    between = list(model.between(rows.tokens))
    heads_TJ = exact_matrices(before, between[0])[-1].matrix_TJX.real
    lookups_TJ = exact_matrices(recall, between[1])[-1].matrix_TJX.real.sum(-1)
    tables, states = [], None
    for t in range(LENGTH):
        _, states = model(rows.tokens[:, t : t + 1], states)
        tables.append(states[1].s_BHFV[0].flatten(0, 1)[:lines])  # heads hold the lines one after another
    steps = (
        Step(title="The row", says=ASKED),
        Step(
            title="Each token as a code",
            says=f"A key is one of {lines} channels. A value is {code} signs, the bits of its number. The "
            "other channels are empty for now.",
            layer=0,
        ),
        Step(
            title="Layer 1: the previous token beside each",
            says="A window of two tokens, of which positions pick the earlier one, copies the previous key "
            "next to each token. Now a value stands beside its key.",
            layer=1,
            grid_TJ=heads_TJ[..., 0],
            grid_says="attention weights of the head that looks one token back",
        ),
        Step(
            title="Layer 2 writes a table",
            says="Linear attention adds each value to the line of the key before it. The state is that "
            "table, a line for each possible key: it does not grow with the row. Filler writes too, "
            "where a value follows a key, but into the lines of other keys.",
            layer=1,
            table=True,
        ),
        Step(
            title="Layer 2 reads a line",
            says="A question reads the line of its key. As keys are one-hot, no other line answers with it:"
            " there is no crosstalk, and the error is exactly zero.",
            layer=1,
            grid_TJ=lookups_TJ,
            grid_says="how much each token takes of the value of each, q·k",
            table=True,
            linked=True,
        ),
        Step(
            title="The answers",
            says="The line is the value's code, and the head reads it off. All questions are right at any "
            "distance, from a state of fixed size. The price is a line, and a channel, for every key "
            "that may come: the width grows with the vocabulary, not with the row.",
            layer=2,
            linked=True,
            answered=True,
            table=True,
        ),
    )
    return _walk(
        model,
        rows,
        between,
        title="Window and linear attention",
        groups=(
            ("previous key", 0, lines),
            ("this key", lines, 2 * lines),
            ("value", 2 * lines, 2 * lines + code),
        ),
        steps=steps,
        width_says="V + log₂ V, rounded up to whole heads: the same for any length of the row",
        table_TLF=torch.stack(tables),
    )


@torch.no_grad()
def convolution(rows: Batch) -> Walk:
    """Copies shifted by each distance, compared and multiplied."""
    config = ShiftsByHand(vocab=VOCAB, length=LENGTH)
    model, code, most, digits = config.build(), config.code, config.resolved_shifts, config.resolved_digits
    between = list(model.between(rows.tokens))
    keys = slice(code, code * (1 + most))
    # of each distance and digit, whether it is equal; and of each distance, whether all are
    equal_TSP = between[2][0][:, keys].unflatten(1, (most, digits, -1)).sum(-1)
    match_TS = between[-2][0][:, keys].unflatten(1, (most, digits, -1))[:, :, 0].sum(-1)
    seen_TS = (torch.arange(LENGTH)[:, None] >= 1 + torch.arange(most)).double()
    trials = MQAR(vocab=VOCAB, length=LENGTH, pairs=PAIRS, power=1.0, filler="key-free").generate(
        TRIALS, seed=0
    )
    by_shifts = [
        ShiftsByHand(vocab=VOCAB, length=LENGTH, shifts=shifts).build(torch.float32)
        for shifts in range(1, most + 1)
    ]
    steps = (
        Step(title="The row", says=ASKED),
        Step(
            title="Each token as a code, many times over",
            says=f"A token is written as {code} numbers: {digits} bits, each one-hot. Then the code is "
            "copied, twice for every distance that the model shall look back.",
            layer=0,
        ),
        Step(
            title="Layer 1: a shift for each distance",
            says="A convolution moves every channel by a fixed distance: it cannot ask what a token is. So "
            "the first pair of copies moves by 1, the next by 2, and so on. Each token now has all "
            "earlier tokens beside it, each in channels of its own. Here the width is spent.",
            layer=1,
            grid_TJ=_by_distance(seen_TS),
            grid_says="which earlier tokens each token has beside it",
        ),
        Step(
            title="Layer 2: compare the digits",
            says="The gate multiplies channels of the same token. It multiplies each shifted key by this "
            "token's own code: where they agree in a bit, a product is 1.",
            layer=2,
            grid_TJ=_by_distance(equal_TSP.mean(-1)),
            grid_says="share of bits in which two tokens agree",
        ),
        Step(
            title=f"Layers 3 to {len(model.layers) - 1}: all digits must agree",
            says=f"Products of two, then of four, then of all {digits}: what is left is 1 where the tokens "
            "are the same, and 0 elsewhere. This is what attention’s layer 2 sees, but only as far "
            "back as there are copies.",
            layer=len(model.layers) - 1,
            grid_TJ=_by_distance(match_TS),
            grid_says="1 where two tokens are the same",
            linked=True,
        ),
        Step(
            title=f"Layer {len(model.layers)}: take the value",
            says="Each match multiplies the copy of the token that followed it. All others are "
            "multiplied by 0.",
            layer=len(model.layers),
            grid_TJ=_by_distance(match_TS),
            grid_says="which token's follower, the value, is taken",
            linked=True,
        ),
        Step(
            title="The answers",
            says="The copies are added up and the head reads the sum. A question is right if its key is "
            "within reach, and wrong if it is further back than there are copies. Move the slider: so "
            "many distances, so many channels. That is why a convolution needs width where attention "
            "does not.",
            layer=len(model.layers),
            linked=True,
            answered=True,
        ),
    )
    return _walk(
        model,
        rows,
        between,
        title="BaseConv by shifts",
        groups=(
            ("this token", 0, code),
            *((f"key {s} back", code * s, code * (s + 1)) for s in range(1, most + 1)),
            *((f"value {s} back", code * (most + s), code * (most + s + 1)) for s in range(1, most + 1)),
        ),
        steps=steps,
        width_says="2 log₂ V for the token itself, and twice that again for each distance",
        right_SK=torch.stack([right(each, rows)[0] for each in by_shifts]),
        accuracy_S=torch.stack([right(each, trials).double().mean() for each in by_shifts]),
        report_S=tuple(each.report() for each in by_shifts),
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The size of a construction for rows of some length."""

    title: str
    width: int
    state_elements: int


def costs(vocab: int, length: int) -> tuple[Cost, ...]:
    """Width and state of the three at any size, also where they are too wide to be built."""
    code, lines = bits_of(vocab), max(2, vocab // 2)
    heads = -(-(2 * lines + code) // code)
    head_dim = lines + code + (lines + code) % 2
    layers = 3 + math.ceil(math.log2(code))
    wide = 2 * code * (1 + 2 * (length - 1))
    return (
        Cost(title="Attention", width=2 * code, state_elements=2 * length * code + 1 + 2 * code),
        Cost(
            title="Window and linear attention",
            width=heads * code,
            state_elements=-(-lines // heads) * heads * code + 4 * head_dim + 1,
        ),
        Cost(title="BaseConv by shifts", width=wide, state_elements=wide * (length - 1 + layers - 1)),
    )


def _walk(model: HandBuilt, rows: Batch, between: list[Tensor], *, title: str, **more: object) -> Walk:
    y_KD = between[-1][0, rows.positions[0]]
    return Walk(
        name=model.config.name,
        title=title,
        activations_LDT=tuple(x_BTD[0].T for x_BTD in between),
        report=model.report(),
        answers_K=model.logits(y_KD).argmax(-1),
        **more,  # type: ignore[arg-type]
    )


def _response(layer: Mixer, channel: int, length: int) -> Tensor:
    """What a channel of a layer makes of a 1 at each token of that channel, (T, J)."""
    x_JTD = torch.zeros(length, length, layer.config.width, dtype=torch.float64)
    x_JTD[:, :, channel] = torch.eye(length, dtype=torch.float64)
    return layer(x_JTD, want_state=False)[0][:, :, channel].T


def _by_distance(value_TS: Tensor) -> Tensor:
    """Values of each token and distance 1 .. S as a matrix of tokens, (T, J)."""
    length, most = value_TS.shape
    grid_TJ = torch.zeros(length, length, dtype=value_TS.dtype)
    for s in range(1, most + 1):
        grid_TJ.diagonal(-s).copy_(value_TS[s:, s - 1])
    return grid_TJ
