"""Mixers' published equations as plain sums over their weights, with none of the package's functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def hyena(weights: Mapping[str, Tensor], x_BTD: Tensor, *, order: int, max_length: int, bands: int) -> Tensor:
    """safari's standalone HyenaOperator: the gates from the last to the second, and with each the next block
    of D filters and skips; then the first gate."""
    w = {name: weight.detach().double() for name, weight in weights.items()}
    (batch, length, width), x_BTD = x_BTD.shape, x_BTD.double()
    u_BTU = x_BTD @ w["in_proj.weight"].T + w["in_proj.bias"]
    s_BTU = w["short_bias_U"].repeat(batch, length, 1)
    for t in range(length):
        for back in range(min(3, t + 1)):
            s_BTU[:, t] += w["short_weight_UW"][:, 2 - back] * u_BTU[:, t - back]
    blocks = [s_BTU[..., i * width : (i + 1) * width] for i in range(order + 1)]
    first, gates, v_BTD = blocks[0], blocks[1:-1], blocks[-1]

    taps_LE = torch.stack([_hyena_tap(w, t, max_length, bands) for t in range(length)])
    block = 0
    while gates:
        v_BTD = v_BTD * gates.pop()
        here = slice(block * width, (block + 1) * width)
        c_BTD = w["skip_E"][here] * v_BTD
        for t in range(length):
            for back in range(t + 1):
                c_BTD[:, t] += taps_LE[back, here] * v_BTD[:, t - back]
        v_BTD, block = c_BTD, block + 1
    return (v_BTD * first) @ w["out_proj.weight"].T + w["out_proj.bias"]


def _hyena_tap(w: Mapping[str, Tensor], t: int, max_length: int, bands: int) -> Tensor:
    """The t-th tap of all filters, (E,)."""
    time = t / (max_length - 1)
    turns = [2 * math.pi * t / max_length * (1e-4 + i * (bands - 1 - 1e-4) / max(bands - 1, 1))
             for i in range(bands)]  # fmt: skip
    z = torch.tensor([time, *map(math.cos, turns), *(-math.sin(turn) for turn in turns)], dtype=torch.float64)
    for layer in range(3):
        z = torch.sin(
            w["filter.frequency_H"]
            * (w[f"filter.hidden.{layer}.weight"] @ z + w[f"filter.hidden.{layer}.bias"])
        )
    tap_E, slow, fast = w["filter.last.weight"] @ z, math.log(100) / 1.5, math.log(100) / 0.3
    fall = [slow + (fast - slow) * e / (len(tap_E) - 1) for e in range(len(tap_E))]
    return tap_E * torch.tensor([math.exp(-time * each) for each in fall], dtype=torch.float64)
