"""Set disjointness as a protocol: who reads which set, and what is handed over between them.

    [ A  |  B ?        [ A  |  B ?           two reads: three messages
    Alice   Bob        Alice   Bob

Alice reads the first set and hands the state to Bob, who reads the second. Read p times, the state changes
hands 2p - 1 times, and Bob answers at the last "?". One read makes it one-way: what Alice sends has to say of
A whatever B may ask for, so the bits grow with |A|, and with the order of two sets of different size. From
the second read on she knows something of B: then the smaller set decides (holdall/theory/floors.py).

`ByHandConfig` builds a model that does it, of three of Holdall's linear attentions and one ReLU:

    side_t   = number of "|" less number of "?" up to t           1 in B, 0 in A
    read_t   = number of "?" up to t                              0 in the first read
    score_t  = c_t . sum_j keep_j c_j / |c|^2                     1 where t's token was kept, else crosstalk
    found_t  = sum_j relu(g_j + 2 score_j - 2 - 8 own_j)          the code of the token of both sets

where own is 1 in the set that is kept, the first one, or from two reads on the smaller one: side or 1 - side;
and keep is own in the first read, and 0 after it.
The third line is the construction of theorem 3.2 of Arora et al., "Just read twice", 2024, arXiv 2407.05483,
with one-hot codes or random signs for the kernel; an MLP's threshold and a second linear attention follow.

Letters: A and B the sets, p how often they are read; t and j tokens of the row, c_t the code of token t, g_t
its code in the answer, two one-hot halves for each bit. Of shapes: B rows, N and T tokens, V vocabulary, F
features, G elements of an answer's code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdall.contract import Config, Format, Mixer, State
from holdall.mixers.linear_attention import LinearAttention, LinearAttentionConfig
from holdall.model import seeded
from holdall.settings import NonNegativeInt, Seed
from holdall.tasks.information import recall_bits
from holdall.tasks.set_disjointness import ASK, DIVIDE, NO, SetDisjointness
from holdall.theory.messages import reader, receive, send

# --------------------------------------------------------------------------------------------- the protocol


@dataclass(frozen=True, kw_only=True)
class HandOvers:
    """What came of running the protocol. All bits are of a row."""

    format: str
    """What the states were sent in."""
    message_bits: tuple[int, ...]
    """Bits of each message, 2p - 1 of them."""
    accuracy: float
    """The share of rows that were answered right."""
    proven_bits: float
    """What this accuracy takes at least in a message that B's last reader gets, by Fano's inequality: of one
    read that is the only message; of more, what remains to be said of the one answer."""

    @property
    def largest(self) -> int:
        """Bits of the largest message."""
        return max(self.message_bits)

    @property
    def efficiency(self) -> float:
        """Proven bits for each bit of the largest message."""
        return self.proven_bits / self.largest if self.largest else 0.0


@torch.no_grad()
def hand_over(
    model: Any,
    task: SetDisjointness,
    format: Format,
    *,
    rows: int = 64,
    seed: int = 0,
    rows_at_once: int = 16,
    device: torch.device | str | None = None,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> HandOvers:
    """Run the protocol of a task: at every change of sets the state is sent as bytes, and nothing else is.

    Answers are chosen among those that the reader of B can think of: its tokens, or yes and no.

    Args:
        model: as in `reader`.
        rows: fresh ones, drawn with `seed`; so many of them at once.
        device: where the model is.
        watch: called with the rows that are done and with all of them.
    """
    party, batch = reader(model, task.vocab), task.generate(rows, seed)
    generator = torch.Generator(torch.device(device or "cpu")).manual_seed(seed)
    right = 0
    bits: list[int] = []
    for start in range(0, rows, rows_at_once):
        part = slice(start, start + rows_at_once)
        tokens_BN = batch.tokens[part].to(device)
        if task.answer == "element":
            values_BV = task.sets(tokens_BN)[1]
        else:
            values_BV = torch.arange(NO, NO + 2, device=device).expand(len(tokens_BN), -1)
        logits_BTV, bits = _in_turns(party, task, tokens_BN, format, generator)
        answer_B1 = values_BV.gather(1, logits_BTV[:, -1].gather(1, values_BV).argmax(1, keepdim=True))
        right += int((answer_B1 == batch.answers[part].to(device)).sum())
        watch(min(start + rows_at_once, rows), rows)
    asked = task.asked
    proven = recall_bits(asked.questions, asked.values, right / rows, asked.distinct)
    return HandOvers(format=str(format), message_bits=tuple(bits), accuracy=right / rows, proven_bits=proven)


def _in_turns(
    party: Any, task: SetDisjointness, tokens_BN: Tensor, format: Format, generator: torch.Generator
) -> tuple[Tensor, list[int]]:
    """The logits of the last reader, and the bits of each message."""
    turns = [1 + task.first, task.input_length - 1 - task.first] * task.reads
    states: Sequence[State] | None = None
    bits, logits_BTV = [], tokens_BN
    for turn, piece_BT in enumerate(tokens_BN.split(turns, dim=1)):
        if turn:
            assert states is not None
            message = send(states, format, generator)
            bits.append(message.bits)
            states = receive(message.data, party)
        logits_BTV, states = party(piece_BT, states)
    return logits_BTV, bits


# ---------------------------------------------------------------------------------------------- by hand


@dataclass(frozen=True, kw_only=True)
class ByHandConfig(Config):
    """A model that finds the element which two sets have in common."""

    task: SetDisjointness
    """The rows that it is for, whose common element is asked."""
    features: NonNegativeInt = 0
    """Features of a token's code, F: random signs; 0 for one-hot codes, which are exact."""
    seed: Seed = 0
    """Seed of the random codes."""

    def validate(self) -> None:
        if self.task.answer != "element":
            raise ValueError(
                "the model by hand names the common element: the task's answer must be 'element'"
            )

    @property
    def keeps_second(self) -> bool:
        """Whether the second set is kept: only who reads again can choose it."""
        return self.task.reads > 1 and self.task.second < self.task.first

    @property
    def resolved_features(self) -> int:
        """F, with the number of elements for one-hot codes."""
        return self.features or self.task.elements

    def build(self) -> DisjointnessByHand:
        return DisjointnessByHand(self)


