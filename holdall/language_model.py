"""A trained language model with its tokenizer: load it, generate, score, save.

    model = holdall.load("runs/based-mini")        # a run, a saved model; or one that comes with Holdall
    model.generate("It is a truth universally")    # how the model continues the text
    model.score("It is a truth").perplexity
    model.save("models/mine", dtype="bf16")        # loads anywhere else

A model's folder stands alone; nothing else is needed, neither the corpus nor the run:

    model.safetensors   the weights; the header has the model's config and fingerprint, the training step, and
                        what the tokenizer is
    config.json         the model's config, under "model"
    tokenizer.json      a file of the `tokenizers` library, also where tokens are bytes

`save` writes "format" into config.json. A run folder is such a folder from its first checkpoint on: its
config.json has all of the run's settings instead, and its weights may be in best.safetensors and
last.safetensors only, until training ends.

Letters: B rows, T tokens, V vocabulary, C some of the tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall import checkpoints, files, mixers
from holdall.contract import closest, recurrent_dtype
from holdall.engine import (
    Engine,
    EngineConfig,
    Piece,
    Request,
    Sampling,
    Session,
    load_session,
    read,
    save_session,
)
from holdall.engine.request import NOT_FINITE
from holdall.files import RunError
from holdall.model import Model, ModelConfig, seeded
from holdall.precision import choose_forms, compute_in
from holdall.text import tokenizers
from holdall.text.corpus import read_manifest
from holdall.text.tokenizers import Bytes, Tokenizer

FORMAT = "holdall-model-1"
"""In config.json of a folder that `save` wrote; changes when a folder of before can no longer be read."""
CONFIG, TOKENIZER = "config.json", tokenizers.FILE
Checkpoint = Literal["model", "best", "last"]
"""Weights at the end of training, at the lowest validation loss, and at the last checkpoint."""
PRETRAINED = Path(__file__).with_name("pretrained")
"""The folders of the models that come with Holdall."""
DEFAULT = "based-mini"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY = "Get it from a copy, or train again in another folder."
TOKENS_AT_ONCE = 4096
"""Tokens of a text that the model reads in one call; a longer text is read in pieces, by carrying states."""
LOGITS_AT_ONCE = 1 << 24
ROOM = 1024
"""Tokens that states which grow have room for at least when a text is generated."""


class MissingError(RunError):
    """A folder lacks the checkpoint that is asked for."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model says of a text of T tokens."""

    ids_T: Tensor
    """The tokens, int64, on the CPU."""
    log_prob_T: Tensor
    """The log-probability of each token after all before it, in nats, fp64, on the CPU."""

    @property
    def nats(self) -> float:
        """The negative log-probability of the whole text."""
        return -float(self.log_prob_T.sum())

    @property
    def perplexity(self) -> float:
        """Per token, as large as a float can be."""
        return math.exp(min(self.nats / len(self.log_prob_T), 700.0))


