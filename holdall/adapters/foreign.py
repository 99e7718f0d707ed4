"""Models of other programs: which family reads them, and how they become a language model.

    load("folder")              a LanguageModel, as `holdall.load` gives it
    convert("folder", "out")    the same as a folder of Holdall's own
    load_any("folder")          of Holdall's own or of another program

A family is one function, of the fields of config.json and the weights, that returns a ModelConfig and the
weights by Holdall's names: `FAMILIES` says in which file. It takes every field and weight that it knows;
those that are left are refused by name.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdall import files, language_model
from holdall.adapters.reading import Fields, ForeignError, Weights, weights_in
from holdall.contract import did_you_mean
from holdall.files import RunError
from holdall.language_model import CONFIG, TOKENIZER, Checkpoint, LanguageModel
from holdall.model import Model, ModelConfig, seeded
from holdall.precision import compute_in
from holdall.text import tokenizers
from holdall.text.files import TextError
from holdall.text.tokenizers import Filed, Tokenizer

GGUF = ".gguf"
Family = Callable[[Fields, Weights], tuple[ModelConfig, dict[str, Tensor]]]

FAMILIES: dict[str, str] = {
    "delta_net": "fla.delta_net",
    "falcon_mamba": "mamba.falcon_mamba",
    "flash-attention-gpt": "hazy.gpt",
    "gated_deltanet": "fla.gated_deltanet",
    "gemma": "llama.gemma",
    "gla": "fla.gla",
    "gpt2": "gpt2.gpt2",
    "holdall": "exported.holdall",
    "lfm2": "lfm2.lfm2",
    "llama": "llama.llama",
    "mamba": "mamba.mamba",
    "mamba-ssm": "hazy.mamba",
    "mamba2": "mamba.mamba2",
    "mistral": "llama.mistral",
    "olmo_hybrid": "olmo_hybrid.olmo_hybrid",
    "qwen2": "llama.qwen2",
    "qwen3": "llama.qwen3",
    "qwen3_5": "qwen.qwen3_5",
    "qwen3_5_text": "qwen.qwen3_5_text",
    "qwen3_next": "qwen.qwen3_next",
    "recurrent_gemma": "recurrent_gemma.recurrent_gemma",
    "retnet": "fla.retnet",
    "rwkv": "rwkv.rwkv",
    "rwkv7": "rwkv7.rwkv7",
    "smollm3": "llama.smollm3",
}
"""The function that reads a kind of model, as "file.function" in this room, by what `kind_of` gives."""


def kind_of(config_json: Mapping[str, Any]) -> str:
    """The kind of model that a config.json describes; empty if it describes none.

    That is its `model_type`, as the `transformers` library writes it. But flash-attention's GPT says "gpt2",
    whose fields it has and more, and the mamba_ssm package says nothing.
    """
    kind = config_json.get("model_type")
    if isinstance(config_json.get("mixer"), dict) or "rotary_emb_fraction" in config_json:
        return "flash-attention-gpt"
    if kind is None and "ssm_cfg" in config_json:
        return "mamba-ssm"
    return kind if isinstance(kind, str) else ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An open model of another program: what a family reads, and its tokenizer."""

    config_json: Mapping[str, Any]
    """The fields, as config.json has them."""
    where: str
    """What errors call the place of the fields."""
    weights: Weights
    tokenizer: Callable[[], Tokenizer]
    """Reads the tokenizer that is beside the weights. Raises RunError if there is none."""


