"""The language models of flash-linear-attention against its own classes.

Its kernels need a GPU. Here plain PyTorch stands in for them, by the definitions that the package gives: its
naive references for the recurrences, and norms, gates, convolutions and rotary positions written out.

Letters: B row, T time, D width, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters.originals import fla_models, randomised, refusal
from adapters.parity import check
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdall.adapters import foreign
from holdall.adapters.reading import weights_in
from holdall.files import read_json, write_json
from holdall.model import Model

models = fla_models()

# the package advises against what is tested here, too
pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 61,
    "fuse_norm": False, "fuse_swiglu": False,
}  # fmt: skip


def rms_norm(self: Any, x: Tensor, residual: Tensor | None = None, prenorm: bool = False) -> Any:
    x = x if residual is None else x + residual
    y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
    return (y, x) if prenorm else y


def rms_norm_gated(self: Any, x: Tensor, g: Tensor) -> Tensor:
    gate = g.sigmoid() if self.activation == "sigmoid" else F.silu(g)
    return rms_norm(self, x) * gate


def convolution(self: Any, x: Tensor, **_: Any) -> tuple[Tensor, None]:
    x_BDT = F.conv1d(F.pad(x.mT, (self.kernel_size[0] - 1, 0)), self.weight, groups=self.groups)
    return (F.silu(x_BDT) if self.activation else x_BDT).mT, None


def rotary(self: Any, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    frequency_F = self.base ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
    angle_T1F = (torch.arange(q.shape[1])[:, None] * frequency_F)[:, None]
    cos, sin = angle_T1F.cos().to(q.dtype), angle_T1F.sin().to(q.dtype)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

    return turned(q), turned(k)


def unit(x: Tensor) -> Tensor:
    """By its kernel's default: 1e-6 is added to the square."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> Any:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    assert options["use_gate_in_kernel"]
    assert options["use_qk_l2norm_in_kernel"]
    g = -options["A_log"].exp() * F.softplus(g + options["dt_bias"])
    beta = beta.sigmoid() * (2 if options["allow_neg_eigval"] else 1)
    q, k = (unit(u).repeat_interleave(v.shape[2] // u.shape[2], dim=2) for u in (q, k))
    return naive_recurrent_gated_delta_rule(q, k, v, beta, g)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **options: Any) -> Any:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    q, k = (unit(u) if options["use_qk_l2norm_in_kernel"] else u for u in (q, k))
    o_BHTV, _ = delta_rule_recurrence(*(u.transpose(1, 2) for u in (q, k, v, beta)))
    return o_BHTV.transpose(1, 2), None


def retention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Any:
    from fla.ops.retention.naive import naive_retention

    return naive_retention(*(u.transpose(1, 2) for u in (q, k, v))).transpose(1, 2), None


def gla_rule(q: Tensor, k: Tensor, v: Tensor, gk: Tensor, **_: Any) -> Any:
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q, k, v, gk)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
    assert causal
    new, back = q.shape[1], window_size[0]
    distance_TT = torch.arange(new)[:, None] - torch.arange(new)
    seen_TT = (distance_TT >= 0) & ((distance_TT <= back) if back >= 0 else True)
    k, v = (u.repeat_interleave(q.shape[2] // u.shape[2], dim=2) for u in (k, v))
    y_BHTV = F.scaled_dot_product_attention(*(u.transpose(1, 2) for u in (q, k, v)), attn_mask=seen_TT)
    return y_BHTV.transpose(1, 2)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    by_definitions(monkeypatch)


def by_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package compute by these definitions in place of its kernels."""
    from fla.layers import attn, delta_net, gated_deltanet, gla, multiscale_retention
    from fla.modules import FusedRMSNormGated, RMSNorm, RotaryEmbedding, ShortConvolution, mlp

    replace = monkeypatch.setattr  # which refuses a name that the package does not have
    replace(RMSNorm, "forward", rms_norm)
    replace(FusedRMSNormGated, "forward", rms_norm_gated)
    replace(ShortConvolution, "forward", convolution)
    replace(RotaryEmbedding, "forward", rotary)
    replace(mlp, "swiglu", lambda gate, y: F.silu(gate) * y)
    replace(gated_deltanet, "fused_recurrent_gated_delta_rule", gated_delta_rule)
    replace(gated_deltanet.GatedDeltaNet, "_use_fused_qkv_conv", lambda *_, **__: False)
    replace(delta_net, "fused_recurrent_delta_rule", delta_rule)
    replace(multiscale_retention, "fused_recurrent_retention", retention)
    replace(gla, "fused_recurrent_gla", gla_rule)
    replace(gla, "ACT2FN", {"swish": F.silu})
    replace(attn, "flash_attn_func", flash_attention)


def original(kind: str, **changes: Any) -> Any:
    config = getattr(models, f"{kind}Config")(**(SIZES | changes))
    return randomised(getattr(models, f"{kind}ForCausalLM"), config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "use_short_conv": True,
            "conv_size": 3,
            "tie_word_embeddings": True,
        },
        pytest.param(
            {"expand_k": 1.0, "elementwise_affine": False, "fuse_norm": True}, marks=pytest.mark.full
        ),
    ],
)
def test_gla(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(original("GLA", **changes), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_gate": True, "allow_neg_eigval": True, "use_short_conv": False},
        pytest.param({"qk_activation": "elu", "qk_norm": "sum", "conv_size": 3}, marks=pytest.mark.full),
    ],
)
def test_delta_net(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(original("DeltaNet", **changes), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_v_heads": 4},
        {"use_gate": False, "allow_neg_eigval": True, "use_short_conv": False, "expand_v": 1},
    ],
)
def test_gated_deltanet(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(original("GatedDeltaNet", head_dim=16, **changes), tmp_path)


@pytest.mark.claim("mixers/retnet.py", "flash-linear-attention's layer")
@pytest.mark.parametrize("changes", [{}, {"num_heads": 4, "num_kv_heads": 2, "expand_v": 1}])
def test_retnet(tmp_path: Path, changes: dict[str, Any]) -> None:
    check(original("RetNet", **changes), tmp_path)


def test_layers_of_softmax_attention(tmp_path: Path) -> None:
    attn = [
        {"layers": [0], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0},
        {"layers": [2], "num_heads": 2, "window_size": 5, "qkv_bias": True},
    ]
    model = check(original("GatedDeltaNet", head_dim=8, num_hidden_layers=3, attn=attn), tmp_path)
    assert [layer.name for layer in model.config.layers] == ["attention", "gated-delta-net", "sliding-window"]


def test_an_older_layout_has_gate_and_value_in_one_weight(tmp_path: Path) -> None:
    check(original("GLA"), tmp_path)
    newer = converted(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if "up_proj" in name]:
        gate = name.replace("up_proj", "gate_proj")
        weights[gate] = torch.cat((weights[gate], weights.pop(name)))
    save_file(weights, tmp_path / "model.safetensors")
    config_json = read_json(tmp_path / "config.json")
    config_json["rms_norm_eps"] = config_json.pop("norm_eps")
    write_json(tmp_path / "config.json", config_json | {"share_conv_kernel": True})
    older = converted(tmp_path)
    assert older.config == newer.config
    assert all(map(torch.equal, older.state_dict().values(), newer.state_dict().values()))


def converted(folder: Path) -> Model:
    with weights_in(folder) as weights:
        return foreign.built(*foreign.read(read_json(folder / "config.json"), weights, "here"), "here")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("GLA", "DeltaNet", "GatedDeltaNet", "RetNet")}
    for kind, folder in folders.items():
        original(kind, head_dim=8).save_pretrained(folder)
    return folders


SPEC = {"layers": [0], "num_heads": 2}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("GLA", "hidden_act", "gelu"),
        ("GLA", "clamp_min", -1.0),
        ("GLA", "feature_map", "relu"),
        ("GLA", "use_output_gate", False),
        ("GLA", "use_gk", False),
        ("GLA", "use_gv", True),
        ("GLA", "num_kv_heads", 3),
        ("GLA", "gate_low_rank_dim", 3),
        ("GLA", "attnres_block_size", 2),
        ("GLA", "attn", 3),
        ("GLA", "attn", SPEC | {"qk_norm": True}),
        ("GLA", "attn", SPEC | {"twist": 1}),
        ("GLA", "twist", 1),
        ("DeltaNet", "expand_k", 2.0),
        ("DeltaNet", "expand_v", 2.0),
        ("DeltaNet", "use_beta", False),
        ("DeltaNet", "use_output_norm", False),
        ("DeltaNet", "qk_activation", "relu"),
        ("DeltaNet", "qk_norm", "sum"),
        ("DeltaNet", "share_conv_kernel", True),
        ("GatedDeltaNet", "expand_v", 1.5),
        ("GatedDeltaNet", "output_gate_activation", "sigmoid"),
        ("RetNet", "expand_k", 0.5),
        ("RetNet", "expand_v", 1.5),
        ("RetNet", "feature_map", "relu"),
        ("RetNet", "use_output_gate", False),
        ("RetNet", "use_short_conv", True),
        ("RetNet", "num_kv_heads", 3),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(
    folders: dict[str, Path], kind: str, field: str, value: Any
) -> None:
    name = next(iter(value.keys() - SPEC.keys())) if isinstance(value, dict) else field
    assert f"{name} = " in refusal(folders[kind], **{field: value})
