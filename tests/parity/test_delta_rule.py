"""The delta rules and their mixers against flash-linear-attention, transformers and rwkv.

flash-linear-attention's layers need a GPU, its plain references do not. All of these compute in fp32.

Letters: B row, T time, D width, E channels, H heads, K key dim, V value dim.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.mixers.kimi_delta_attention import KimiDeltaConfig
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.ops import delta_rule as ops
from holdall.testing import laws

B, H, K, V, LENGTH, MORE = 2, 2, 8, 16, 64, 13
WIDTH = 16
SINGLE = torch.float32
Transformers = Callable[[str], ModuleType]
forms = pytest.mark.parametrize("form", ["loop", "parallel"])


def package(module: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"{module.partition('.')[0]} is not installed")


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Transformers:
    """Gives a family's module with its plain functions, whose place those of flash-linear-attention take,
    where that is installed, though they need a GPU."""

    def module_of(family: str) -> ModuleType:
        module = package(f"transformers.models.{family}.modeling_{family}")
        for name, function in list(vars(module).items()):
            if inspect.isfunction(function) and name.endswith(("delta_rule", "delta_attention")):
                monkeypatch.setattr(module, name, inspect.unwrap(function))
        return module

    return module_of


def assert_same(name: str, got: Tensor, want: Tensor, bound: float = 1e-5) -> None:
    laws.assert_close(name, got, want, bound * laws.size(want))


def unlike(module: nn.Module, scale: float = 0.4) -> nn.Module:
    """Random weights everywhere: initial zeros and ones would hide wrong terms, some are not even set."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(scale * laws.draw(*parameter.shape, dtype=torch.float64, seed=i))
    return module.eval()


# ---------------------------------------------------------------------------------------------- the rules


def op_inputs() -> dict[str, Tensor]:
    def draw(*shape: int, seed: int) -> Tensor:
        return laws.draw(B, LENGTH, H, *shape, dtype=SINGLE, seed=seed)

    return {
        "q": draw(K, seed=0),
        "k": ops.unit_length(draw(K, seed=1)),
        "v": draw(V, seed=2),
        "beta": 2 * draw(seed=3).sigmoid(),
        "per head": -draw(seed=4).exp(),
        "per key": -draw(K, seed=5).exp(),
        "s": laws.draw(B, H, K, V, dtype=SINGLE, seed=6),
        "a": draw(K, seed=7),
    }


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


RULES = {"loop": ops.delta_rule_loop, "parallel": ops.delta_rule}


@forms
def test_the_rule_of_delta_net(form: str) -> None:
    naive, x = package("fla.ops.delta_rule.naive"), op_inputs()
    want, state = naive.delta_rule_recurrence(*heads_first(x["q"], x["k"], x["v"], x["beta"]), x["s"])
    got, s = RULES[form](K**-0.5 * x["q"], x["k"], x["v"], x["beta"], x["s"])
    assert_same("output", got, want.transpose(1, 2))
    assert_same("state", s, state)


@forms
@pytest.mark.parametrize("theirs", ["recurrent", "chunk", "transformers"])
def test_the_rule_of_gated_delta_net(transformers: Transformers, theirs: str, form: str) -> None:
    x = op_inputs()
    how: dict[str, Any] = {"beta": x["beta"], "g": x["per head"]}
    how |= {"initial_state": x["s"], "output_final_state": True}
    if theirs == "transformers":
        qwen = transformers("qwen3_next")
        want, state = qwen.torch_chunk_gated_delta_rule(x["q"], x["k"], x["v"], **how)
    else:
        naive = package("fla.ops.gated_delta_rule.naive")
        rule = getattr(naive, f"naive_{theirs}_gated_delta_rule")
        want, state = rule(x["q"], x["k"], x["v"], **how)
    got, s = RULES[form](K**-0.5 * x["q"], x["k"], x["v"], x["beta"], x["s"], x["per head"])
    assert_same("output", got, want)
    assert_same("state", s, state)


