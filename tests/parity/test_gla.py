"""Gated linear attention against the plain references of flash-linear-attention.

The package's layer needs a GPU, its references do not: the projections around them are made here.

Letters: B row, T time, D width, H heads, K key dim, V value dim.
"""

import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.mixers.gla import GLAConfig
from holdall.testing import laws

WIDTH, HEADS, LENGTH = 16, 2, 70


@pytest.fixture(scope="module")
def naive() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("fla.ops.gla.naive", reason="fla-core is not installed")


def convolved(x_BTE: Tensor, weight_EW: Tensor) -> Tensor:
    """A causal depthwise convolution and silu, by PyTorch's own."""
    taps, channels = weight_EW.shape[1], x_BTE.shape[-1]
    past_BEP = F.pad(x_BTE.mT, (taps - 1, 0))
    return F.silu(F.conv1d(past_BEP, weight_EW[:, None], groups=channels)).mT


@pytest.mark.claim("mixers/gla.py", "Weights", "Deviations: none")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("kernel", [0, 4])
@torch.no_grad()
def test_outputs_and_states_are_those_of_fla(naive: ModuleType, kernel: int, form: str) -> None:
    mixer = laws.build(GLAConfig(width=WIDTH, heads=HEADS, gate_rank=3, kernel=kernel, form=form))
    x_BTD = laws.tokens(mixer, LENGTH)
    sizes = [8, 8, 16]
    *qkv, gate_BTE = F.linear(x_BTD, mixer.qkvg.weight).split([*sizes, 16], dim=-1)
    if kernel:
        qkv = list(map(convolved, qkv, mixer.conv_weight_EW.split(sizes)))
    gk_BTE = F.logsigmoid(mixer.gate_up(mixer.gate_down(x_BTD))) / 16
    q, k, v, gk, gate = (u.unflatten(-1, (HEADS, -1)) for u in (*qkv, gk_BTE, gate_BTE))

    state, s_BHKV, start = None, None, 0
    for stop in (50, LENGTH):
        now = slice(start, stop)
        o_BTHV, s_BHKV = naive.naive_recurrent_gla(
            q[:, now], k[:, now], v[:, now], gk[:, now], initial_state=s_BHKV, output_final_state=True
        )
        o_BTHV = F.rms_norm(o_BTHV, o_BTHV.shape[-1:], mixer.norm_weight_V, 1e-5) * F.silu(gate[:, now])
        want_BTD = mixer.out_proj(o_BTHV.flatten(2))
        y_BTD, state = mixer(x_BTD[:, now], state)
        assert laws.distance(y_BTD, want_BTD) <= 1e-5 * laws.size(want_BTD)
        assert laws.distance(state.s_BHKV, s_BHKV) <= 1e-5 * laws.size(s_BHKV)
        start = stop
