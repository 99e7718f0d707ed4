"""Linformer against the package `linformer`, its weights loaded into ours."""

import pytest
import torch

from holdall.mixers.linformer import Linformer, LinformerConfig
from holdall.testing import laws

DOUBLE = torch.float64


def ours(theirs: torch.nn.Module, shared: bool) -> Linformer:
    """Their weights under our names; keys that are also the values are two equal blocks of rows here."""
    config = LinformerConfig(width=16, heads=4, rank=6, max_length=theirs.seq_len, shared=shared)
    mixer, own = config.build(), theirs.state_dict()
    value = own["to_k.weight"] if shared else own["to_v.weight"]
    weights = {
        "qkv.weight": torch.cat((own["to_q.weight"], own["to_k.weight"], value)),
        "e_LR": own["proj_k"],
        "out_proj.weight": own["to_out.weight"],
        "out_proj.bias": own["to_out.bias"],
    }
    mixer.load_state_dict(weights if shared else {**weights, "f_LR": own["proj_v"]})
    return mixer


@pytest.mark.claim("mixers/linformer.py", "Weights")
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("length", [1, 20, 48])
@torch.no_grad()
def test_outputs_are_the_packages(length: int, shared: bool, dtype: torch.dtype) -> None:
    package = pytest.importorskip("linformer", reason="needs the package linformer")
    torch.manual_seed(0)
    theirs = package.LinformerSelfAttention(dim=16, seq_len=48, k=6, heads=4, share_kv=shared)
    x_BTD = laws.draw(2, length, 16, dtype=dtype)
    y_BTD, _ = ours(theirs, shared).to(dtype)(x_BTD)
    want_BTD = theirs.to(dtype)(x_BTD)
    assert laws.distance(y_BTD, want_BTD) < (1e-14 if dtype == DOUBLE else 1e-6) * laws.size(want_BTD)


@pytest.mark.claim("mixers/linformer.py", "Weights")
def test_the_package_refuses_positions_beyond_its_length_too() -> None:
    package = pytest.importorskip("linformer", reason="needs the package linformer")
    theirs = package.LinformerSelfAttention(dim=16, seq_len=10, k=6, heads=4)
    with pytest.raises(AssertionError, match="sequence length"):
        theirs(torch.zeros(1, 11, 16))
    with pytest.raises(ValueError, match="max_length 10"):
        ours(theirs, shared=False)(torch.zeros(1, 11, 16))
