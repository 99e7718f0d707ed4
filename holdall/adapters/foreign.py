"""Folders of other programs: which family reads them, and how they become a language model.

    load("folder")              a LanguageModel, as `holdall.load` gives it
    convert("folder", "out")    the same as a folder of Holdall's own

A family is one function, of the fields of config.json and the weights, that returns a ModelConfig and the
weights by Holdall's names: `FAMILIES` says in which file. It takes every field and weight that it knows;
those that are left are refused by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdall import files
from holdall.adapters.reading import Fields, ForeignError, Weights, weights_in
from holdall.contract import did_you_mean
from holdall.files import RunError
from holdall.language_model import CONFIG, TOKENIZER, LanguageModel
from holdall.model import Model, ModelConfig, seeded
from holdall.precision import compute_in
from holdall.text import tokenizers
from holdall.text.tokenizers import Tokenizer

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
    "rwkv7": "fla.rwkv7",
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


def is_foreign(folder: Path) -> bool:
    """Whether a folder is one of another program: its config.json describes a kind of model, and none of
    Holdall's."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    config_json = read_config(path)
    return "model" not in config_json and bool(kind_of(config_json))


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds. Raises RunError.

    It may say Infinity, which is Python's JSON: `transformers` wrote it up to its version 4, as a limit of
    Mamba-2's step sizes.
    """
    return files.parse_json(files.read_bytes(path), path, constants=True)


def load(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """A language model from a folder of another program.

    Args:
        path: a folder as `transformers` writes it: config.json, weights, tokenizer.json.
        tokenizer: a tokenizer.json, where the folder has none.
        dtype: what the blocks compute in; fp32 by default.
        device: where the model is to be.

    Raises ForeignError, naming the field or weight that cannot be represented, and RunError.
    """
    folder = Path(path)
    config_json = read_config(folder / CONFIG)
    with weights_in(folder) as weights:
        config, tensors = read(config_json, weights, str(folder / CONFIG))
        model = built(config, tensors, str(folder))
    if dtype is not None:
        compute_in(dtype, model)
    return LanguageModel(model.to(device).eval(), _tokenizer(folder, tokenizer))


def convert(path: str | Path, out: str | Path, *, tokenizer: str | Path | None = None) -> LanguageModel:
    """Write a model of another program as a folder of Holdall's own, in the dtype of its weights."""
    model = load(path, tokenizer=tokenizer)
    model.save(out)
    return model


def read(
    config_json: Mapping[str, Any], weights: Weights, where: str
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights of a model, by Holdall's names; what it has was all taken, or is refused."""
    fields = Fields(config_json, where)
    family = family_of(config_json, where)
    try:
        config, tensors = family(fields, weights)
    except (TypeError, ValueError) as error:  # fields of the wrong kind, or that a config refuses together
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


def _tokenizer(folder: Path, given: str | Path | None) -> Tokenizer:
    if given is not None:
        return tokenizers.tokenizer(str(given))
    if not (folder / TOKENIZER).exists():
        raise RunError(
            f"{folder} has no {TOKENIZER}; name one: --tokenizer FILE. The models of the Based and JRT "
            f"papers have GPT-2's: --tokenizer gpt2, or the file {TOKENIZER} of the model gpt2"
        )
    return tokenizers.tokenizer(str(folder / TOKENIZER))
