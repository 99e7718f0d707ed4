"""Mamba-2 against transformers' mixer, an independent implementation in plain PyTorch on a CPU.

Letters: B row, T time, D width, E channels, H heads, P head_dim, N state per channel.
"""

import warnings
from types import ModuleType

import pytest
import torch
from torch import nn

from holdall.mixers.mamba_2 import Mamba2, Mamba2Config
from holdall.testing import laws

WIDTH, LENGTH, STEPS = 16, 37, 3


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        import transformers.models.mamba2.modeling_mamba2  # noqa: F401 - makes the submodule known
    return module


def load(theirs: nn.Module, mixer: Mamba2) -> None:
    """Their weights into ours."""
    own = {"conv1d.weight": "conv_weight_EW", "conv1d.bias": "conv_bias_E", "norm.weight": "norm_weight_E"}
    weights = {own.get(name, name): weight for name, weight in theirs.state_dict().items()}
    weights["conv_weight_EW"] = weights["conv_weight_EW"][:, 0]
    mixer.load_state_dict(weights)


@pytest.mark.claim("mixers/mamba_2.py", "Weights", "the convolution's state", "it is (state")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize(("head_dim", "groups"), [(8, 1), (8, 2), (4, 4)])
@torch.no_grad()
def test_outputs_and_states_are_those_of_transformers(
    transformers: ModuleType, head_dim: int, groups: int, form: str
) -> None:
    config = transformers.Mamba2Config(
        hidden_size=WIDTH, state_size=6, head_dim=head_dim, num_heads=32 // head_dim, n_groups=groups,
        chunk_size=8, num_hidden_layers=1,
    )  # fmt: skip
    theirs = transformers.models.mamba2.modeling_mamba2.Mamba2Mixer(config, 0).eval()
    for i, parameter in enumerate(theirs.parameters()):
        parameter += 0.2 * laws.draw(*parameter.shape, dtype=torch.float32, seed=i)
    options = {"state": 6, "head_dim": head_dim, "groups": groups, "chunk": 16, "form": form}
    mixer = Mamba2Config(width=WIDTH, **options).build()
    load(theirs, mixer)

    x_BTD = laws.tokens(mixer, LENGTH + STEPS)
    cache, state = transformers.DynamicCache(config=config), None
    for piece_BTD in x_BTD.split([LENGTH] + [1] * STEPS, dim=1):
        want_BTD = theirs(piece_BTD, cache_params=cache)
        y_BTD, state = mixer(piece_BTD, state)
        assert laws.distance(y_BTD, want_BTD) <= 1e-5 * laws.size(want_BTD)
        want_BHPN = cache.get_recurrent_state(0, state_idx=0)
        assert laws.distance(state.s_BHNV.mT, want_BHPN) <= 1e-5 * laws.size(want_BHPN)
        want_BEW = cache.get_conv_state(0, state_idx=0)[..., 1:]  # theirs keeps one that nothing needs
        assert laws.distance(state.conv_BPE.mT, want_BEW) <= 1e-5 * laws.size(want_BEW)
