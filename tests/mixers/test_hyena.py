"""Hyena beside its published equations, written as sums over the weights alone (tests/by_hand.py)."""

import by_hand
import pytest
import torch

from holdall.mixers.hyena import HyenaConfig
from holdall.testing import laws


@pytest.mark.claim("mixers/hyena.py", "Weights")
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_every_gate_meets_its_own_filters_and_skips(form: str, order: int) -> None:
    """In one call and in pieces, whose states hold a block of inputs for every filter."""
    config = HyenaConfig(width=3, order=order, max_length=16, bands=2, form=form)
    mixer = laws.build(config).double()
    x_BTD = laws.tokens(mixer, 9)
    want = by_hand.hyena(mixer.state_dict(), x_BTD, order=order, max_length=16, bands=2)
    laws.assert_close("y", mixer(x_BTD)[0], want)
    laws.assert_close("y in pieces", laws.read_in_pieces(mixer, x_BTD, (4, 1, 4))[0], want)
