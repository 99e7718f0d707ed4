"""Holdall measures, trains and serves language models whose memory does not grow.

    import holdall
    holdall.names()                                      # every registered sequence mixer
    holdall.describe("mamba")                            # paper, state, costs, options
    mixer = holdall.build("mamba", width=64, state=16)   # a torch module
    y_BTD, state = mixer(x_BTD)                          # any T >= 1
    y_BTD, state = mixer(more_BTD, state)                # and on from there
    holdall.states.save(state, "state.safetensors")      # and load, select, join, to, detach

    model = holdall.load("runs/based-mini")              # a trained language model, with its tokenizer
    model.generate("It is a truth universally")          # and .score(text), .save(path)

Nothing heavy is imported until one of these is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from holdall import states
    from holdall.contract import Entry, Mixer
    from holdall.language_model import Checkpoint, LanguageModel

__version__ = "0.1.0"
__all__ = ["build", "describe", "load", "names", "states"]


def __getattr__(name: str) -> Any:
    """`holdall.states` without an import of its own."""
    if name == "states":
        from importlib import import_module

        return import_module("holdall.states")
    raise AttributeError(f"module 'holdall' has no attribute '{name}'")


def names() -> list[str]:
    """The names of all registered sequence mixers, sorted."""
    from holdall import mixers

    return mixers.names()


def build(name: str, *, width: int, **options: Any) -> "Mixer":
    """Build a registered mixer of model width `width`; `describe(name)` lists its options.

    Raises KeyError for an unknown name, TypeError for an unknown or ill-typed option and
    ValueError for a value that does not fit, each naming the way out.
    """
    from holdall import mixers

    return mixers.entry(name).configure(width=width, **options).build()


def describe(name: str) -> "Entry":
    """What the registry knows of a mixer: paper, state formula, costs, options with defaults."""
    from holdall import mixers

    return mixers.entry(name)


def load(
    path: "str | Path | None" = None,
    *,
    dtype: "str | torch.dtype | None" = None,
    device: "str | torch.device | None" = None,
    checkpoint: "Checkpoint | None" = None,
    tokenizer: "str | Path | None" = None,
) -> "LanguageModel":
    """A trained language model with its tokenizer, from a folder that stands alone: model.safetensors,
    config.json, tokenizer.json. A run folder is one, and so is what `save` wrote. Folders as the
    transformers library writes them, and GGUF files, are read too: docs/checkpoints.md says which.

    Args:
        path: the folder, the file, or the name of a model that comes with Holdall; None for the small one
            that does.
        dtype: what the model computes in, "fp32" (the default), "bf16" or a dtype of torch.
        device: the CPU by default.
        checkpoint: "model" (the end of training), "best" or "last"; by default the first that is there.
        tokenizer: a tokenizer.json for a model of another program that comes without.

    Raises RunError, which names what is missing or damaged, and the way out.
    """
    from holdall.adapters import foreign

    return foreign.load_any(path, dtype=dtype, device=device, checkpoint=checkpoint, tokenizer=tokenizer)
