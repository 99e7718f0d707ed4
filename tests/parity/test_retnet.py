"""RetNet's retention against torchscale, where its authors wrote it, and flash-linear-attention's reference.

torchscale's recurrent form computes the same as ours. Its parallel form also divides each row of scores by
its sum, where that is above 1, and the norm that follows undoes this but for its eps. fla's reference has no
normaliser, rotation, norm or gate: these are made here.

Letters: B row, T time, D width, H heads, K key dim, V value dim.
"""

import warnings
from types import ModuleType, SimpleNamespace

import laws
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.mixers.retnet import RetNet, RetNetConfig

WIDTH, LENGTH = 24, 40
DOUBLE = torch.float64
SHAPES = pytest.mark.parametrize(("heads", "value_ratio"), [(2, 2), (3, 1)])
FORMS = pytest.mark.parametrize("form", ["loop", "parallel"])


def imported(name: str, package: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{package} is not installed")


def decays(heads: int) -> Tensor:
    return 1 - 2.0 ** (-5 - torch.arange(heads, dtype=DOUBLE))


def angles(length: int, key_dim: int) -> Tensor:
    """Of each position and pair of features."""
    frequency_F = 10000.0 ** -torch.linspace(0, 1, key_dim // 2, dtype=DOUBLE)
    return torch.arange(length, dtype=DOUBLE)[:, None] * frequency_F


def weighted_mask(length: int, heads: int) -> Tensor:
    """Powers of the decay, each row divided by the root of its sum."""
    lag_TT = torch.arange(length)[:, None] - torch.arange(length)
    mask_HTT = decays(heads)[:, None, None] ** lag_TT.clamp(min=0) * (lag_TT >= 0)
    return mask_HTT / mask_HTT.sum(-1, keepdim=True).sqrt()


def torchscales(heads: int, value_ratio: int, form: str, eps: float) -> tuple[nn.Module, RetNet]:
    """Theirs, with random weights, and ours with the same."""
    package = imported("torchscale.component.multiscale_retention", "torchscale")
    args = SimpleNamespace(multiway=False, layernorm_eps=eps)
    theirs = package.MultiScaleRetention(args, WIDTH, value_ratio * WIDTH, heads).double()
    for i, parameter in enumerate(theirs.parameters()):
        parameter.copy_(0.5 * laws.draw(*parameter.shape, dtype=DOUBLE, seed=i))
    config = RetNetConfig(width=WIDTH, heads=heads, value_ratio=value_ratio, eps=eps, chunk=16, form=form)
    mixer = config.build().double()
    projections = [theirs.get_submodule(f"{name}_proj").weight for name in "qkvg"]
    mixer.load_state_dict({"qkvg.weight": torch.cat(projections), "out_proj.weight": theirs.out_proj.weight})
    return theirs, mixer


@FORMS
@SHAPES
@torch.no_grad()
def test_outputs_and_states_are_those_of_torchscales_recurrence(
    heads: int, value_ratio: int, form: str
) -> None:
    theirs, mixer = torchscales(heads, value_ratio, form, eps=0.1)  # a small one would hide the normaliser
    x_BTD = laws.tokens(mixer, LENGTH)
    angle_TK = angles(LENGTH, WIDTH // heads).repeat_interleave(2, dim=-1)
    memory: dict[str, Tensor] = {}
    state, start = None, 0
    for stop in (LENGTH - 3, LENGTH - 2, LENGTH):
        want_BTD = torch.cat(
            [
                theirs(x_BTD[:, [t]], ((angle_TK[t].sin(), angle_TK[t].cos()), decays(heads)), False, memory)
                for t in range(start, stop)
            ],
            dim=1,
        )
        y_BTD, state = mixer(x_BTD[:, start:stop], state)
        # their norm rounds to fp32
        laws.assert_close("output", y_BTD, want_BTD, 1e-6 * laws.size(want_BTD))
        # theirs is divided by the root of the sum that ours divides the output by
        s_BHVK = memory["prev_key_value"] * memory["scale"].sqrt()[:, None, None]
        laws.assert_close("state", state.s_BHKV.mT, s_BHVK)
        start = stop


@FORMS
@SHAPES
@torch.no_grad()
def test_outputs_are_those_of_torchscales_parallel_form_whose_norm_has_no_eps(
    heads: int, value_ratio: int, form: str
) -> None:
    theirs, mixer = torchscales(heads, value_ratio, form, eps=0.0)
    x_BTD = laws.tokens(mixer, LENGTH)
    angle_TK = angles(LENGTH, WIDTH // heads).repeat_interleave(2, dim=-1)
    want_BTD = theirs(x_BTD, ((angle_TK.sin(), angle_TK.cos()), weighted_mask(LENGTH, heads)))
    laws.assert_close("output", mixer(x_BTD)[0], want_BTD, 1e-6 * laws.size(want_BTD))


@FORMS
@SHAPES
@torch.no_grad()
def test_outputs_are_those_of_flash_linear_attentions_reference(
    heads: int, value_ratio: int, form: str
) -> None:
    naive = imported("fla.ops.retention.naive", "fla-core")
    config = RetNetConfig(width=WIDTH, heads=heads, value_ratio=value_ratio, chunk=16, form=form)
    mixer = laws.build(config)
    x_BTD = laws.tokens(mixer, LENGTH)
    values = value_ratio * WIDTH
    *qkv, gate_BTE = F.linear(x_BTD, mixer.qkvg.weight).split([WIDTH, WIDTH, values, values], dim=-1)
    q_BHTK, k_BHTK, v_BHTV = (u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in qkv)
    # pairs of neighbours are complex numbers
    turn_TF = torch.polar(torch.ones(()), angles(LENGTH, WIDTH // heads).float())
    q_BHTK, k_BHTK = (
        torch.view_as_real(torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous()) * turn_TF).flatten(-2)
        for u in (q_BHTK, k_BHTK)
    )
    total_HT = decays(heads)[:, None].pow(torch.arange(LENGTH)).cumsum(-1)
    o_BHTV = naive.naive_retention(q_BHTK, k_BHTK, v_BHTV) / total_HT.sqrt()[..., None].float()
    o_BHTV = o_BHTV / (o_BHTV.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    want_BTD = mixer.out_proj(F.silu(gate_BTE) * o_BHTV.transpose(1, 2).flatten(2))
    y_BTD, _ = laws.read_in_pieces(mixer, x_BTD, [LENGTH - 3, 1, 2])
    laws.assert_close("output", y_BTD, want_BTD, 1e-5 * laws.size(want_BTD))
