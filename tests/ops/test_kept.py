"""What is made of a weight is kept while weights are promised to stay, and never longer."""

from __future__ import annotations

import copy
import gc
import pickle

import torch
from torch import Tensor

from holdall.ops.kept import Kept, Unchanging


@torch.no_grad()
def test_made_once_under_a_promise_and_anew_elsewhere() -> None:
    kept, made = Kept(), list[Tensor]()

    def double(weight: Tensor) -> Tensor:
        made.append(2 * weight)
        return made[-1]

    weight, weights = torch.nn.Parameter(torch.ones(3)), Unchanging()
    for _ in range(2):
        kept.of(weight, double)
    assert len(made) == 2
    with weights:
        one = kept.of(weight, double)
    with weights:
        assert kept.of(weight, double) is one
        with Unchanging():
            assert kept.of(weight, double) is not one
        assert kept.of(weight, double) is one
    assert len(made) == 4
    with weights, torch.enable_grad():
        assert kept.of(weight, lambda w: 2 * w).requires_grad


def test_an_optimizer_that_says_nothing_is_no_danger() -> None:
    """A fused step leaves a weight's version as it was; what is read after it is of the new weight."""
    kept, weight = Kept(), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(kept.of(weight, lambda w: 2 * w), 2 * weight)
        weight.grad = torch.ones(3)
        optimizer.step()


@torch.no_grad()
def test_it_ends_with_the_promise_and_is_no_part_of_a_copy() -> None:
    kept, weight, weights = Kept(), torch.ones(3), Unchanging()
    with weights:
        kept.of(weight, lambda w: 2 * w)
        for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
            assert torch.equal(other.of(weight, lambda w: 3 * w), 3 * weight)
    assert len(kept._made) == 1
    del weights
    gc.collect()
    assert not len(kept._made)
