"""The models that `holdall eval` takes, each as lm-eval calls a model, beside what is known of it.

    based-mini, runs/mine, models/mine  a folder of Holdall's own, or the name of a model that comes with it
    models/SmolLM2-135M, model.gguf     another program's: Holdall reads it where it can, so that the state of
                                        every layer is counted; else the transformers library runs it
    http://localhost:8000               a server of OpenAI's completions: `holdall serve`, vLLM

All of them answer both kinds of question, log-likelihoods of continuations and greedy texts. lm-eval is
imported here inside functions alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from holdall import checkpoints, language_model
from holdall.adapters import foreign
from holdall.files import RunError
from holdall.language_model import CONFIG, Checkpoint, LanguageModel
from holdall.model import Model
from holdall.text.sources import needed
from holdall.text.tokenizers import TextError

Kind = Literal["holdall", "foreign", "transformers", "server"]
"""Who runs the model: Holdall, one of its own or another program's; the transformers library; a server."""
CONTEXTS = (512, 1024, 2048)
"""Tokens after which states are counted."""
URLS = ("http://", "https://")


class LmCodec:
    """A model's tokenizer, as windows of documents need it."""

    def __init__(self, lm: Any) -> None:
        """lm: a model of lm-eval's that has `tok_encode` and `tok_decode`."""
        self._lm = lm

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without what a document begins with."""
        ids: list[int] = self._lm.tok_encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        text: str = self._lm.tok_decode(list(ids))
        return text


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model that answers, and what is known of it."""

    name: str
    """What tables call it: the folder's name, or what the server calls it."""
    source: str
    """The folder, file, name or address, as it was given."""
    kind: Kind
    """Who runs it."""
    parameters: int | None
    """Trained weights; None if unknown."""
    tokenizer: str
    """The tokenizer's name."""
    fingerprint: str
    """Of the weights; empty if unknown, as a server's."""
    lm: Any
    """The model as lm-eval calls it."""
    state_bytes: Callable[[int], int | None]
    """Bytes of all layers' states after so many tokens of one text, counted from the tensors that are
    carried; None if unknown, or where the model cannot read so many."""
    note: str = ""
    """What a user should know of how it is run, as a sentence."""

    @functools.cached_property
    def codec(self) -> LmCodec:
        """Its tokenizer, by which windows of documents are cut."""
        return LmCodec(self.lm)

    def about(self) -> dict[str, Any]:
        """What models/NAME.json of a results folder says."""
        return {
            "name": self.name,
            "source": self.source,
            "kind": self.kind,
            "parameters": self.parameters,
            "state_bytes": {str(tokens): self.state_bytes(tokens) for tokens in CONTEXTS},
            "tokenizer": self.tokenizer,
            "fingerprint": self.fingerprint,
        }


def open_model(
    source: str,
    *,
    batch: int = 64,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    checkpoint: Checkpoint | None = None,
) -> OpenModel:
    """A model by its folder, file, name or address.

    Args:
        source: as the module's docstring has it. A server with several models needs the name of one behind a
            hash: http://localhost:8000#NAME.
        batch: rows that are read at once, or prompts of a request to a server.
        device: where a model is run that is not served.
        dtype: what it computes in; by default bf16 on a GPU and fp32 on a CPU.
        checkpoint: of a run: "model", "best" or "last"; by default the first of these that is there.

    Raises RunError, which says what is wrong with the model or missing for it, and ValueError for options
    that it does not have.
    """
    needed("lm_eval")
    device = torch.device(device)
    if source.startswith(URLS):
        if checkpoint is not None:
            raise ValueError(f"{source} serves one model, and no checkpoint {checkpoint!r}")
        return _served(source, batch)
    dtype = dtype or ("fp32" if device.type == "cpu" else "bf16")
    is_foreign = foreign.is_foreign(Path(source))
    if not is_foreign:
        loaded = language_model.load(source, dtype=dtype, device=device, checkpoint=checkpoint)
        return _loaded(source, loaded, "holdall", batch)
    try:
        loaded = foreign.load_any(source, dtype=dtype, device=device, checkpoint=checkpoint)
    except RunError as error:  # of kinds or tokenizers that Holdall does not read
        if not Path(source).is_dir():
            raise
        return _by_transformers(source, batch, device, language_model.float_dtype(dtype), error)
    return _loaded(source, loaded, "foreign", batch)


def _loaded(source: str, model: LanguageModel, kind: Kind, batch: int) -> OpenModel:
    from holdall.adapters.lm_eval import HoldallLM

    path = Path(source)
    return OpenModel(
        name=path.stem if path.suffix == foreign.GGUF else path.name or path.absolute().name,
        source=source,
        kind=kind,
        parameters=model.model.parameter_count(),
        tokenizer=model.tokenizer.name,
        fingerprint=model.fingerprint,
        lm=HoldallLM(model, batch_size=batch),
        state_bytes=functools.partial(_bytes_carried, model.model),
    )


def _bytes_carried(model: Model, tokens: int) -> int | None:
    if model.config.positions and tokens > model.config.positions:
        return None
    return model.state_bytes(tokens)


# -------------------------------------------------------------------------------------- another's programs


def _by_transformers(
    source: str, batch: int, device: torch.device, dtype: torch.dtype, reason: RunError
) -> OpenModel:
    """A folder that Holdall does not read, run by the transformers library; RunError if that cannot."""
    for package in ("transformers", "accelerate"):
        try:
            needed(package)
        except TextError as error:
            raise RunError(
                f"{reason}. The transformers library might run it: pip install transformers accelerate"
            ) from error
    from lm_eval.models.huggingface import HFLM

    try:
        lm = HFLM(pretrained=source, device=str(device), dtype=dtype, batch_size=batch)
    except Exception as error:  # whatever the library makes of a folder
        words = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"{reason}. Nor does the transformers library read it: {words}") from error
    config_json = json.dumps(foreign.read_config(Path(source) / CONFIG), sort_keys=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in lm.model.state_dict().items()}
    return OpenModel(
        name=Path(source).absolute().name,
        source=source,
        kind="transformers",
        parameters=sum(parameter.numel() for parameter in lm.model.parameters()),
        tokenizer=type(lm.tokenizer).__name__,
        fingerprint=checkpoints.fingerprint(config_json, checkpoints.checksums(weights)),
        lm=lm,
        state_bytes=lambda tokens: None,
        note=f"{source} is run by the transformers library, and its state is not counted: {reason}",
    )


def _served(source: str, batch: int) -> OpenModel:
    needed("aiohttp")  # lm-eval's extra `api`
    needed("tenacity")
    from holdall.evals.served import ServedLM, Server

    server = Server(source)
    facts = server.facts
    return OpenModel(
        name=server.model,
        source=source,
        kind="server",
        parameters=facts.get("parameters"),
        tokenizer=server.tokenizer_name,
        fingerprint="",
        lm=ServedLM(server, batch_size=batch),
        state_bytes=lambda tokens: facts.get("state_bytes") if facts.get("recurrent") else None,
    )
