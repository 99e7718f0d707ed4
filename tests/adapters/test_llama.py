"""Llama and its kin against `transformers`: the same logits, pieces and greedy text; the rest is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from adapters.parity import check, converted

from holdall.adapters import foreign
from holdall.adapters.reading import ForeignError, Weights
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        import transformers.models.gemma.modeling_gemma
        import transformers.models.llama.modeling_llama
        import transformers.models.mistral.modeling_mistral
        import transformers.models.qwen2.modeling_qwen2
        import transformers.models.qwen3.modeling_qwen3
        import transformers.models.smollm3.modeling_smollm3  # noqa: F401 - makes the submodules known
    return module


SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with all it can have": (
        "Llama",
        {
            "head_dim": 10, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA_3,
            "tie_word_embeddings": True, "rms_norm_eps": 1e-3,
        },
    ),
    "llama, linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with windows": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "gemma": ("Gemma", {"head_dim": 8}),
}  # fmt: skip


def made(transformers: ModuleType, name: str, **options: Any) -> Any:
    """A model with weights that are all unlike zero and one."""
    family, own = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **own, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # of few bits, as in released files, so that 1 + w is exact in fp32
            parameter.add_((0.1 * torch.randn(parameter.shape)).bfloat16())
    return model


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_original(transformers: ModuleType, name: str, tmp_path: Path) -> None:
    model = check(made(transformers, name), tmp_path)
    kinds = [type(layer) for layer in model.config.layers]
    windows = name == "mistral", name in ("mistral", "qwen2 with windows")
    assert kinds == [SlidingWindowConfig if window else AttentionConfig for window in windows]


def test_a_config_as_before_version_5_says_the_same(transformers: ModuleType, tmp_path: Path) -> None:
    """rope_theta outside, rope_scaling beside it, and "type" for "rope_type"."""
    original = made(transformers, "llama with all it can have")
    config = original.config.to_diff_dict()
    weights = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    del weights["lm_head.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)  # of even older files
    scaling = dict(config.pop("rope_parameters"))
    config["rope_theta"], scaling["type"] = scaling.pop("rope_theta"), scaling.pop("rope_type")
    got, tensors = foreign.read({**config, "rope_scaling": scaling}, Weights(weights, "w"), "config.json")
    want = converted(original, tmp_path)
    assert got == want.config
    assert all(torch.equal(tensors[name], tensor) for name, tensor in want.state_dict().items())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type = 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "rope_scaling .* has x = 1"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling .* no field 'factor'"),
    ("llama", {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, "rope_theta = 6.0"),
    ("llama", {"rope_parameters": {}, "rope_scaling": {"factor": 1.0}}, "rope_scaling = "),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved = True"),
    ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    (
        "llama",
        {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
        "num_attention_heads = 5",
    ),
    ("llama", {"num_key_value_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
    ("llama", {"attention_bias": 1}, "attention_bias = 1"),
    ("llama", {"mlp_bias": "yes"}, "mlp_bias = 'yes'"),
    ("llama", {"head_dim": 7}, "even number"),
    ("llama", {"quantization_config": {"bits": 4}}, "has quantization_config = "),
    ("llama", {"attention_multiplier": 0.1}, "has attention_multiplier = 0.1"),
    ("llama", {"rms_norm_eps": "small"}, "small"),
    ("mistral", {"sliding_window": 1}, "sliding_window = 1"),
    ("mistral", {"attention_bias": True}, "has attention_bias = True"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "has layer_types"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types = "),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["x", "y"]}, "layer_types = "),
    ("qwen2", {"use_mrope": True}, "use_mrope = True"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers = \[1\]"),
    ("smollm3", {"use_sliding_window": True}, "use_sliding_window = True"),
    ("gemma", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
]


@pytest.fixture(scope="module")
def originals(transformers: ModuleType) -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Fields and weights of models that can be represented, by kind."""
    models = {kind: made(transformers, kind) for kind in ("llama", "mistral", "qwen2", "smollm3", "gemma")}
    return {kind: (model.config.to_diff_dict(), model.state_dict()) for kind, model in models.items()}


@pytest.mark.parametrize(("kind", "changed", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(
    originals: Any, kind: str, changed: dict[str, Any], message: str
) -> None:
    fields, weights = originals[kind]
    foreign.read(fields, Weights(weights, "model.safetensors"), "config.json")
    if "rope_scaling" in changed and "rope_parameters" not in changed:
        fields = {name: value for name, value in fields.items() if name != "rope_parameters"}
    with pytest.raises(ForeignError, match=message):
        foreign.read({**fields, **changed}, Weights(weights, "model.safetensors"), "config.json")


def test_a_head_that_should_be_the_embedding_and_is_not_is_refused(
    transformers: ModuleType, tmp_path: Path
) -> None:
    original = made(transformers, "qwen3")
    weights = dict(original.state_dict())
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ForeignError, match="ties the head to the embedding, but lm_head"):
        foreign.read(original.config.to_diff_dict(), Weights(weights, "w"), "config.json")


def test_a_window_that_is_left_out_is_the_library_s(transformers: ModuleType) -> None:
    """Which is another thing than null, no window."""
    original = made(transformers, "mistral")
    fields = {**original.config.to_dict(), "sliding_window": None}
    config, _ = foreign.read(fields, Weights(original.state_dict(), "w"), "config.json")
    assert all(type(layer) is AttentionConfig for layer in config.layers)
    del fields["sliding_window"]
    config, _ = foreign.read(fields, Weights(original.state_dict(), "w"), "config.json")
    want = type(original.config)().sliding_window
    assert [layer.window for layer in config.layers] == [want, want]  # type: ignore[attr-defined]
