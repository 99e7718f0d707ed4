"""What is sent and asked: the index problem, recall of pairs, and set disjointness, as exchanges.

Letters of shapes: B rows, N tokens of the context, Q questions of a row, T tokens of a question, V values of
an answer.
"""

from __future__ import annotations

import torch

from holdall.tasks.information import Asked
from holdall.tasks.mqar import MQAR
from holdall.tasks.set_disjointness import DIVIDE, SetDisjointness
from holdall.theory.messages import Exchange


def index(bits: int, rows: int, seed: int = 0, device: torch.device | str | None = None) -> Exchange:
    """Fair bits, all of which may be asked for; tokens 2 i and 2 i + 1 are a 0 and a 1 of bit i.

    A question is the token of a 1, and logits 0 and 1 are of its answers (holdall/theory/index_by_hand.py).
    """
    generator = torch.Generator().manual_seed(seed)
    answer_BQ = torch.randint(2, (rows, bits), generator=generator).to(device)
    place_Q = torch.arange(bits, device=device)
    question_BQT = (2 * place_Q + 1)[None, :, None].expand(rows, -1, -1)
    values_BQV = torch.arange(2, device=device)[None, None]
    return Exchange(2 * place_Q + answer_BQ, question_BQT, values_BQV, answer_BQ, Asked(bits, 2, False))


def recall(
    vocab: int, pairs: int, rows: int, seed: int = 0, device: torch.device | str | None = None
) -> Exchange:
    """Pairs of a key and a value, as in MQAR (holdall/tasks/mqar.py), and then each key alone.

    Raises ValueError for fewer keys or values than pairs.
    """
    task = MQAR(vocab=vocab, length=4 * pairs, pairs=pairs)
    context_BN = task.generate(rows, seed).tokens[:, : 2 * pairs].to(device)
    first = vocab - task.values
    values_BQV = torch.arange(first, vocab, device=device)[None, None]
    keys_BQ, answers_BQ = context_BN[:, ::2], context_BN[:, 1::2] - first
    return Exchange(context_BN, keys_BQ[..., None], values_BQV, answers_BQ, Asked(pairs, task.values))


def disjointness(
    task: SetDisjointness, rows: int, seed: int = 0, device: torch.device | str | None = None
) -> Exchange:
    """The first set is sent; of each block that the other set may be, the element that both have is asked.

    For sets of the blocked distribution, whose common element is asked for, read once: there all |A|
    questions of a row are independent, and can be asked from copies of one state. ValueError for others.
    """
    if task.distribution != "blocked" or task.answer != "element" or task.reads != 1:
        raise ValueError(
            'every block of a row can be asked for with distribution "blocked", answer "element" and reads 1'
        )
    batch = task.generate(rows, seed)
    tokens_BN = batch.tokens.to(device)
    context_BN, end_B1 = tokens_BN[:, : 1 + task.first], tokens_BN[:, -1:]
    block_QV = task.special + torch.arange(task.first * task.second, device=device).view(task.first, -1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, task.first, task.second, generator=generator).argsort(-1).to(device)
    shuffled_BQV = block_QV.expand(rows, -1, -1).gather(2, order)
    ends = [token.expand(rows, task.first, 1) for token in (tokens_BN.new_tensor(DIVIDE), end_B1[:, None])]
    question_BQT = torch.cat((ends[0], shuffled_BQV, ends[1]), dim=2)
    # A has one element of each block, in any order
    answer_BQ = context_BN[:, 1:].sort(1).values - block_QV[:, 0]
    return Exchange(
        context_BN, question_BQT, block_QV[None], answer_BQ, Asked(task.first, task.second, False)
    )
