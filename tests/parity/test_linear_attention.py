"""Linear attention and its Taylor map against the plain references of flash-linear-attention.

The projections around these references are four layers, as in the official modules.

Letters: B row, T time, D width, H heads, K key dim, F features, V value dim.
"""

import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdall.contract import Mixer
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.testing import laws

WIDTH, HEADS, FEATURES, LENGTH = 16, 2, 6, 40
PIECES = [LENGTH - 3, 1, 2]
FORMS = pytest.mark.parametrize("form", ["loop", "parallel"])
MAPS = {
    "elu1": lambda u: F.elu(u) + 1,
    "relu": torch.relu,
    "identity": lambda u: u,
    "square": lambda u: u**2 / 2**0.5,
}


def fla(module: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"fla.{module}", reason="fla-core is not installed")


def projections_of(mixer: Mixer) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Of queries, keys, values and outputs; the mixer gets their weights."""
    bias, dtype = mixer.config.bias, laws.dtype_of(mixer)
    keys = HEADS * FEATURES
    layers = tuple(nn.Linear(WIDTH, out, bias=bias, dtype=dtype) for out in (keys, keys, WIDTH, WIDTH))
    kinds = ("weight", "bias") if bias else ("weight",)
    weights = {}
    for kind in kinds:
        rows = [layer.get_parameter(kind) for layer in layers]
        for i, parameter in enumerate(rows):
            parameter.copy_(0.3 * laws.draw(*parameter.shape, dtype=dtype, seed=i))
        weights |= {f"qkv.{kind}": torch.cat(rows[:3]), f"out_proj.{kind}": rows[3]}
    mixer.load_state_dict(weights)
    return layers


@FORMS
@pytest.mark.parametrize(
    ("feature_map", "normalise"),
    [("elu1", True), ("elu1", False), ("relu", False), ("identity", False), ("square", True)],
)
@torch.no_grad()
def test_outputs_and_states_are_those_of_fla(feature_map: str, normalise: bool, form: str) -> None:
    naive = fla("ops.linear_attn.naive")
    options = {"feature_map": feature_map, "normalise": normalise, "eps": 1e-10, "bias": True}
    config = LinearAttentionConfig(
        width=WIDTH, heads=HEADS, feature_dim=FEATURES, chunk=16, form=form, **options
    )
    mixer = config.build()
    *inner, outer = projections_of(mixer)
    state = sums = None
    for piece_BTD in laws.tokens(mixer, LENGTH).split(PIECES, dim=1):
        q, k, v = (layer(piece_BTD).unflatten(-1, (HEADS, -1)) for layer in inner)
        o_BTHV, sums = naive.naive_recurrent_linear_attn(
            MAPS[feature_map](q), MAPS[feature_map](k), v, scale=1.0, initial_state=sums,
            output_final_state=True, normalize=normalise,
        )  # fmt: skip
        want_BTD = outer(o_BTHV.flatten(2))
        y_BTD, state = mixer(piece_BTD, state)
        laws.assert_close("output", y_BTD, want_BTD, 1e-5 * laws.size(want_BTD))
        s_BHFV, *z = sums if normalise else (sums,)
        for name, got, want in zip(state._fields, state, [s_BHFV, *(u[:, 0] for u in z)], strict=True):
            laws.assert_close(name, got, want, 1e-5 * laws.size(want))


@FORMS
@torch.no_grad()
def test_taylor_is_flas_based(form: str) -> None:
    """All in one piece there, in several here; the sums are of the same features in the same order."""
    naive, maps = fla("ops.based.naive"), fla("modules.feature_map")
    # eps as there
    config = TaylorConfig(width=WIDTH, heads=HEADS, feature_dim=FEATURES, eps=1e-6, chunk=16, form=form)
    mixer = config.build().double()
    *inner, outer = projections_of(mixer)
    x_BTD = laws.tokens(mixer, LENGTH)
    q_BHTK, k_BHTK, v_BHTV = (layer(x_BTD).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in inner)
    o_BHTV = naive.naive_parallel_based(q_BHTK, k_BHTK, v_BHTV)
    y_BTD, state = laws.read_in_pieces(mixer, x_BTD, PIECES)
    laws.assert_close("output", y_BTD, outer(o_BHTV.transpose(1, 2).flatten(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs about checkpoints, which they take of it
        k_BHTF = maps.TaylorFeatureMap(FEATURES)(k_BHTK)
    laws.assert_close("state.s", state.s_BHFV, k_BHTF.mT @ v_BHTV)
    laws.assert_close("state.z", state.z_BHF, k_BHTF.sum(2))