class LanguageModel:
    """A model and the tokenizer whose tokens it reads.

    Attributes:
        model: the weights and states; `model(tokens_BT, states)` gives logits.
        tokenizer: text to token ids and back.
        step: the training step of the weights.
        config: of the model.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, *, step: int = 0, fingerprint: str = "") -> None:
        """`fingerprint` is that of the file the weights are from; by default it is computed from them."""
        if tokenizer.vocab > model.config.vocab:
            raise ValueError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocab} tokens, more than the model's vocab "
                f"{model.config.vocab}: it belongs to another model"
            )
        self.model, self.tokenizer, self.step = model, tokenizer, step
        self._fingerprint = fingerprint
        self._engine: Engine | None = None
        self._engine_of: tuple[torch.device, torch.dtype] | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def fingerprint(self) -> str:
        """What identifies the model: a hash of its config and weights.

        A model that was loaded has its file's, in whatever dtype; one that was made here that of its weights
        as they are now.
        """
        if self._fingerprint:
            return self._fingerprint
        weights = _on_cpu(self.model, None)
        return checkpoints.fingerprint(_as_json(self.config), checkpoints.checksums(weights))

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.model.parameter_count():,} parameters, {len(self.config.layers)} layers of "
            f"width {self.config.width}, tokenizer {self.tokenizer.name}, step {self.step:,})"
        )

    # ------------------------------------------------------------------------------------------------- use

    def generate(
        self,
        text: str = "",
        *,
        max_tokens: int = 256,
        temperature: float = 0.8,
        seed: int = 0,
        session: Session | None = None,
        on_text: Callable[[str], object] = lambda piece: None,
        **options: Any,
    ) -> str:
        """How the model continues a text, which it reads as the beginning of a document.

        Args:
            text: the prompt; empty for a document of the model's own.
            max_tokens: the most tokens to generate; the end of the document comes earlier or not at all.
            temperature: what logits are divided by before a token is drawn; 0 takes the likeliest token.
            seed: of the draws: the same on every device.
            session: what was read before the prompt, which is then no beginning of a document: see `read`.
            on_text: called with each new piece of text as soon as its characters are whole.
            options: the other fields of `holdall.engine.Sampling`, such as top_p=0.9 or stop=("\\n",).

        Returns:
            The new text alone: the pieces joined, without the prompt and the end of the document.

        Raises:
            ValueError: a setting is out of range, the model has no more learned positions, or its logits are
                NaN or infinite.
        """
        options |= {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        written = []
        for piece in self.stream(text, session=session, **options):
            if piece.text:
                written.append(piece.text)
                on_text(piece.text)
        return "".join(written)

    def stream(
        self, text: str = "", *, session: Session | None = None, keep: bool = False, **options: Any
    ) -> Iterator[Piece]:
        """The text that `generate` gives, piece by piece, with its tokens.

        Args:
            text: as in `generate`.
            session: as in `generate`.
            keep: whether the last piece has the session after it, to be continued or saved.
            options: the fields of `holdall.engine.Sampling`, with its defaults.

        Raises ValueError as `generate`.
        """
        ids = tuple(self._tokens(text) if session else self._document(text))
        request = Request(prompt=ids, sampling=Sampling(**options), session=session, keep=keep)
        before = 0 if session is None else session.past.count
        for piece in self._one_row(before + len(ids) + request.sampling.max_tokens).run([request]):
            if piece.finish == "error":
                raise ValueError(NOT_FINITE)
            yield piece

    def with_replay(self, tokens: int = 16, *, state_dtype: str = "fp32") -> LanguageModel:
        """The same weights, with states whose last L tokens can be taken back: `model.rollback_limit`.

        Large states are then read with every token and written with every L-th, which moves about half their
        bytes; all generates the same up to rounding: see docs/replay.md. Sessions of the model without it are
        not this one's.

        Args:
            tokens: L; 0 for states that are written with every token, as usual.
            state_dtype: what the sums of Taylor layers are stored in, "fp32", "bf16" or "fp16".

        Raises ValueError, naming the layer, if one cannot take tokens back; or if none stores its state so.
        """
        options: dict[str, Any] = {"replay": tokens, "state_dtype": state_dtype}
        chosen = [options.keys() & _fields(layer) for layer in self.config.layers]
        if state_dtype != "fp32" and not any("state_dtype" in own for own in chosen):
            kinds = ", ".join(sorted({layer.name for layer in self.config.layers}))
            raise ValueError(
                f"no layer stores its state in {state_dtype}: taylor can, and the model has {kinds}"
            )
        layers = tuple(
            dataclasses.replace(layer, **{name: options[name] for name in own})
            for layer, own in zip(self.config.layers, chosen, strict=True)
        )
        with torch.device("meta"):  # the weights are not copied
            model = dataclasses.replace(self.config, layers=layers).build()
        for depth, mixer in enumerate(model.mixers):
            if tokens and not mixer.rollback_limit:
                raise ValueError(
                    f"layer {depth}, {mixer.owner}, cannot take tokens back, so replay is not for it"
                )
        model.load_state_dict(self.model.state_dict(), assign=True)
        choose_forms(model, model.block_dtype)
        model.train(self.model.training)
        return LanguageModel(model, self.tokenizer, step=self.step, fingerprint=self.fingerprint)

    def read(self, text: str, session: Session | None = None) -> Session:
        """What the model makes of a text: to be continued by `generate`, forked, saved and loaded.

        Args:
            text: read as the beginning of a document, or after what the session has read.
            session: stays as it was.
        """
        return read(self.model, self._tokens(text) if session else self._document(text), session)

    def save_session(self, session: Session, path: str | Path) -> None:
        """Write a session to a file, from which `load_session` resumes it, tomorrow or on another machine."""
        save_session(session, Path(path), model=self.fingerprint)

    def load_session(self, path: str | Path) -> Session:
        """Read what `save_session` wrote. Raises StateError if another model has read it."""
        return load_session(Path(path), self.model, fingerprint=self.fingerprint)

    def engine(self, config: EngineConfig | None = None, **how: Any) -> Engine:
        """An engine for many texts at once; arguments as of `holdall.engine.Engine`."""
        return Engine(self.model, self.tokenizer, config, **how)

    def _one_row(self, tokens: int) -> Engine:
        """An engine of one row with room for so many tokens, kept for the next text if it has no graph yet.

        Recording a graph takes longer than a short text, so the engine is made once for a model that is not
        moved or cast in between, and again where states grow beyond its room.
        """
        limit = None
        if self.model.needs_room:
            limit = max(ROOM, 1 << (tokens - 1).bit_length())
            limit = min(limit, self.config.positions or limit)
        made, now = self._engine, (self.model.device, self.model.block_dtype)
        if made is None or self._engine_of != now or made.busy or (limit and (made.capacity or 0) < tokens):
            self._engine_of = now
            made = self._engine = self.engine(EngineConfig(rows=1, max_context=limit))
        return made

    @torch.no_grad()
    def score(self, text: str, *, session: Session | None = None) -> Score:
        """The log-probability of each token of a text.

        Probabilities are over the model's whole vocabulary, as in the loss that training reports. A long text
        is read in pieces, by carrying states, so that memory does not grow with it unless the states do.

        Args:
            text: a document's beginning: its first token is scored after the end-of-text token, which stands
                before every document in training. Or what follows the session.
            session: what was read before the text: see `read`. It stays as it was.

        Raises ValueError if the text is empty, longer than the learned positions, or the logits are NaN; and
        without a session, if the model's first tokens see each other, so that none of them is predicted.
        """
        prefix = 0 if session is not None else self.model.prefix
        if prefix:
            raise ValueError(
                f"the first {prefix} tokens of a document see each other in this model, so that it predicts "
                "none of them: score(text, session=model.read(context)) is the probability of what follows"
            )
        ids_N = torch.tensor(self._document(text) if session is None else self._tokens(text))
        parts, states, own = list[Tensor](), None, True

        def add(logits_CV: Tensor, next_C: Tensor) -> None:
            wide_CV = logits_CV.to(recurrent_dtype(logits_CV.dtype))
            parts.append(-F.cross_entropy(wide_CV, next_C.to(wide_CV.device), reduction="none").cpu())

        if session is not None and len(ids_N):
            add(session.logits_V[None], ids_N[:1])
            states, own = session.states, False
        scored_T = ids_N[int(session is None) :]
        if not len(scored_T):
            raise ValueError("there is nothing to score: the text is empty")
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab)
        read, predicted = ids_N[:-1].split(TOKENS_AT_ONCE), ids_N[1:].split(TOKENS_AT_ONCE)
        for read_T, next_T in zip(read, predicted, strict=True):
            if not len(read_T):  # a text of one token behind a session
                break
            h_1TD, states = self.model.hidden(read_T[None].to(self.model.device), states, inplace=own)
            own = True
            for h_CD, next_C in zip(h_1TD[0].split(rows), next_T.split(rows), strict=True):
                add(self.model.logits(h_CD), next_C)
        log_prob_T = torch.cat(parts).double()
        if log_prob_T.isnan().any():
            raise ValueError(NOT_FINITE)
        return Score(ids_T=scored_T, log_prob_T=log_prob_T)

    def save(self, path: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write the model into a folder of its own, all of it or nothing; `load` reads it anywhere.

        Args:
            path: the folder, which is made, or is there and empty.
            dtype: that weights are written in, "fp32", "bf16" or one of torch; as they are by default.

        Raises RunError if the folder holds anything, or cannot be written.
        """
        folder, dtype = Path(path), None if dtype is None else float_dtype(dtype)
        weights, described = _on_cpu(self.model, dtype), self.tokenizer.describe()
        config = {
            "format": FORMAT, "model": self.config.to_dict(), "tokenizer": described, "step": self.step
        }  # fmt: skip
        with files.new_folder(folder, "Choose another folder, or remove it first.") as made:
            header = {**header_of(self.config, self.tokenizer), "step": self.step}
            about = {name: json.dumps(value) for name, value in header.items()}
            checkpoints.write(made / "model.safetensors", weights, about)
            files.write_json(made / CONFIG, config)
            files.write_atomically(made / TOKENIZER, self.tokenizer.to_json())

    def _document(self, text: str) -> list[int]:
        """The ids of a text behind the token that begins a document: mostly the end of the one before."""
        return [self.tokenizer.begin, *self._tokens(text)]

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode_batch([text])[0].tolist()