class DisjointnessByHand(nn.Module):
    """Three linear attentions, whose weights are set; states of 2, F + 1 and G elements, in fp32."""

    def __init__(self, config: ByHandConfig) -> None:
        super().__init__()
        self.config, task, features = config, config.task, config.resolved_features
        number_V = (torch.arange(task.vocab) - task.special).clamp(min=0)
        is_element_V1 = (torch.arange(task.vocab) >= task.special).float()[:, None]
        if config.features:
            generator = torch.Generator().manual_seed(config.seed)
            code_VF = 2.0 * torch.randint(2, (task.vocab, features), generator=generator) - 1
        else:
            code_VF = nn.functional.one_hot(number_V, features).float()
        bit_G = torch.arange(max(1, math.ceil(math.log2(task.elements))))
        bits_VG = (number_V[:, None] >> bit_G & 1).float()
        marks_V2 = torch.zeros(task.vocab, 2)
        marks_V2[DIVIDE, 0], marks_V2[ASK] = 1.0, torch.tensor([-1.0, 1.0])
        self.code_VF = nn.Parameter(code_VF * is_element_V1)
        self.answer_VG = nn.Parameter(torch.cat((bits_VG, 1 - bits_VG), dim=1) * is_element_V1)
        self.marks_V2 = nn.Parameter(marks_V2)
        self.layers = nn.ModuleList(
            (_running_sum(2), _membership(code_VF), _running_sum(self.answer_VG.shape[1]))
        )
        self.requires_grad_(False)

    @property
    def mixers(self) -> list[Mixer]:
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, tokens_BT: Tensor, states: Sequence[State] | None = None) -> tuple[Tensor, list[State]]:
        """Logits of the common element, (B, T, V), and the states."""
        before: Sequence[State | None] = states or [None] * 3
        counted, looked_up, summed = self.layers
        counts_BT2, first = counted(self.marks_V2[tokens_BT], before[0])
        side_BT1, read_BT1 = counts_BT2.split(1, dim=-1)
        own_BT1 = side_BT1 if self.config.keeps_second else 1 - side_BT1
        keep_BT1 = own_BT1 * torch.relu(1 - read_BT1)
        score_BTF, second = looked_up(torch.cat((self.code_VF[tokens_BT], keep_BT1), dim=-1), before[1])
        code_BTG, score_BT1 = self.answer_VG[tokens_BT], score_BTF[..., :1]
        found_BTG, third = summed(torch.relu(code_BTG + 2 * score_BT1 - 2 - 8 * own_BT1), before[2])
        return 4 * found_BTG @ self.answer_VG.T, [first, second, third]


def _blank(**options: Any) -> LinearAttention:
    config = LinearAttentionConfig(feature_map="identity", normalise=False, bias=True, chunk=16, **options)
    with seeded(0):  # what it draws is thrown away
        mixer = config.build()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.zero_()
    return mixer


@torch.no_grad()
def _running_sum(width: int) -> LinearAttention:
    """y_t = sum_j x_j: queries and keys are 1."""
    mixer = _blank(width=width, feature_dim=1)
    q, k, _ = mixer.qkv.bias.split(mixer.sizes)
    q.fill_(1), k.fill_(1)
    mixer.qkv.weight.split(mixer.sizes)[2].copy_(torch.eye(width))
    mixer.out_proj.weight.copy_(torch.eye(width))
    return mixer


@torch.no_grad()
def _membership(code_VF: Tensor) -> LinearAttention:
    """y_t = c_t . sum_j keep_j c_j / |c|^2 in channel 0, from a token's code and keep behind it.

    A head has one feature and one value, so that all heads together carry F + 1 elements.
    """
    features = code_VF.shape[1]
    mixer = _blank(width=features + 1, heads=features + 1, feature_dim=1)
    q_FD, k_FD, v_FD = mixer.qkv.weight.split(mixer.sizes)
    k_FD[:features, :features] = torch.eye(features)
    q_FD.copy_(k_FD / code_VF[-1].square().sum())
    v_FD[:, features] = 1
    mixer.out_proj.weight[0].fill_(1)
    return mixer
