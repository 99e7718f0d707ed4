"""Layers of RWKV, whose output projections start at zero, so that at first hardly anything has a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from holdall.contract import MixerConfig
from holdall.model import ModelConfig


def assert_silent_layers_learn(layers: Sequence[MixerConfig], steps: int) -> None:
    """Every parameter of a stack has moved after a few steps, though all but W_o start without a gradient."""
    torch.manual_seed(0)
    model = ModelConfig(vocab=8, width=layers[0].width, layers=tuple(layers)).build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens_BT = torch.randint(8, (8, 16))
    losses = []
    for _ in range(steps):
        logits_BTV, _ = model(tokens_BT, want_states=False)
        # say again what came before this token
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, 1:].flatten(0, 1), tokens_BT[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for name, parameter in model.named_parameters():
        assert (parameter != before[name]).any(), name
