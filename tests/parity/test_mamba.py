"""Mamba against transformers' mixer, an independent implementation in plain PyTorch on a CPU.

Letters: B row, T time, D width, E channels, N state per channel, W taps and P inputs of the convolution.
"""

import warnings
from types import ModuleType

import pytest
import torch
from torch import nn

import holdall
from holdall.mixers.mamba import Mamba, MambaConfig
from holdall.testing import laws

WIDTH, STATE, STEPS = 16, 6, 4


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        import transformers.models.mamba.modeling_mamba  # noqa: F401 - makes the submodule known
    return module


def load(theirs: nn.Module, mixer: Mamba) -> None:
    """Their weights into ours."""
    own = {"conv1d.weight": "conv_weight_EW", "conv1d.bias": "conv_bias_E"}
    weights = {own.get(name, name): weight for name, weight in theirs.state_dict().items()}
    weights["conv_weight_EW"] = weights["conv_weight_EW"][:, 0]
    mixer.load_state_dict(weights)


@pytest.mark.claim("mixers/mamba.py", "Weights", "the convolution's state")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("prompt", [2, 37])  # shorter than the convolution, and longer than two chunks
@pytest.mark.parametrize(("expand", "kernel", "rank"), [(2, 4, 0), (1, 3, 5)])
@torch.no_grad()
def test_outputs_and_states_are_those_of_transformers(
    transformers: ModuleType, expand: int, kernel: int, rank: int, prompt: int, form: str
) -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=WIDTH, state_size=STATE, expand=expand, conv_kernel=kernel, time_step_rank=rank or "auto",
        num_hidden_layers=1,
    )  # fmt: skip
    theirs = transformers.models.mamba.modeling_mamba.MambaMixer(config, 0).eval()
    for i, parameter in enumerate(theirs.parameters()):
        parameter += 0.2 * laws.draw(*parameter.shape, dtype=torch.float32, seed=i)
    options = {"state": STATE, "expand": expand, "kernel": kernel, "dt_rank": rank, "chunk": 16}
    mixer = MambaConfig(width=WIDTH, form=form, **options).build()
    load(theirs, mixer)

    x_BTD = laws.tokens(mixer, prompt + STEPS)
    cache, state = transformers.DynamicCache(config=config), None
    for piece_BTD in x_BTD.split([prompt] + [1] * STEPS, dim=1):
        want_BTD = theirs(piece_BTD, cache_params=cache)
        y_BTD, state = mixer(piece_BTD, state)
        want_BEN = cache.get_recurrent_state(0, state_idx=0)
        want_BEP = cache.get_conv_state(0, state_idx=0)[..., 1:]  # theirs keeps one that nothing needs
        for name, got, want in (
            ("output", y_BTD, want_BTD),
            ("state", state.h_BEN, want_BEN),
            ("convolution's inputs", state.conv_BPE.mT, want_BEP),
        ):
            laws.assert_close(name, got, want, 1e-5 * laws.size(want))


@pytest.mark.claim("mixers/mamba.py", "the recurrent state is fp32")
@pytest.mark.claim("mixers/mamba_2.py", "the recurrent state is fp32")
@pytest.mark.parametrize(("name", "field"), [("mamba", "h_BEN"), ("mamba-2", "s_BHNV")])
@torch.no_grad()
def test_weights_in_bf16_leave_the_recurrent_state_in_fp32(name: str, field: str) -> None:
    mixer = holdall.build(name, width=WIDTH).to(torch.bfloat16)
    _, state = mixer(laws.tokens(mixer, 5))
    assert getattr(state, field).dtype == torch.float32
    assert (state.conv_BPE.dtype, state.conv_BPE.shape[1]) == (torch.bfloat16, 3)
