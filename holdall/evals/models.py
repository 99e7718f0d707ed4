"""The models that `holdall eval` takes, by folder, file, name or address.

    based-mini, runs/mine, models/mine  a folder of Holdall's own, or the name of a model that comes with it
    models/SmolLM2-135M, model.gguf     another program's: Holdall reads it where it can, so that the state of
                                        every layer is counted; else the transformers library runs it
    http://localhost:8000               a server of OpenAI's completions: `holdall serve`, vLLM

All of them answer both kinds of question, log-likelihoods of continuations and greedy texts. Who runs a model
is its `kind`: "holdall" if it is a folder of Holdall's own, "foreign" if Holdall reads another program's,
"transformers" if that library runs it, "server". lm-eval is imported inside functions alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from holdall import checkpoints, language_model
from holdall.adapters import foreign
from holdall.evals.run import Subject, subject
from holdall.evals.windows import Codec
from holdall.files import RunError
from holdall.language_model import CONFIG, Checkpoint
from holdall.text.sources import needed
from holdall.text.tokenizers import TextError

URLS = ("http://", "https://")


class LmCodec(Codec):
    """A tokenizer of a model of lm-eval's, as windows of documents need it."""

    def __init__(self, lm: Any) -> None:
        """lm: a model that has `tok_encode` and `tok_decode`."""
        self._lm = lm

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without what a document begins with."""
        ids: list[int] = self._lm.tok_encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        text: str = self._lm.tok_decode(list(ids))
        return text


def open_model(
    source: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    checkpoint: Checkpoint | None = None,
) -> Subject:
    """A model by its folder, file, name or address.

    Args:
        source: as the module's docstring has it. A server with several models needs the name of one behind a
            hash: http://localhost:8000#NAME.
        device: where a model is run that is not served.
        dtype: what it computes in; by default bf16 on a GPU and fp32 on a CPU.
        checkpoint: of a run: "model", "best" or "last"; by default the first of these that is there.

    Raises RunError, which says what is wrong with the model or missing for it, and ValueError for options
    that it does not have.
    """
    if source.startswith(URLS):
        if checkpoint is not None:
            raise ValueError(f"{source} serves one model, and no checkpoint {checkpoint!r}")
        return _served(source)
    device, path = torch.device(device), Path(source)
    dtype = language_model.float_dtype(dtype or ("fp32" if device.type == "cpu" else "bf16"))
    name = path.stem if path.suffix == foreign.GGUF else path.absolute().name
    if not foreign.is_foreign(path):
        loaded = language_model.load(source, dtype=dtype, device=device, checkpoint=checkpoint)
        return subject(loaded, name, source=source, kind="holdall")
    try:
        loaded = foreign.load_any(source, dtype=dtype, device=device, checkpoint=checkpoint)
    except RunError as error:  # a kind of model or a tokenizer that Holdall does not read
        if not path.is_dir():
            raise
        return _by_transformers(path, name, device, dtype, error)
    return subject(loaded, name, source=source, kind="foreign")


def check_there(source: str) -> None:
    """Raise RunError if there is no such folder or file, or TextError if the package that reads it is not
    installed; takes no time, and asks no server."""
    path = Path(source)
    if source.startswith(URLS):
        return
    if path.suffix != foreign.GGUF:
        language_model.find_folder(source)
    elif not path.is_file():
        raise RunError(f"there is no file {path}")
    else:
        needed("gguf")


def _by_transformers(
    path: Path, name: str, device: torch.device, dtype: torch.dtype, reason: RunError
) -> Subject:
    """A folder that Holdall does not read, run by the transformers library; RunError if that cannot."""
    try:
        for package in ("lm_eval", "transformers", "accelerate"):
            needed(package)
    except TextError as error:
        raise RunError(
            f"{reason}. The transformers library might run it: pip install transformers accelerate"
        ) from error
    from lm_eval.models.huggingface import HFLM

    try:
        lm = HFLM(pretrained=str(path), device=str(device), dtype=dtype)
    except Exception as error:  # whatever the library makes of a folder
        words = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"{reason}. Nor does the transformers library read it: {words}") from error
    config_json = json.dumps(foreign.read_config(path / CONFIG), sort_keys=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in lm.model.state_dict().items()}

    def make(batch: int) -> Any:
        lm.batch_size_per_gpu = batch  # what it calls its batch wherever it runs
        return lm

    return Subject(
        name=name,
        source=str(path),
        kind="transformers",
        parameters=sum(parameter.numel() for parameter in lm.model.parameters()),
        tokenizer=type(lm.tokenizer).__name__,
        codec=LmCodec(lm),
        fingerprint=checkpoints.fingerprint(config_json, checkpoints.checksums(weights)),
        make=make,
        positions=lm.max_length,
        precision=str(dtype).removeprefix("torch."),
        note=f"{path} is run by the transformers library, and its state is not counted: {reason}",
    )


def _served(source: str) -> Subject:
    for package in ("lm_eval", "aiohttp", "tenacity"):  # the last two are of lm-eval's extra `api`
        needed(package)
    from holdall.evals.served import NO_LIMIT, ServedLM, Server

    server = Server(source)
    facts = server.facts
    return Subject(
        name=server.model,
        source=source,
        kind="server",
        parameters=facts.get("parameters"),
        tokenizer=server.tokenizer_name,
        codec=LmCodec(ServedLM(server)),
        make=lambda batch: ServedLM(server, batch_size=batch),
        positions=None if server.limit == NO_LIMIT else server.limit,
        state_bytes=lambda tokens: facts.get("state_bytes") if facts.get("recurrent") else None,
    )
