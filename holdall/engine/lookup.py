"""Guesses of many rows at once, on their device: what followed their last tokens where these were last seen.

The rule is that of `NGrams` (holdall/engine/drafts.py), over a row's last RECALLED tokens alone. So memory is
constant, the host waits for nothing, and all of it can be recorded in a CUDA graph.

Letters: B rows, R last tokens that are remembered, K guesses, T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RECALLED = 1024
"""How many of a row's last tokens are searched."""
NOTHING = -1
"""Stands where there is no token, and for a guess that is none."""
LONGEST, SHORTEST = 4, 2
"""Lengths of the n-grams that are looked up, in tokens: as of `NGrams`."""


def guesses(recent_BR: Tensor, most: int) -> Tensor:
    """What may follow each row's last tokens, (B, K); NOTHING in all of a row that has not seen them before.

    Args:
        recent_BR: each row's last tokens, the newest last, NOTHING in front where there are fewer.
        most: how many to guess, K.
    """
    slots = recent_BR.shape[1]
    length_BR = torch.zeros_like(recent_BR)  # of what stands before a place, as far as it ends the text too
    going_BR = torch.ones_like(recent_BR, dtype=torch.bool)
    for back in range(1, LONGEST + 1):
        before_BR = F.pad(recent_BR, (back, 0), value=NOTHING)[:, :slots]
        going_BR = going_BR & (before_BR == recent_BR[:, -back, None])
        length_BR = length_BR + going_BR
    # the longest decides, then the last place; place 0 has nothing before it
    rank_BR = torch.arange(slots, device=recent_BR.device) + slots * length_BR
    best_B1 = rank_BR.masked_fill(length_BR < SHORTEST, 0).amax(1, keepdim=True)
    place_B1 = best_B1 % slots
    # a text that repeats itself is continued beyond its end: what is guessed is copied again
    at_BK = place_B1 + torch.arange(most, device=recent_BR.device) % (slots - place_B1)
    return recent_BR.gather(1, at_BK).masked_fill(best_B1 == 0, NOTHING)


def remembered(recent_BR: Tensor, token_BT: Tensor, count_B: Tensor) -> Tensor:
    """Each row's last tokens after new ones, of which it has the first `count_B`."""
    both = torch.cat((recent_BR, token_BT), dim=1)
    return both.gather(1, torch.arange(recent_BR.shape[1], device=count_B.device) + count_B[:, None])