@forms
@pytest.mark.parametrize("theirs", ["recurrent", "chunk"])
def test_the_rule_of_kimi_delta_attention(theirs: str, form: str) -> None:
    naive, x = package("fla.ops.kda.naive"), op_inputs()
    rule = getattr(naive, f"naive_{theirs}_kda")
    want, state = rule(x["q"], x["k"], x["v"], x["per key"], x["beta"], None, x["s"], True)
    got, s = RULES[form](K**-0.5 * x["q"], x["k"], x["v"], x["beta"], x["s"], x["per key"])
    assert_same("output", got, want)
    assert_same("state", s, state)


@forms
def test_the_rule_of_rwkv_7(form: str) -> None:
    """Their alpha is the key that reads, their beta where it is put."""
    naive, x = package("fla.ops.generalized_delta_rule.dplr.naive"), op_inputs()
    k, b, a = x["a"].tanh(), x["k"], -x["k"] * x["a"].sigmoid()
    arguments = heads_first(x["q"], k, x["v"], b, a, x["per key"])
    want, state = naive.dplr_recurrence(*arguments, x["s"])
    rule = {"loop": ops.generalised_delta_rule_loop, "parallel": ops.generalised_delta_rule}[form]
    got, s = rule(K**-0.5 * x["q"], k, x["v"], a, b, x["s"], x["per key"])
    assert_same("output", got, want.transpose(1, 2))
    assert_same("state", s, state)


# --------------------------------------------------------------------------------------------- the mixers


def convolved(x_BTE: Tensor, weight_EW: Tensor) -> Tensor:
    """A causal depthwise convolution, by PyTorch's own."""
    past_BEP = F.pad(x_BTE.mT, (weight_EW.shape[1] - 1, 0))
    return F.conv1d(past_BEP, weight_EW[:, None], groups=x_BTE.shape[-1]).mT


