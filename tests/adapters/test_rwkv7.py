"""RWKV-7 of flash-linear-attention against the package's own class.

Its kernels need a GPU. Here plain PyTorch stands in for them: the package's references where it has some, and
norms, removal keys and squared ReLU written out.

Letters: B row, T time, D width, H heads, K dims of a head.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters import test_fla
from adapters.originals import fla_models, randomised, refusal
from adapters.parity import check, converted, show_errors
from safetensors.torch import load_file, save_file
from torch import Tensor

from holdall.adapters import foreign
from holdall.adapters.reading import weights_in
from holdall.files import read_json, write_json
from holdall.mixers.rwkv_7 import RWKV7Config

models = fla_models()

# the package advises against what is tested here
pytestmark = pytest.mark.filterwarnings("ignore:According to Bo")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "head_dim": 16, "num_hidden_layers": 3, "intermediate_size": 40, "vocab_size": 61,
    "decay_low_rank_dim": 5, "gate_low_rank_dim": 6, "a_low_rank_dim": 3, "v_low_rank_dim": 4,
    "fuse_norm": False,
}  # fmt: skip


def layer_norm(self: Any, x: Tensor, residual: Tensor | None = None, prenorm: bool = False) -> Any:
    x = x if residual is None else x + residual
    y = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
    return (y, x) if prenorm else y


def group_norm(self: Any, x: Tensor) -> Tensor:
    y = F.group_norm(x.flatten(0, 1), self.num_groups, self.weight, self.bias, self.eps)
    return y.view(x.shape)


def token_shift(
    x: Tensor, cu_seqlens: None, *, output_cache: bool, cache: None = None
) -> tuple[Tensor, None]:
    from fla.modules.token_shift import token_shift_ref

    assert output_cache
    assert cache is None
    return token_shift_ref(x, cu_seqlens), None


def rule(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, scale: float, **_: Any) -> Any:
    """By the package's recurrence, whose query is divided by the root of its size."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    heads_first = [u.transpose(1, 2) for u in (r * (scale * r.shape[-1] ** 0.5), k, v, a, b, w)]
    return dplr_recurrence(*heads_first)[0].transpose(1, 2), None


def removing(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, **how: Any
) -> tuple[Tensor, None]:
    return rule(r, w, k, v, -kk, kk * a, **how)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    by_definitions(monkeypatch)


def by_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package compute by these definitions in place of its kernels."""
    from fla.layers import rwkv7 as layer
    from fla.models.rwkv7 import modeling_rwkv7 as modeling
    from fla.modules import GroupNorm, LayerNorm
    from fla.ops.rwkv7 import fused_addcmul, fused_k_update, gate_output_correction

    replace = monkeypatch.setattr  # which refuses a name that the package does not have
    for module in (layer, modeling):
        replace(module, "token_shift", token_shift)
    replace(layer, "fused_addcmul_rwkv7", fused_addcmul.torch_addcmul_rwkv7)
    replace(layer, "fused_k_rwkv7", fused_k_update.k_update_ref)
    replace(layer, "gate_output_correction", gate_output_correction.gate_output_correction_ref)
    replace(layer, "l2_norm", test_fla.unit)
    replace(layer, "chunk_rwkv7", rule)
    replace(layer, "fused_mul_recurrent_rwkv7", removing)
    replace(modeling, "ACT2FN", {"sqrelu": lambda x: F.relu(x).square()})
    replace(LayerNorm, "forward", layer_norm)
    replace(GroupNorm, "forward", group_norm)


def original(**changes: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomised(models.RWKV7ForCausalLM, models.RWKV7Config(**(SIZES | changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # keys so short that what its kernel adds to their square shows
        {"fuse_norm": True, "norm_eps": 1e-3, "head_dim": 4},
        {"norm_first": False, "tie_word_embeddings": True, "norm_bias": False, "num_hidden_layers": 2},
        pytest.param({"tie_word_embeddings": True}, marks=pytest.mark.full),
        pytest.param({"head_dim": None, "num_heads": 4, "value_dim": 32}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_it_is_what_it_was_there(changes: dict[str, Any], tmp_path: Path) -> None:
    model = check(original(**changes), tmp_path)
    ranks = [layer.value_rank for layer in model.config.layers if isinstance(layer, RWKV7Config)]
    assert ranks == [0] + [4] * (changes.get("num_hidden_layers", 3) - 1)


def read(folder: Path) -> Any:
    with weights_in(folder) as weights:
        return foreign.built(*foreign.read(read_json(folder / "config.json"), weights, "here"), "here")


def test_an_older_layout_has_the_mixes_in_one_weight(tmp_path: Path) -> None:
    newer = converted(original(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for index in range(3):
        there = f"model.layers.{index}.attn"
        weights[f"{there}.x_x"] = torch.stack([weights.pop(f"{there}.x_{z}").flatten() for z in "rwkvag"])
    save_file(weights, tmp_path / "model.safetensors")
    config_json = read_json(tmp_path / "config.json")
    for field in ("value_dim", "num_heads", "use_l2warp"):  # which it had not yet
        del config_json[field]
    write_json(tmp_path / "config.json", config_json | {"_attn_implementation_autoset": True})
    older = read(tmp_path)
    assert older.config == newer.config
    assert all(map(torch.equal, older.state_dict().values(), newer.state_dict().values()))


def test_a_mix_in_16_bits_loses_nothing(tmp_path: Path) -> None:
    """Ours is one minus theirs, which 16 bits would round away where theirs is small."""
    model = original()
    with torch.no_grad():
        model.model.layers[1].ffn.x_k.fill_(2**-12)
    model.bfloat16().save_pretrained(tmp_path)
    assert torch.equal(read(tmp_path).mixers[3].time_mix_ZD, torch.full((1, 32), 1 - 2**-12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rwkv7")
    original().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "relu"),
        ("attn", {"layers": [1], "num_heads": 2}),
        ("value_dim", [32, 64, 64]),
        ("value_dim", 64),
        ("head_dim", 5),
        ("norm_bias", "yes"),
        ("norm_first", 1),
        ("fuse_norm", 2),
        ("decay_low_rank_dim", 4),
        ("gate_low_rank_dim", 4),
        ("a_low_rank_dim", 4),
        ("v_low_rank_dim", 5),
        ("tie_word_embeddings", "no"),
        ("twist", 1),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(folder: Path, field: str, value: Any) -> None:
    assert f"{field} = " in refusal(folder, **{field: value})


def test_heads_by_their_number_must_divide_the_width(folder: Path) -> None:
    assert "num_heads = 5" in refusal(folder, num_heads=5, head_dim=None)


def test_a_weight_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.attn.v_lora.lora.0.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", read_json(folder / "config.json"))
    assert "'model.layers.1.attn.v_lora.lora.0.weight'" in refusal(tmp_path)


def test_layers_of_softmax_attention_fail_in_the_package_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """So there is nothing to hold a converted one to."""
    test_fla.by_definitions(monkeypatch)
    model = original(attn={"layers": [1], "num_heads": 2})
    with pytest.raises(ValueError, match="not enough values to unpack"):
        model(torch.zeros(1, 3, dtype=torch.long), use_cache=False)


if __name__ == "__main__":  # PYTHONPATH=.:tests python -m adapters.test_rwkv7
    with pytest.MonkeyPatch.context() as patch:
        by_definitions(patch)
        show_errors("rwkv7", original())
