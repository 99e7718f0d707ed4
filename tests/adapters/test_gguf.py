"""GGUF files: those that the package `gguf` writes of a model are that model again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import holdall
from holdall.adapters import foreign
from holdall.adapters.reading import ForeignError
from holdall.files import RunError

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401 - makes the submodules known
    return module


def original(transformers: ModuleType, kind: str, **options: Any) -> Any:
    config = getattr(transformers, f"{FAMILIES[kind]}Config")(**SIZES, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{FAMILIES[kind]}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """How llama.cpp stores queries and keys: rows 2f and 2f + 1 of a head are rows f and F + f of halves."""
    size = len(rows) // heads
    order = [
        h * size + f + half * size // 2 for h in range(heads) for f in range(size // 2) for half in (0, 1)
    ]
    return rows[order]


def byte_level() -> Any:
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>", "<|im_start|>"], show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["the dog sees that the cat sees the other dog"] * 4, trainer)
    return made


def write(
    model: Any,
    path: Path,
    *,
    stored: Callable[[str, np.ndarray], dict[str, Any]] = lambda name, values: {"tensor": values},
    kind: str | None = None,
    **changed: Any,
) -> Path:
    """A GGUF file of a model; `changed` adds to the metadata, or takes away with None."""
    config = model.config
    kind = kind or config.model_type
    writer = gguf.GGUFWriter(path, kind)
    made = byte_level()
    own = json.loads(made.to_str())["model"]
    words = sorted(own["vocab"], key=own["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in own["merges"]]
    metadata: dict[str, Any] = {
        f"{kind}.block_count": config.num_hidden_layers,
        f"{kind}.embedding_length": config.hidden_size,
        f"{kind}.feed_forward_length": config.intermediate_size,
        f"{kind}.context_length": 64,
        f"{kind}.attention.head_count": config.num_attention_heads,
        f"{kind}.attention.head_count_kv": config.num_key_value_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{kind}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{kind}.rope.dimension_count": config.head_dim if kind != "qwen2" else 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(words) - 2),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }
    if kind == "qwen3":
        metadata |= {f"{kind}.attention.key_length": 8, f"{kind}.attention.value_length": 8}
    for name, value in {**metadata, **changed}.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if config.rope_parameters["rope_type"] == "llama3":
        plain = 500_000.0 ** (-torch.arange(0, 8, 2) / 8)
        weights["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq
    for name, tensor in weights.items():
        *where, module, what = name.split(".")
        if kind == "llama" and module in ("q_proj", "k_proj"):
            tensor = interleaved(tensor, 4 if module == "q_proj" else 2)
        block = f"blk.{where[2]}." if "layers" in where else ""
        theirs = f"{block}{NAMES.get(module, module)}.{what}"
        writer.add_tensor(theirs, **stored(theirs, tensor.contiguous().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3": ("llama", {"rope_parameters": LLAMA_3, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_the_original(transformers: ModuleType, name: str, tmp_path: Path) -> None:
    kind, options = MODELS[name]
    model = original(transformers, kind, **options)
    got = holdall.load(write(model, tmp_path / "a.gguf"))
    tokens_BT = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    want = model(tokens_BT, use_cache=False).logits
    # scales, bases and epsilons are stored in fp32
    torch.testing.assert_close(got.model(tokens_BT)[0], want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert (got.config.layers[0].rotary_scaling != ()) == (name == "llama 3")  # type: ignore[attr-defined]


@torch.no_grad()
def test_a_factor_of_frequencies_is_linear_where_no_kind_is_named(
    transformers: ModuleType, tmp_path: Path
) -> None:
    model = original(transformers, "llama")
    got = holdall.load(write(model, tmp_path / "a.gguf", **{"llama.rope.scaling.factor": 4.0}))
    assert got.config.layers[0].rotary_scaling == (4.0,)  # type: ignore[attr-defined]


def test_quantised_tensors_are_the_numbers_they_stand_for(transformers: ModuleType, tmp_path: Path) -> None:
    model = original(transformers, "qwen2")
    types = {"attn_output": "Q8_0", "ffn_up": "F16", "ffn_gate": "BF16", "ffn_down": "Q4_1"}

    def stored(name: str, values: np.ndarray) -> dict[str, Any]:
        kind = types.get(name.split(".")[-2])
        if kind is None:
            return {"tensor": values}
        if kind == "F16":
            return {"tensor": values.astype(np.float16)}
        form = gguf.GGMLQuantizationType[kind]
        return {"tensor": gguf.quants.quantize(values, form), "raw_dtype": form}

    tensors = holdall.load(write(model, tmp_path / "a.gguf", stored=stored)).model.state_dict()
    theirs = model.state_dict()
    up, gate = tensors["blocks.0.mlp.fc1.weight"].chunk(2)
    for name, got in (("up", up), ("gate", gate), ("down", tensors["blocks.0.mlp.fc2.weight"])):
        want = theirs[f"model.layers.0.mlp.{name}_proj.weight"]
        narrow = {"up": torch.float16, "gate": torch.bfloat16}.get(name)
        if narrow is not None:
            assert torch.equal(got, want.to(narrow).float())
        else:  # 16 levels between the least and the largest of 32 values
            steps = (want.unflatten(1, (-1, 32)).amax(2) - want.unflatten(1, (-1, 32)).amin(2)) / 15
            assert ((got - want).unflatten(1, (-1, 32)).abs() < 0.51 * steps[..., None]).all()
            assert not torch.equal(got, want)
    got, want = tensors["blocks.0.mixer.out_proj.weight"], theirs["model.layers.0.self_attn.o_proj.weight"]
    largest = want.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
    assert ((got - want).unflatten(1, (-1, 32)).abs() < 0.6 / 127 * largest).all()  # scales are in fp16


def test_the_tokenizer_is_made_of_the_metadata(transformers: ModuleType, tmp_path: Path) -> None:
    model = holdall.load(write(original(transformers, "llama"), tmp_path / "a.gguf"))
    tokenizer, made = model.tokenizer, byte_level()
    assert (tokenizer.end, tokenizer.begin) == (0, 1)
    text = "the other cat's 12 dögs  see"
    ids = tokenizer.encode_batch([text])[0].tolist()
    assert ids == made.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(tokenizer.encode_batch(["<|im_start|><|endoftext|>"])[0].tolist())
    model.save(tmp_path / "saved")
    again = holdall.load(tmp_path / "saved")
    assert again.tokenizer.describe() == tokenizer.describe()
    assert again.generate("the dog", max_tokens=5) == model.generate("the dog", max_tokens=5)


@pytest.mark.parametrize(("said", "begin"), [(True, 1), (False, 0)])
def test_a_token_that_is_put_before_no_text_begins_no_document(
    transformers: ModuleType, said: bool, begin: int, tmp_path: Path
) -> None:
    changed = {"tokenizer.ggml.add_bos_token": said}
    tokenizer = holdall.load(write(original(transformers, "llama"), tmp_path / "a.gguf", **changed)).tokenizer
    assert (tokenizer.end, tokenizer.begin) == (0, begin)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"llama.expert_count": 8}, "llama.expert_count = 8"),
    ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4"),
    ({"llama.attention.value_length": 4}, "llama.attention.value_length = 4"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
    ({"llama.attention.sliding_window": 8}, "has llama.attention.sliding_window = 8"),
    ({"llama.vocab_size": 7}, "llama.vocab_size = 7"),
    ({"llama.embedding_length": None}, "no field 'llama.embedding_length'"),
    ({"split.count": 2}, "split.count = 2"),
    ({"kind": "mamba"}, "general.architecture = 'mamba'"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model = 'llama' .* --tokenizer"),
    ({"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre = 'tekken' .* --tokenizer"),
    ({"tokenizer.ggml.eos_token_id": 999}, "no token with the id 999"),
    ({"tokenizer.ggml.add_bos_token": "no"}, "tokenizer.ggml.add_bos_token = 'no'"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_what_cannot_be_represented_is_refused_by_name(
    transformers: ModuleType, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(original(transformers, "llama"), tmp_path / "a.gguf", **changed)
    with pytest.raises(ForeignError, match=message):
        foreign.load(path)


def test_other_scales_of_frequencies_are_refused(transformers: ModuleType, tmp_path: Path) -> None:
    model = original(transformers, "llama", rope_parameters={**LLAMA_3, "low_freq_factor": 2.0})
    with pytest.raises(ForeignError, match=r"rope_freqs\.weight cannot be represented"):
        foreign.load(write(model, tmp_path / "a.gguf"))


def test_bytes_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(RunError, match=r"a\.gguf.*no GGUF file"):
        holdall.load(path)
    with pytest.raises(RunError, match="there is no file"):
        holdall.load(tmp_path / "b.gguf")