# --------------------------------------------------------------------------------------------- the folder


def load(
    path: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    checkpoint: Checkpoint | None = None,
) -> LanguageModel:
    """A trained language model, from a folder that stands alone.

    Args:
        path: a run folder, one that `save` wrote, or the name of a model that comes with Holdall, which are
            `pretrained()`; None for "based-mini".
        dtype: what the blocks compute in, "fp32" (the default), "bf16" or torch's, whatever the file has: see
            holdall/precision.py.
        device: the CPU by default.
        checkpoint: "model", "best" or "last"; by default the first of these that is there.

    Raises:
        RunError: something is missing, damaged, or of another model; the message names it, and the way out.
        ValueError: there is no such dtype or device here.
    """
    asked, device = None if dtype is None else float_dtype(dtype), available_device(device)
    folder = find_folder(path)
    config_json = _read_config(folder)
    with checkpoints.opened(find_checkpoint(folder, checkpoint), COPY) as file:
        header = _read_header(file, config_json)  # before a model is built of a config that may be forged
        tokenizer = _tokenizer(folder, config_json, file)
        with seeded(0):  # a caller's random state is its own
            model = header.config.build()
        file.fill(model.state_dict(), prefix=checkpoints.weights_prefix(file.names), any_float=True)
    if asked is not None:
        compute_in(asked, model)
    try:
        model = model.to(device).eval()
        return LanguageModel(model, tokenizer, step=header.step, fingerprint=header.fingerprint)
    except ValueError as error:
        raise RunError(f"{folder / TOKENIZER}: {error}") from error


