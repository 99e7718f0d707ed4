"""How much a trained model recalls when its state is stored in fewer bits.

A row is read in pieces; between one piece and the next, the states of all layers are packed in a format and
unpacked again (holdall/contract/packed.py). So every question but those of the first piece is answered from a
state of so many bits, whatever the mixer. Weights and arithmetic are as they were: this says what the state's
bits are worth, and not how fast a kernel for them would be.

Letters: B rows, N tokens of a row, Q questions of a row, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdall.contract import Format, State, pack
from holdall.model import Model
from holdall.tasks.data import Questions


def hidden(
    model: Model,
    tokens_BN: Tensor,
    format: Format,
    *,
    every: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """What the head reads, (B, N, D), and the bits of one row's states at the end, all layers.

    Args:
        every: tokens of a piece.
        generator: for stochastic rounding, on the model's device.

    Raises ValueError for a model that cannot read a row in pieces.
    """
    for mixer in model.mixers:
        if "splits" in mixer.refusals:
            raise ValueError(f"{mixer.owner} cannot read a row in pieces: {mixer.refusals['splits']}")
    states: Sequence[State] | None = None
    read, bits = [], 0
    for piece_BT in tokens_BN.split(every, dim=1):
        h_BTD, after = model.hidden(piece_BT, states)
        assert after is not None
        packed = [pack(state, format, generator) for state in after]
        states, bits = [each.unpack() for each in packed], sum(each.bits_per_row for each in packed)
        read.append(h_BTD)
    return torch.cat(read, dim=1), bits


@torch.no_grad()
def accuracy(model: Model, questions: Questions, format: Format, *, every: int = 1, seed: int = 0) -> float:
    """The share of questions that a model answers right from states in a format; arguments as in `hidden`."""
    generator = torch.Generator(model.device).manual_seed(seed)
    h_BND, _ = hidden(model, questions.tokens_BN, format, every=every, generator=generator)
    at_BQD = questions.at_BQ[..., None].expand(-1, -1, h_BND.shape[-1])
    right_BQ = model.logits(h_BND.gather(1, at_BQD)).argmax(-1) == questions.answer_BQ
    return right_BQ.double().mean().item()


@torch.no_grad()
def state_bits(model: Model, context_len: int, format: Format) -> int:
    """Bits of one row's states after so many tokens, all layers, counted from what is stored."""
    tokens_BN = torch.zeros(1, context_len, dtype=torch.long, device=model.device)
    return hidden(model, tokens_BN, format, every=context_len, generator=torch.Generator(model.device))[1]
