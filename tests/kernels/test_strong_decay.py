"""Mixers that forget nearly all at each token: outputs, states, gradients are as good as the loop's.

A difference of sums would show here: what it rounds off is not decayed, but the gradient is. The delta rules
and linear attention themselves, with decays weak, strong and mixed: tests/kernels/test_fla.py.
"""

from __future__ import annotations

from typing import Any

import kernel_checks
import pytest
import torch

import holdall
from holdall.kernels import fla
from holdall.testing import laws

SINGLE, DOUBLE = torch.float32, torch.float64
# pairs of which the mask drops one may overflow before; only the interpreter tells
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


FORGETFUL: dict[str, tuple[dict[str, Any], str, float]] = {
    "gated-delta-net": ({"value_ratio": 1, "value_heads": 4, "head_dim": 8}, "A_log", 6.0),
    "kimi-delta-attention": ({"heads": 1}, "A_log", 6.0),
    "gla": ({"heads": 1}, "gate_up.bias", -300.0),
    "rwkv-5": ({}, "time_decay", 6.0),
    "rwkv-7": ({"heads": 1}, "w0", 20.0),
    "mamba": ({"state": 4}, "A_log", 5.0),
    "mamba-2": ({"state": 4, "head_dim": 8}, "A_log", 6.0),
    "hawk": ({"heads": 2}, "a_param_E", 4.0),
    "s5": ({}, "log_step", 4.0),
}
"""What is added to which parameter, so that nearly all is forgotten at each token."""
BY_FLA = ("gated-delta-net", "kimi-delta-attention", "gla", "rwkv-5", "rwkv-7")


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_mixer_that_forgets_fast(name: str, device: torch.device) -> None:
    """Outputs, states and all gradients, as good as the loop's in the same dtype."""
    if name in BY_FLA and fla.refusal():
        pytest.skip(fla.refusal())
    options, parameter, more = FORGETFUL[name]
    mixer = laws.build(holdall.describe(name).configure(width=16, form="kernel", **options)).to(device)
    with torch.no_grad():
        mixer.get_parameter(parameter).add_(more)
    plain, loop = (laws.loop_of(mixer, dtype).to(device) for dtype in (SINGLE, DOUBLE))
    x_BTD = laws.tokens(mixer, 18, batch=1).to(device)
    with torch.no_grad():
        _, state = plain(laws.tokens(mixer, 3, batch=1, seed=1).to(device))
    got = kernel_checks.mixer_pulled_back(mixer, x_BTD, state, 1)
    twin = laws.plainly(kernel_checks.mixer_pulled_back, plain, x_BTD, state, 1)
    truth = kernel_checks.mixer_pulled_back(loop, x_BTD.double(), laws.widened(state), 1)
    # what e^-x loses to the rounding of x, up to x = 30, beyond which nothing is left, or of a chunk's sums;
    # on a GPU products in three passes of tf32 too (Mamba-2's dt_bias on an H200: 1.2e-5, red with 2^-18)
    lost = 2.0**-13 if name in BY_FLA else 2.0**-18 if device.type == "cpu" else 2.0**-16
    for part, right in truth.items():
        allowed = lost * laws.size(right)
        bounds = (each + allowed for each in laws.earned(twin[part], right))
        laws.assert_close(part, got[part].double(), right, bounds)