def is_foreign(path: Path) -> bool:
    """Whether a folder or file is of another program: a GGUF file, or a folder whose config.json describes a
    kind of model, and none of Holdall's."""
    if path.suffix == GGUF:
        return True
    file = path / CONFIG
    if not file.is_file():
        return False
    config_json = read_config(file)
    return "model" not in config_json and bool(kind_of(config_json))


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds. Raises RunError.

    It may say Infinity, which is Python's JSON: `transformers` wrote it up to its version 4, as a limit of
    Mamba-2's step sizes.
    """
    return files.parse_json(files.read_bytes(path), path, constants=True)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Source]:
    """A model of another program, whose tensors are read when they are taken."""
    if path.suffix == GGUF:
        from holdall.adapters import gguf

        with gguf.opened(path) as (config_json, weights, tokenizer):
            yield Source(
                config_json=config_json,
                where=str(path),
                weights=weights,
                tokenizer=lambda: with_ends(tokenizer(), config_json, str(path)),
            )
        return
    config_json = read_config(path / CONFIG)
    with weights_in(path) as weights:
        yield Source(
            config_json=config_json,
            where=str(path / CONFIG),
            weights=weights,
            tokenizer=lambda: _tokenizer(path / TOKENIZER, config_json, str(path / CONFIG)),
        )


def load_any(
    path: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    checkpoint: Checkpoint | None = None,
    tokenizer: str | Path | None = None,
) -> LanguageModel:
    """A language model from a folder of Holdall's or of another program; see `holdall.load`."""
    if path is None or not is_foreign(Path(path)):
        if tokenizer is not None:
            raise ValueError(f"{path} has its own tokenizer; one is named only for models of other programs")
        return language_model.load(path, dtype=dtype, device=device, checkpoint=checkpoint)
    if checkpoint is not None:
        raise ValueError(f"{path} is a model of another program and has one checkpoint, not {checkpoint!r}")
    return load(path, tokenizer=tokenizer, dtype=dtype, device=device)


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    on_take: Callable[[str, int, int], object] = lambda name, done, of: None,
) -> LanguageModel:
    """A language model from a folder or file of another program.

    Args:
        path: a folder as `transformers` writes it (config.json, weights, tokenizer.json), or a GGUF file.
        tokenizer: a tokenizer.json, where there is none beside the weights.
        dtype: what the blocks compute in; fp32 by default.
        device: where the model is to be; the CPU by default.
        on_take: called before each tensor is read, with its name, how many were, and of how many.

    Raises ForeignError, naming the field or weight that cannot be represented, and RunError.
    """
    return _load(Path(path), tokenizer, dtype, device, on_take)[0]


def _load(
    path: Path,
    tokenizer: str | Path | None,
    dtype: str | torch.dtype | None,
    device: torch.device | str | None,
    on_take: Callable[[str, int, int], object],
) -> tuple[LanguageModel, set[torch.dtype]]:
    """The model, and the dtypes of its tensors in the file."""
    asked = None if dtype is None else language_model.float_dtype(dtype)
    target = language_model.available_device(device)
    with opened(path) as source:
        family_of(source.config_json, source.where)  # refused before anything is read
        count = len(source.weights.names)
        source.weights.on_take = lambda name: on_take(name, count - len(source.weights.names), count)
        made = source.tokenizer() if tokenizer is None else _tokenizer(
            Path(tokenizer), source.config_json, source.where
        )  # fmt: skip
        config, tensors = read(source.config_json, source.weights, source.where)
        model = built(config, tensors, str(path))
    if asked is not None:
        compute_in(asked, model)
    try:
        return LanguageModel(model.to(target).eval(), made), source.weights.dtypes
    except ValueError as error:  # a tokenizer of another model
        raise ForeignError(f"{path}: {error}") from error


def convert(
    path: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    on_take: Callable[[str, int, int], object] = lambda name, done, of: None,
) -> LanguageModel:
    """Write a model of another program as a folder of Holdall's own.

    Args:
        path, tokenizer, on_take: as in `load`.
        out: the folder, which is made, or is there and empty.
        dtype: that weights are written in; by default the narrowest that the file's weights are in and that
            loses nothing of the converted ones.

    Raises as `load`, and RunError if the folder holds anything.
    """
    model, dtypes = _load(Path(path), tokenizer, None, None, on_take)
    model.save(out, dtype=dtype or _lossless(model.model, dtypes))
    return model


