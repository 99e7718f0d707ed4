"""Prefix linear attention against the plain reference of Based in flash-linear-attention.

That reference is causal and knows no prefix. But a prefix read without direction is the same as one whose
keys and values, of its own, stand in front of the text: there even a causal reader sees all of it.

Letters: B row, T time, D width, H heads, K key dim, V value dim.
"""

import warnings
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.testing import laws


@pytest.fixture(scope="module")
def naive() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("fla.ops.based.naive", reason="fla-core is not installed")


@pytest.mark.claim("mixers/prefix_linear_attention.py", "Weights")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_outputs_are_those_of_based_behind_the_prefix(naive: ModuleType, form: str) -> None:
    prefix, length = 12, 40
    config = PrefixLinearAttentionConfig(width=16, prefix=prefix, feature_dim=8, heads=2, chunk=16, form=form)
    mixer = laws.build(config).double()
    x_BTD = laws.tokens(mixer, length)
    q, k, v = (u.unflatten(-1, (2, -1)).transpose(1, 2) for u in mixer.qkv(x_BTD).split([16, 16, 16], dim=-1))
    front_k, front_v = (
        u.unflatten(-1, (2, -1)).transpose(1, 2)
        for u in mixer.prefix_kv(x_BTD[:, :prefix]).split([16, 16], dim=-1)
    )
    q, k, v = F.pad(q, (0, 0, prefix, 0)), torch.cat((front_k, k), dim=2), torch.cat((front_v, v), dim=2)
    numerator, total = (
        naive.naive_parallel_based(q, k, u, use_norm=False)[:, :, prefix:] for u in (v, torch.ones_like(v))
    )
    want_BTD = mixer.out_proj((numerator / total).transpose(1, 2).flatten(2))
    assert laws.distance(mixer(x_BTD)[0], want_BTD) <= 1e-12 * laws.size(want_BTD)