@pytest.mark.claim("mixers/delta_net.py", "Weights")
@forms
@pytest.mark.parametrize("alternative", [False, True])
@torch.no_grad()
def test_delta_net_around_the_plain_reference(alternative: bool, form: str) -> None:
    """The layer of flash-linear-attention in its two settings, what is not the rule written out here."""
    naive = package("fla.ops.delta_rule.naive")
    options: dict[str, Any] = {}
    if alternative:
        options = {"key_map": "elu1", "kernel": 0, "gate": True, "negative_eigenvalues": True}
    mixer = unlike(DeltaNetConfig(width=WIDTH, heads=H, form=form, **options).build())
    x_BTD = laws.tokens(mixer, LENGTH + MORE)
    q, k, v = F.linear(x_BTD, mixer.qkv.weight).chunk(3, dim=-1)
    if alternative:
        q, k, v = F.elu(q) + 1, F.elu(k) + 1, F.silu(v)
    else:
        taps = mixer.conv_weight_EW.chunk(3)
        q, k, v = (F.silu(convolved(u, weight)) for u, weight in zip((q, k, v), taps, strict=True))
    q, k, v = (u.unflatten(-1, (H, -1)) for u in (q, k, v))
    p, eps = (1, 0.0) if alternative else (2, 1e-6)
    q, k = (u / (u.abs().pow(p).sum(-1, keepdim=True) + eps) ** (1 / p) for u in (q, k))
    beta = torch.sigmoid(x_BTD @ mixer.beta_proj.weight.T) * (2 if alternative else 1)
    o_BHTV, s_BHKV = naive.delta_rule_recurrence(*heads_first(q, k, v, beta))
    o_BTHV = o_BHTV.transpose(1, 2)
    o_BTHV = o_BTHV / (o_BTHV.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm_weight_V
    if alternative:
        o_BTHV = o_BTHV * F.silu(x_BTD @ mixer.gate_proj.weight.T).view_as(o_BTHV)
    y_BTD, state = mixer(x_BTD)
    assert_same("output", y_BTD, o_BTHV.flatten(2) @ mixer.out_proj.weight.T)
    assert_same("state", state.s_BHKV, s_BHKV)


def in_pieces(layer: nn.Module, config: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, recurrent state and convolution's inputs of a layer of transformers: a prompt, then tokens."""
    cache = package("transformers.cache_utils").DynamicCache(config=config)
    pieces = x_BTD.split([LENGTH] + [1] * MORE, dim=1)
    y_BTD = torch.cat([layer(piece, cache_params=cache) for piece in pieces], dim=1)
    kept = cache.layers[0]
    return y_BTD, kept.recurrent_states[0], kept.conv_states[0]


def assert_same_layer(mixer: nn.Module, layer: nn.Module, config: Any) -> None:
    x_BTD = laws.tokens(mixer, LENGTH + MORE)
    want_BTD, s_BHKV, past_BEP = in_pieces(layer, config, x_BTD)
    y_BTD, state = mixer(x_BTD)
    assert_same("output", y_BTD, want_BTD)
    assert_same("recurrent state", state.s_BHKV, s_BHKV)
    past_BPE = past_BEP.mT[:, -state.conv_BPE.shape[1] :]
    assert_same("convolution's inputs", state.conv_BPE, past_BPE)


@pytest.mark.claim("mixers/gated_delta_net.py", "Weights")
@forms
@pytest.mark.parametrize("value_heads", [2, 4])
@torch.no_grad()
def test_gated_delta_net_is_qwen3_nexts_layer(
    transformers: Transformers, value_heads: int, form: str
) -> None:
    qwen = transformers("qwen3_next")
    config = qwen.Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=H,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    layer = unlike(qwen.Qwen3NextGatedDeltaNet(config, 0))
    options = {"head_dim": K, "value_ratio": V // K, "value_heads": value_heads, "eps": config.rms_norm_eps}
    mixer = GatedDeltaNetConfig(width=WIDTH, heads=H, form=form, **options).build()
    # theirs are grouped by key head: its query, key, values and gates, and its values' beta and decay
    each = value_heads // H
    grouped = layer.in_proj_qkvz.weight.unflatten(0, (H, -1)).split([K, K, each * V, each * V], dim=1)
    q, k, v, gate = (rows.flatten(0, 1) for rows in grouped)
    b, a = (rows.flatten(0, 1) for rows in layer.in_proj_ba.weight.unflatten(0, (H, 2, each)).unbind(1))
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat((q, k, v)),
            "conv_weight_EW": layer.conv1d.weight[:, 0],
            "ab_proj.weight": torch.cat((a, b)),
            "A_log": layer.A_log,
            "dt_bias": layer.dt_bias,
            "norm_weight_V": layer.norm.weight,
            "gate_proj.weight": gate,
            "out_proj.weight": layer.out_proj.weight,
        }
    )
    assert_same_layer(mixer, layer, config)


@pytest.mark.claim("mixers/gated_delta_net.py", "Weights")
@forms
@torch.no_grad()
def test_gated_delta_net_is_olmo_hybrids_layer(transformers: Transformers, form: str) -> None:
    """With negative eigenvalues."""
    olmo = transformers("olmo_hybrid")
    config = olmo.OlmoHybridConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=H,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_allow_neg_eigval=True,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    layer = unlike(olmo.OlmoHybridGatedDeltaNet(config, 0))
    options = {"head_dim": K, "value_ratio": V // K, "negative_eigenvalues": True}
    mixer = GatedDeltaNetConfig(width=WIDTH, heads=H, form=form, **options).build()
    qkv = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight)
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat(qkv),
            "conv_weight_EW": layer.conv1d.weight[:, 0],
            "ab_proj.weight": torch.cat((layer.a_proj.weight, layer.b_proj.weight)),
            "A_log": layer.A_log,
            "dt_bias": layer.dt_bias,
            "norm_weight_V": layer.o_norm.weight,
            "gate_proj.weight": layer.g_proj.weight,
            "out_proj.weight": layer.o_proj.weight,
        }
    )
    assert_same_layer(mixer, layer, config)


