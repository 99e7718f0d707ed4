"""GGUF files, as llama.cpp and its kin run them: Llama's and Qwen's architectures, in any quantisation.

The metadata become the fields of a config.json and the tensors those of the `transformers` library, which
llama.py reads. Quantised tensors become the numbers that they stand for, in fp32. Llama's queries and keys
are stored with pairs (0, 1), (2, 3), ... to be turned; their rows are put back to halves.

Facts: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md) and the package `gguf`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdall import files
from holdall.adapters.reading import Fields, ForeignError, Weights
from holdall.ops.rotary import standard_frequencies
from holdall.text.sources import needed
from holdall.text.tokenizers import Filed, Tokenizer

INTERLEAVED = {"llama": True, "qwen2": False, "qwen3": False}
"""The architectures that are read, and whether their pairs to turn are neighbours."""
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
"""Names of a layer's tensors, and those of the `transformers` library."""
LLAMA_3 = (1.0, 4.0, 8192.0)
"""Llama 3's low and high frequency factors and its first context; a file has only what they make of it."""

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
WORDS = (
    rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}DIGITS| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen split a text into words; they differ in how many digits stand together."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Any], Weights, Callable[[], Tokenizer]]]:
    """The fields of a config.json, the weights by the names of `transformers`, and the tokenizer's reader.

    Raises ForeignError for what cannot be represented and RunError for a file that is damaged.
    """
    library = needed("gguf")
    if not path.is_file():
        raise files.RunError(f"there is no file {path}")
    try:
        reader = library.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        sources = {tensor.name: _source(tensor, library, path) for tensor in reader.tensors}
    except Exception as error:  # whatever the package makes of bytes that are no GGUF
        raise files.damaged(path, f"it is no GGUF file ({type(error).__name__}: {error})") from error
    fields, weights = Fields(metadata, str(path)), Weights(sources, str(path))
    config_json = _config(fields, weights)
    fields.finish()
    yield config_json, _renamed(config_json, weights), lambda: tokenizer_of(metadata, str(path))


