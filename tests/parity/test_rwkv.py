"""RWKV-4 against transformers, RWKV-5 against the `rwkv` package: independent implementations.

Letters: B row, T time, D width, H heads, K key dim, V value dim.
"""

import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from holdall.mixers.rwkv_4 import RWKV4Config
from holdall.mixers.rwkv_5 import RWKV5Config
from holdall.mixers.rwkv_channel_mix import RWKVChannelMixConfig
from holdall.testing import laws

WIDTH, LENGTH, MORE = 16, 40, 5


@pytest.mark.claim("mixers/rwkv_4.py", "Weights", "the state has two")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_rwkv_4_is_transformers(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="transformers is not installed")
        from transformers.models.rwkv.modeling_rwkv import RwkvConfig, RwkvSelfAttention

        theirs = RwkvSelfAttention(RwkvConfig(hidden_size=WIDTH, num_hidden_layers=2), layer_id=1).eval()
    for i, parameter in enumerate(theirs.parameters()):
        parameter.copy_(0.5 * laws.draw(*parameter.shape, dtype=torch.float64, seed=i))
    mixer = RWKV4Config(width=WIDTH, chunk=8, form=form).build().eval()
    mixes = (theirs.time_mix_key, theirs.time_mix_value, theirs.time_mix_receptance)
    weights = {
        "time_mix_ZD": torch.cat(mixes)[:, 0],
        "time_decay": theirs.time_decay,
        "time_first": theirs.time_first,
        "key.weight": theirs.key.weight,
        "value.weight": theirs.value.weight,
        "receptance.weight": theirs.receptance.weight,
        "out_proj.weight": theirs.output.weight,
    }
    mixer.load_state_dict(weights)
    # keys of e^-30 to e^30, so that the sums need their exponents
    mixer.key.weight *= 5
    theirs.key.weight *= 5

    x_BTD = laws.draw(2, LENGTH + MORE, WIDTH, dtype=torch.float32)
    memory = [torch.zeros(2, WIDTH, 2) for _ in range(5)]  # of both mixings; the last three p, q and o
    memory[4] -= 1e30
    want = []
    # not one by one: there a single token of several rows is shifted into every other row
    for piece in x_BTD.split([LENGTH, MORE], dim=1):
        y_BTD, memory = theirs(piece, state=memory, use_cache=True)
        want.append(y_BTD)
    _, last_BD, p_BD, q_BD, o_BD = (tensor[:, :, 1] for tensor in memory)
    y_BTD, state = mixer(x_BTD)
    for name, got, right in (
        ("output", y_BTD, torch.cat(want, dim=1)),
        ("last token", state.last_BD, last_BD),
        ("mean", state.m_BD, p_BD / q_BD),
        ("log weight", state.l_BD, o_BD + q_BD.log()),
    ):
        laws.assert_close(name, got, right, 2e-6 * laws.size(right))


@pytest.mark.claim("mixers/rwkv_channel_mix.py", "Weights", "Deviations: none")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_channel_mixing_is_transformers(form: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="transformers is not installed")
        from transformers.models.rwkv.modeling_rwkv import RwkvConfig, RwkvFeedForward

        config = RwkvConfig(hidden_size=WIDTH, num_hidden_layers=2, intermediate_size=24)
        theirs = RwkvFeedForward(config, layer_id=1).eval()
    for i, parameter in enumerate(theirs.parameters()):
        parameter.copy_(0.5 * laws.draw(*parameter.shape, dtype=torch.float64, seed=i))
    mixer = RWKVChannelMixConfig(width=WIDTH, hidden=24, form=form).build().eval()
    weights = {f"{name}.weight": getattr(theirs, name).weight for name in ("key", "value", "receptance")}
    mixes = torch.cat((theirs.time_mix_key, theirs.time_mix_receptance))[:, 0]
    mixer.load_state_dict(weights | {"time_mix_ZD": mixes})
    x_BTD = laws.draw(2, LENGTH + MORE, WIDTH, dtype=torch.float32)
    memory, want = [torch.zeros(2, WIDTH, 2)], []
    for piece in x_BTD.split([LENGTH, MORE], dim=1):
        y_BTD, memory = theirs(piece, state=memory)
        want.append(y_BTD)
    y_BTD, state = mixer(x_BTD)
    laws.assert_close("output", y_BTD, torch.cat(want, dim=1), 2e-6 * laws.size(y_BTD))
    laws.assert_close("last token", state.last_BD, memory[0][:, :, 1])


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """The package's plain torch code. It sets flags of torch and of the process, which are put back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("RWKV_JIT_ON", "RWKV_CUDA_ON", "RWKV_V7_ON"):
            patch.setenv(name, "0")
        yield pytest.importorskip("rwkv.model", reason="the package rwkv is not installed")
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = flags


@pytest.mark.claim("mixers/rwkv_5.py", "Weights", "Deviations: none")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_rwkv_5_is_the_packages(package: ModuleType, form: str) -> None:
    mixer = laws.build(RWKV5Config(width=WIDTH, head_size=4, chunk=8, form=form))
    layers = (mixer.key, mixer.value, mixer.receptance, mixer.gate, mixer.out_proj)
    for i, layer in enumerate(layers):
        layer.weight.copy_(0.5 * laws.draw(WIDTH, WIDTH, dtype=torch.float64, seed=i))
    # there the block's own norm comes first and its residual last, and rows are read one at a time
    before = (torch.ones(WIDTH), torch.zeros(WIDTH))
    norm = (mixer.norm_weight_D, mixer.norm_bias_D)
    times = (torch.exp(-mixer.time_decay.exp())[..., None], mixer.time_faaaa[..., None])
    how = (*before, *norm, *mixer.time_mix_ZD, *times, *(layer.weight.T for layer in layers), *[None] * 20)
    x_TD = laws.draw(LENGTH + MORE, WIDTH, dtype=torch.float32)
    last_D, s_HKV = torch.zeros(WIDTH), torch.zeros(4, 4, 4)
    y_TD, last_D, s_HKV = package.RWKV.att_seq_v5_2(None, x_TD[:LENGTH], last_D, s_HKV, *how)
    want = [y_TD]
    for x_D in x_TD[LENGTH:]:
        y_D, last_D, s_HKV = package.RWKV.att_one_v5_1(None, x_D, last_D, s_HKV, *how)
        want.append(y_D[None])
    y_BTD, state = mixer(F.layer_norm(x_TD, (WIDTH,))[None])
    for name, got, right in (
        ("output", y_BTD[0], torch.cat(want) - x_TD),
        ("last token", state.last_BD[0], last_D),
        ("state", state.s_BHKV[0], s_HKV),
    ):
        laws.assert_close(name, got, right, 2e-6 * laws.size(right))