def pretrained() -> list[str]:
    """The names of the models that come with Holdall."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG}"))


def find_folder(path: str | Path | None) -> Path:
    """The folder that a user names; RunError if there is none."""
    folder = Path(DEFAULT if path is None else path)
    if path is None or (not folder.exists() and str(folder) in pretrained()):
        return PRETRAINED / folder
    if folder.is_file():
        raise RunError(f"{folder} is a file: name its folder, {folder.parent}, and choose the checkpoint")
    if not folder.is_dir():
        names = pretrained()
        raise RunError(
            f"there is no folder {folder}. {closest(str(folder), names)}Name a run folder of `holdall "
            f"train`, the folder of a saved model, or one that comes with Holdall: {', '.join(names)}"
        )
    return folder


def find_checkpoint(folder: Path, checkpoint: Checkpoint | None = None) -> Path:
    """The file of the checkpoint that is asked for; by default the end's, else the best, else the last.

    Raises RunError, which says what is missing.
    """
    if checkpoint is not None and checkpoint not in get_args(Checkpoint):
        raise ValueError(f"checkpoint = {checkpoint!r} must be one of {', '.join(get_args(Checkpoint))}")
    names = [f"{name}.safetensors" for name in ([checkpoint] if checkpoint else get_args(Checkpoint))]
    there = [folder / name for name in names if (folder / name).exists()]
    if there:
        return there[0]
    others = [name for name in get_args(Checkpoint) if (folder / f"{name}.safetensors").exists()]
    if others:
        raise MissingError(f"{folder} has no checkpoint '{checkpoint}', but '{others[0]}'")
    if (folder / "metrics.jsonl").exists():
        raise MissingError(f"{folder} has no checkpoint yet; give its `holdall train` command again")
    raise MissingError(f"{folder} holds no language model ({names[0]} is missing); `holdall train` makes one")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a checkpoint says of its weights."""

    path: Path
    config: ModelConfig
    step: int
    fingerprint: str


def read_header(folder: Path, checkpoint: Checkpoint | None = None) -> Header:
    """What a checkpoint in a folder says, without its weights; errors as of `load`."""
    with checkpoints.opened(find_checkpoint(folder, checkpoint), COPY) as file:
        return _read_header(file, _read_config(folder))