def _source(tensor: Any, library: Any, path: Path) -> Callable[[], Tensor]:
    """What reads a tensor: fp16 and bf16 as they are, all others in fp32."""

    def read() -> Tensor:
        kind = tensor.tensor_type.name
        try:
            if kind == "F16":
                return torch.tensor(tensor.data)
            values = torch.from_numpy(library.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError as error:
            raise ForeignError(f"{path}: {tensor.name} is of type {kind}, which cannot be read") from error
        return values.bfloat16() if kind == "BF16" else values

    return read


def _config(fields: Fields, weights: Weights) -> dict[str, Any]:
    """The metadata as the fields of config.json; all that say something of the model are taken."""
    kind = fields.only("general.architecture", *INTERLEAVED)
    for name in fields.names:
        if name.startswith(("general.", "GGUF.", "tokenizer.", "quantize.")):
            fields.ignore(name)
    fields.only("split.count", 0, 1, default=0)
    fields.ignore("split.no", "split.tensors.count", f"{kind}.context_length")
    fields.only(f"{kind}.expert_count", 0)
    fields.only(f"{kind}.expert_used_count", 0)

    width = fields.number(f"{kind}.embedding_length")
    heads = fields.number(f"{kind}.attention.head_count")
    head_dim = fields.number(f"{kind}.attention.key_length", width // max(1, heads))
    fields.only(f"{kind}.attention.value_length", head_dim)
    fields.only(f"{kind}.rope.dimension_count", head_dim)
    base = float(fields.take(f"{kind}.rope.freq_base", 10000.0))
    vocab = weights.look("token_embd.weight").shape[0]
    config_json = {
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": fields.number(f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.number(f"{kind}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": fields.number(f"{kind}.feed_forward_length"),
        "rms_norm_eps": fields.take(f"{kind}.attention.layer_norm_rms_epsilon"),
        "vocab_size": fields.only(f"{kind}.vocab_size", vocab),
        "tie_word_embeddings": "output.weight" not in weights,
        "rope_parameters": {"rope_theta": base, **_scaling(fields, kind, weights, base, head_dim)},
        "bos_token_id": _begin(fields),
        "eos_token_id": fields.take("tokenizer.ggml.eos_token_id", None),
    }
    if kind == "llama":
        config_json["attention_bias"] = "blk.0.attn_output.bias" in weights
    return config_json


def _begin(fields: Fields) -> int | None:
    """The token that a document begins with; None for the one that ends it, which in training stood there.

    A file whose `add_bos_token` is false says that its `bos_token_id` is put before no text.
    """
    begins = fields.only("tokenizer.ggml.add_bos_token", True, False)
    named: int | None = fields.take("tokenizer.ggml.bos_token_id", None)
    return named if begins else None


def _scaling(fields: Fields, kind: str, weights: Weights, base: float, head_dim: int) -> dict[str, Any]:
    """The scaling of rotary frequencies: by the metadata, or Llama 3's by a tensor of what divides them."""
    factor = float(fields.take(f"{kind}.rope.scaling.factor", 1.0))
    # llama.cpp's default, where there is a factor
    form = fields.only(
        f"{kind}.rope.scaling.type", "none", "linear", default="linear" if factor != 1 else "none"
    )
    fields.ignore(f"{kind}.rope.scaling.finetuned", f"{kind}.rope.scaling.original_context_length")
    if "rope_freqs.weight" not in weights:
        return {"rope_type": "linear", "factor": factor} if form == "linear" else {}
    divides_F = weights.take("rope_freqs.weight").double()
    low, high, context = LLAMA_3
    factor = round(float(divides_F.max()), 4)
    ours_F, plain_F = (
        standard_frequencies(head_dim, base, divides_F, scaling)
        for scaling in ((factor, low, high, context), ())
    )
    same = divides_F.shape == plain_F.shape and torch.allclose(plain_F / ours_F, divides_F, rtol=1e-5)
    if form != "none" or not same:
        raise ForeignError(
            f"{fields.where}: rope_freqs.weight cannot be represented; it must be Llama 3's, for {LLAMA_3}"
        )
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }  # fmt: skip


def _renamed(config_json: Mapping[str, Any], weights: Weights) -> Weights:
    """The tensors by the names of `transformers`, Llama's queries and keys in halves."""
    names = {
        "token_embd.": "model.embed_tokens.",
        "output_norm.": "model.norm.",
        "output.": "lm_head.",
    }
    for depth in range(config_json["num_hidden_layers"]):
        names |= {f"blk.{depth}.{theirs}.": f"model.layers.{depth}.{ours}." for theirs, ours in LAYER.items()}
    weights.rename(names)
    if INTERLEAVED[config_json["model_type"]]:
        heads = {
            "q_proj": config_json["num_attention_heads"], "k_proj": config_json["num_key_value_heads"]
        }  # fmt: skip
        for name in weights.names:
            if count := heads.get(name.split(".")[-2]):
                weights.change(name, functools.partial(in_halves, heads=count))
    return weights


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """The rows of each head, of which neighbours are a pair, so that the pairs are (0, F), (1, F + 1), ..."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# --------------------------------------------------------------------------------------------- tokenizer


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer in a file's metadata, as a file of the `tokenizers` library; byte-level BPE only."""
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    way_out = "Give the model's own: --tokenizer FILE"
    if kind != "gpt2":
        raise ForeignError(f"{where}: tokenizer.ggml.model = {kind!r} cannot be read, only 'gpt2'. {way_out}")
    if split not in SPLITS:
        raise ForeignError(
            f"{where}: tokenizer.ggml.pre = {split!r} cannot be read, only {', '.join(SPLITS)}. {way_out}"
        )
    words: Any = metadata.get("tokenizer.ggml.tokens")
    merges: Any = metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type") or []
    if not _are_words(words) or not _are_words(merges) or len(types) not in (0, len(words)):
        raise files.damaged(where, "its tokenizer has no tokens, merges and types that fit together")
    file = json.dumps(_library_file(words, merges, types, split), ensure_ascii=False)
    return Filed(file.encode(), files.encodable(Path(where).stem), where)


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False
    }  # fmt: skip


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex
    }  # fmt: skip


SPLITS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "gpt-2": ([_bytes(True)], {}),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _bytes(True)], {}),
    "llama-bpe": ([_split(WORDS.replace("DIGITS", "{1,3}")), _bytes(False)], {"ignore_merges": True}),
    "qwen2": ([_split(WORDS.replace("DIGITS", "")), _bytes(False)], {"normalizer": {"type": "NFC"}}),
}
"""By the name in the metadata how a text is split into words before merges, and what else is special."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that no merge makes: control tokens are in no text."""


def _library_file(
    words: Sequence[str], merges: Sequence[str], types: Sequence[int], split: str
) -> dict[str, Any]:
    parts, more = SPLITS[split]
    added = [
        {
            "id": i, "content": words[i], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == CONTROL,
        }
        for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": more.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else parts[0],
        "post_processor": None,
        "decoder": _bytes(True),
        "model": {
            "type": "BPE",
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": [merge.split(" ", 1) for merge in merges],
            "ignore_merges": more.get("ignore_merges", False),
        },
    }