def _lossless(model: Model, dtypes: set[torch.dtype]) -> torch.dtype:
    """The narrowest of these dtypes that holds every weight exactly, or fp32.

    A conversion may need more digits than the file had: of a norm that multiplies by 1 + w, the sum.
    """
    for dtype in sorted(dtypes, key=lambda dtype: dtype.itemsize):
        narrow = dtype.is_floating_point and dtype.itemsize == 2
        if narrow and all(torch.equal(p.to(dtype).float(), p) for p in model.state_dict().values()):
            return dtype
    return torch.float32


def read(
    config_json: Mapping[str, Any], weights: Weights, where: str
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights of a model, by Holdall's names; what it has was all taken, or is refused."""
    fields = Fields(config_json, where)
    family = family_of(config_json, where)
    try:
        config, tensors = family(fields, weights)
    except (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError) as error:
        # fields of the wrong kind, that a config refuses together, or that do not fit the weights
        raise ForeignError(f"{where} cannot be represented: {error}") from error
    fields.finish()
    weights.finish()
    return config, tensors


def family_of(config_json: Mapping[str, Any], where: str) -> Family:
    """The function that reads such a model; refused by name if there is none."""
    kind = kind_of(config_json)
    if kind not in FAMILIES:
        raise ForeignError(
            f"{where}: model_type = {kind!r} is no kind of model that Holdall reads. "
            f"{did_you_mean(kind, sorted(FAMILIES))}"
        )
    file, _, function = FAMILIES[kind].partition(".")
    return getattr(importlib.import_module(f"holdall.adapters.{file}"), function)


def built(config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> Model:
    """The model with these weights, in fp32."""
    with seeded(0):
        model = config.build()
    targets = model.state_dict()
    missing, extra = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    if missing or extra:
        raise ForeignError(f"{where}: weights are missing ({missing[:3]}) or too many ({extra[:3]})")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise ForeignError(
                f"{where}: {name} has the shape {tuple(tensors[name].shape)}, not {tuple(target.shape)}"
            )
        target.copy_(tensors[name])
    return model


def _tokenizer(path: Path, config_json: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a file, which begins and ends documents with the tokens that config.json names."""
    if path.is_dir():
        path /= TOKENIZER
    if not path.exists() and str(path) not in ("bytes", *tokenizers.PUBLISHED):
        raise RunError(
            f"{path.parent} has no {path.name}; name one: --tokenizer FILE, of the tokenizers library. "
            "The models of the Based and JRT papers have GPT-2's: --tokenizer gpt2, or the file "
            f"{TOKENIZER} of the model gpt2"
        )
    made = tokenizers.tokenizer(str(path))
    return with_ends(made, config_json, where)


def with_ends(made: Tokenizer, config_json: Mapping[str, Any], where: str) -> Tokenizer:
    """A tokenizer with the ends of documents that a config's `bos_token_id` and `eos_token_id` name.

    Of several tokens that end a text the first ends a document; where none is named, the tokenizer's own
    does.
    """
    if not isinstance(made, Filed):
        return made
    ends: dict[str, int | None] = {}
    for ours, theirs in (("end", "eos_token_id"), ("begin", "bos_token_id")):
        value = config_json.get(theirs)
        if value is None and isinstance(inner := config_json.get("text_config"), Mapping):
            value = inner.get(theirs)  # of a model that sees pictures, too
        first = value[0] if isinstance(value, list) and value else value
        if first is not None and (not isinstance(first, int) or isinstance(first, bool)):
            raise ForeignError(f"{where}: {theirs} = {value!r} is no id of a token")
        ends[ours] = first
    try:
        return made.with_ends(**ends)
    except TextError as error:
        raise ForeignError(f"{where}: bos_token_id and eos_token_id must be tokens: {error}") from error
