"""Masked tokens of a prefix: which ones, and the loss of a model that both fills them in and continues.

    encoder    x_0 .. x_{E-1}     the prefix, whose tokens see each other; some are replaced by the mask token
    decoder    x_E .. x_{N-1}     the rest of the row, read causally

    loss = NTP + w MLM
    NTP = mean of -log p(x_{t+1} | position t)  over t = E - 1 .. N - 2        the next token, as in any model
    MLM = mean of -log p(x_t | position t)      over the masked t < E - 1      the token that stood there

Just Read Twice (Arora et al., 2024, arXiv 2407.05483, section 4) trains so, with w = 0.25, E half of the row,
and each position of the encoder masked with probability 0.15, always by the mask token. What its paper and
code leave open or do differently:

- The paper divides the sum by 1 + w; its code does not, nor is it here.
- The code predicts x_E from nowhere. Position E - 1 predicts it here: it has seen the prefix alone, and the
  first token written after a prompt that is no longer than the prefix is its prediction. So that a position
  has one target, x_{E-1} is never masked.
- The code drops masked positions whose token is 0 from MLM. Here token 0 is one like any other.
- The code's means are over the rows of a pass. Here they are over all rows of a step, so that the loss does
  not depend on how these are split into passes and devices.
- The mask token is the last row of the embedding, which has to be one that padding of the vocabulary added:
  50263 of GPT-2's 50257 tokens padded to 50264, as published.

Letters: x_t token t, N tokens of a row, E tokens of the prefix, w weight of MLM. Of shapes: B rows, M masked
tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdall.model import ModelConfig
from holdall.text.windows import mix

SALT = 0x6A72742D6D61736B
"""Tells the draws of masks from those of the order of the rows, which have the same seed."""


class Masked(NamedTuple):
    """The masked tokens of a pass."""

    index_M: Tensor
    """Their places among all that the pass reads, row * context_len + position, int64."""
    weight: float
    """Of their mean loss in that of the step: how many they are, as a multiple of the average pass's."""


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The masked tokens of each training step: a function of seed and row alone.

    Rows are numbered through all steps, as the windows that they read (holdall/text/windows.py).
    """

    prefix: int
    """Tokens of the encoder, E."""
    share: float
    """Probability with which each of them, the last one apart, is masked."""
    seed: int
    """Seed of the draws."""
    context_len: int
    """Tokens of a row that the model reads."""

    def rows(self, first: int, count: int) -> np.ndarray:
        """Whether each token of the encoder is masked, of `count` rows from number `first`: (B, E) bool."""
        row_B1 = np.arange(first, first + count, dtype=np.uint64)[:, None]
        place_E = np.arange(self.prefix, dtype=np.uint64)
        key_B1 = mix(mix(np.full_like(row_B1, self.seed ^ SALT)) ^ row_B1)
        # the upper 53 bits as a number from 0 to 1
        masked_BE = (mix(key_B1 ^ mix(place_E)) >> np.uint64(11)) * 2.0**-53 < self.share
        masked_BE[:, -1] = False
        return masked_BE

    def passes(self, step: int, batch: int, first: int, count: int, rows: int) -> list[Masked]:
        """The masked tokens of one device's part of a step.

        Args:
            step: from 0.
            batch: rows of the step, over all devices.
            first, count: the device's rows among them.
            rows: of a pass, which `count` is a multiple of.
        """
        masked_BE = self.rows(step * batch, batch)
        mean = masked_BE.sum() * rows / batch
        passes = []
        for start in range(first, first + count, rows):
            row_M, place_M = masked_BE[start : start + rows].nonzero()
            index_M = torch.from_numpy(row_M * self.context_len + place_M)
            passes.append(Masked(index_M, len(index_M) / mean if mean else 0.0))
        return passes


def mask_token(model: ModelConfig) -> int:
    """What masked tokens become: the last row of the embedding."""
    return model.vocab - 1


def check_mask_token(model: ModelConfig, tokens: int) -> None:
    """Refuse, with ValueError, a model whose mask token is one of a tokenizer's so many tokens."""
    if mask_token(model) < tokens:
        raise ValueError(
            "a model with a prefix is trained to fill in masked tokens, for which its embedding needs a row "
            f"beyond the tokenizer's {tokens} tokens, and its vocab is {model.vocab}: pad it, to "
            f"{8 * (tokens // 8 + 1)} say, or train without masks (--mlm-weight 0)"
        )