def header_of(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the header of every checkpoint says of its model beside the step, as JSON values by name."""
    return {checkpoints.CONFIG: config.to_dict(), "tokenizer": tokenizer.describe()}


def _read_header(file: checkpoints.TensorFile, config_json: Mapping[str, Any]) -> Header:
    """What an open checkpoint says; RunError if it is of another model than config.json."""
    where = f"the header of {file.path}"
    config = _config_of(config_json, file.path.with_name(CONFIG))
    own = file.about.get(checkpoints.CONFIG)
    if own is not None and ModelConfig.parse(own, where, COPY) != config:
        raise file.damaged("its header describes another model than config.json")
    # in runs of an earlier version the step is said with what training resumes from
    state = files.parse_json(file.about["state"], where, COPY) if "state" in file.about else {}
    step = str(file.about.get("step", state.get("step")))
    if not step.isdecimal():
        raise file.damaged("its header does not say which step it is of")
    return Header(
        path=file.path, config=config, step=int(step), fingerprint=file.fingerprint(_as_json(config))
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds: of a run or of a saved model."""
    path = folder / CONFIG
    if not path.exists():
        raise RunError(f"{folder} holds no language model ({CONFIG} is missing); `holdall train` makes one")
    config_json: dict[str, Any] = files.read_json(path, COPY)
    if "model" not in config_json:
        raise RunError(
            f"{folder} holds no language model: {CONFIG} describes none; `holdall train` makes one"
        )
    if config_json.get("format", FORMAT) != FORMAT:
        raise RunError(
            f"{path} has the format {config_json['format']!r}, not {FORMAT}: a newer Holdall wrote it"
        )
    return config_json


def _config_of(config_json: Mapping[str, Any], path: Path) -> ModelConfig:
    if not isinstance(config_json["model"], dict):
        raise files.damaged(path, "its model is no JSON object", COPY)
    layers = config_json["model"].get("layers")
    named = [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
    names = [layer["name"] for layer in named if isinstance(layer.get("name"), str)]
    if unknown := [name for name in names if name not in mixers.names()]:
        raise RunError(
            f"{path} names the mixer '{unknown[0]}', which is not registered. If it is your own, load its "
            "file first: --load FILE, or holdall.mixers.load(FILE)"
        )
    return ModelConfig.checked(config_json["model"], path, COPY)


def _tokenizer(folder: Path, config_json: Mapping[str, Any], file: checkpoints.TensorFile) -> Tokenizer:
    """The tokenizer of a folder; in a run of an earlier version, which has none, that of its corpus."""
    if "tokenizer" not in file.about and "data" in config_json and not (folder / TOKENIZER).exists():
        return _tokenizer_of_corpus(folder, config_json)
    described = None
    if "tokenizer" in file.about:
        described = files.parse_json(file.about["tokenizer"], f"the header of {file.path}", COPY)
    way_out = f"Copy {TOKENIZER} from the folder that the model came from, or from a run on the same corpus"
    return tokenizers.from_model_folder(folder, described, way_out)


def _tokenizer_of_corpus(folder: Path, config_json: Mapping[str, Any]) -> Tokenizer:
    if not config_json["data"]:
        return Bytes()
    try:
        corpus = Path(config_json["data"])
        manifest = read_manifest(corpus)
        if config_json.get("data_hash") not in ("", manifest["content_hash"]):
            raise RunError(f"the corpus in {corpus} is not the one that the run was trained on")
        return tokenizers.from_manifest(manifest["tokenizer"], corpus)
    except (RunError, TypeError) as error:
        raise RunError(
            f"{folder} has no {TOKENIZER}, as runs of an earlier version, and its corpus cannot give it: "
            f"{error}. Put the corpus back there, or copy {TOKENIZER} from a run on the same corpus"
        ) from error


def _on_cpu(model: Model, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights and lasting buffers, as files hold them; floating-point ones in a dtype."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in model.state_dict().items()
    }


def _as_json(config: ModelConfig) -> str:
    return json.dumps(config.to_dict())


def float_dtype(asked: str | torch.dtype) -> torch.dtype:
    """A dtype by its short name, or as it is; ValueError for one that weights cannot have."""
    dtype = DTYPES.get(asked) if isinstance(asked, str) else asked
    if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype = {asked!r} must be {', '.join(DTYPES)}, or torch's float64 or float16")
    return dtype


def _fields(config: Any) -> set[str]:
    """The options of a config, or of a class of configs."""
    return {field.name for field in dataclasses.fields(config)}


def available_device(asked: str | torch.device | None) -> torch.device:
    """A device of this machine, the CPU by default; ValueError for a GPU that is not there."""
    device = torch.device("cpu" if asked is None else asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available here; load the model with device='cpu'")
    return device