@pytest.mark.claim("mixers/kimi_delta_attention.py", "Weights", "flash-linear-attention's layer")
@forms
@torch.no_grad()
def test_kimi_delta_attention_is_transformers_layer(transformers: Transformers, form: str) -> None:
    kimi = transformers("kimi_linear")
    config = kimi.KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_attn_config={"num_heads": 3, "head_dim": K, "short_conv_kernel_size": 4},
    )
    layer = unlike(kimi.KimiLinearDeltaAttention(config, 0))
    mixer = KimiDeltaConfig(width=WIDTH, heads=3, head_dim=K, eps=config.rms_norm_eps, form=form).build()
    qkv, decay = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight), layer.forget_gate
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat(qkv),
            "conv_weight_EW": layer.conv1d.weight[:, 0],
            "beta_proj.weight": layer.b_proj.weight,
            "decay_proj.0.weight": decay.f_a_proj.weight,
            "decay_proj.1.weight": decay.f_b_proj.weight,
            "gate_proj.0.weight": layer.g_a_proj.weight,
            "gate_proj.1.weight": layer.g_b_proj.weight,
            "A_log": decay.A_log.flatten(),
            "dt_bias_HK": decay.dt_bias.view(3, K),
            "norm_weight_V": layer.o_norm.weight,
            "out_proj.weight": layer.o_proj.weight,
        }
    )
    assert_same_layer(mixer, layer, config)


@pytest.fixture
def rwkv(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package's model.py, which reads the version from the environment and sets torch's precision."""
    spec = importlib.util.find_spec("rwkv")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("rwkv is not installed")
    for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
        monkeypatch.setenv(name, value)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    path = f"{spec.submodule_search_locations[0]}/model.py"
    spec = importlib.util.spec_from_file_location("rwkv_model_of_version_7", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    yield module
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


@pytest.mark.claim("mixers/rwkv_7.py", "Weights", "by default there is no value residual")
@pytest.mark.parametrize("layer", [0, 1])
@forms
@torch.no_grad()
def test_rwkv_7_is_the_packages_layer(rwkv: ModuleType, form: str, layer: int) -> None:
    """Its epsilon is fixed, so its heads have their 64 dimensions here; e^(-1/2) is rounded to six digits."""
    width, heads = 128, 2
    options = {"decay_rank": 5, "a_rank": 6, "value_rank": 4 * layer}
    mixer = unlike(RWKV7Config(width=width, heads=heads, form=form, **options).build(), 0.3)
    mixer.value.weight *= 0.01  # outputs so small that the norm's epsilon shows
    own = dict(mixer.named_parameters())
    mix = list(own["mix_ZD"])
    names = ("w0", "w1", "w2", "a0", "a1", "a2", "v0", "v1", "v2", "g1", "g2", "k_k", "k_a", "r_k")
    rest = [own[name].flatten() if name == "r_k" else own.get(name, torch.empty(0)) for name in names]
    matrices = [own[f"{name}.weight"].T for name in ("receptance", "key", "value", "out_proj")]
    norm = [own["norm_weight_D"], own["norm_bias_D"]]

    x_BTD = laws.tokens(mixer, LENGTH + MORE)
    first_BTD = laws.draw(2, LENGTH + MORE, width, dtype=x_BTD.dtype, seed=1) if layer else None
    y_BTD, state = mixer(x_BTD, shared_BTD=first_BTD)
    for row in range(2):
        first_TD = torch.empty(LENGTH + MORE, 0) if first_BTD is None else first_BTD[row]
        last_D, s_HVK, want = torch.zeros(width), torch.zeros(heads, 64, 64), []
        for piece, first in zip(
            x_BTD[row].split([LENGTH, MORE]), first_TD.split([LENGTH, MORE]), strict=True
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y_TD, last_D, s_HVK, _ = rwkv.RWKV_x070_TMix_seq(
                    layer, heads, 64, piece, last_D, first, s_HVK, *mix, *rest, *matrices, *norm
                )
            want.append(y_TD)
        assert_same("output", y_BTD[row], torch.cat(want))
        assert_same("state", state.s_BHKV[row], s_HVK.mT)
        assert_same("last token", state.last_BD[row], last_D)
