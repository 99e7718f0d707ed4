"""Pretraining: a language model of any mixers on the token shards of a corpus, on one device or many.

    rows      windows of the training split in an order that is a function of (seed, step); of each step's
              rows every device takes its part, in passes of `micro_batch` rows whose gradients add up
    pass      holdall/training/devices.py
    update    gradients clipped by their norm, AdamW with warm-up and a cosine

Everything that decides a result is in the config; the state of a run is the step's number, the weights and
AdamW's moments. The run folder holds them, and the same call goes on from there: to the bit on the same
device and count, by whatever the first one was ended.

    config.json         the config, complete                environment.json   versions, devices, commit
    metrics.jsonl       a line per step and per evaluation  result.json        at the end
    last.safetensors    weights and moments                 best.safetensors   weights at the lowest
    model.safetensors   weights at the end                                     validation loss

Letters: B rows, N = T + 1 tokens of a row, V vocabulary.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from holdall import checkpoints, environment, files, settings
from holdall.contract import Config
from holdall.files import RunError
from holdall.model import Model, ModelConfig, Precision, repeatable, seeded
from holdall.settings import (
    Betas,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    Share,
)
from holdall.text.corpus import Corpus, open_corpus
from holdall.text.default import default_corpus
from holdall.text.windows import Order
from holdall.training.chassis import Background, Stopped
from holdall.training.compiled import compile_blocks
from holdall.training.devices import Fabric, LanguageModelLoss, decayed, launcher, put, whole
from holdall.training.flops import flops_per_token, memory_bytes, peak_flops


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """A model, a corpus, and how the one learns from the other.

    data: the corpus' folder, empty for the embedded text; data_hash: of its content, which must fit.
    context_len: tokens of a row that are read. batch: rows per step, over all devices; micro_batch: rows of
    one pass on one device.
    learning_rate rises over `warmup` steps, then falls along a cosine to the share `min_learning_rate` of it.
    weight_decay: of linear layers' matrices and the embedding. clip: largest norm of a step's gradient, 0 for
    any. seed: of weights and order.
    compile: each block by torch.compile. recompute: keep only each block's input, and run the block again in
    the backward pass.
    evaluate_every: steps between evaluations on the first `evaluate_rows` windows of the validation split.
    """

    model: ModelConfig
    data: str = ""
    data_hash: str = ""
    context_len: PositiveInt = 2048
    batch: PositiveInt = 256
    micro_batch: PositiveInt = 8
    steps: PositiveInt = 20_000
    learning_rate: PositiveFloat = 8e-4
    min_learning_rate: Share = 0.1
    warmup: NonNegativeInt = 200
    betas: Betas = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.1
    clip: NonNegativeFloat = 1.0
    seed: Seed = 0
    precision: Precision = "fp32"
    compile: bool = False
    recompute: bool = False
    evaluate_every: PositiveInt = 1000
    evaluate_rows: PositiveInt = 256

    def validate(self) -> None:
        if 0 < self.model.positions < self.context_len:
            raise ValueError(
                f"the model has {self.model.positions} positions, context_len is {self.context_len}"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        along = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        low = self.min_learning_rate
        return self.learning_rate * rise * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * along)))


@dataclass(frozen=True)
class Progress:
    """How far a run is: for whoever draws the bars."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float
    mfu: float | None
    """Share of the device's peak operations; None where that is unknown."""
    valid_loss: float | None


CHECKPOINT_SECONDS = 60.0
TELL_STEPS, TELL_SECONDS = 10, 0.5
"""How often losses are fetched, for which a GPU waits: that many steps, or as long in one process."""


def pretrain(
    config: PretrainConfig,
    folder: Path,
    *,
    fabric: Fabric | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_line: Callable[[dict[str, Any]], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    in_order: bool = True,
) -> dict[str, Any]:
    """Train a language model, or go on with it, and return what result.json holds.

    With several devices every process calls this; the first one writes, and all must see the folder.

    Args:
        folder: the run folder; made if needed. If it holds a checkpoint of the same config, training goes on
            from there, and if it holds a result, that is returned.
        fabric: what `launcher` gave; None for one process on the CPU.
        on_progress, on_line: called about twice a second, and with each line of metrics.jsonl; in the first
            process alone.
        should_stop: asked twice a second, or every ten steps of several processes; True writes a checkpoint
            and raises Stopped.
        checkpoint_seconds: at most so much work is lost to a crash.
        in_order: on a GPU, add in a fixed order, so that the same run gives the same bits.

    Raises:
        RunError: the folder cannot be written, is in use, or holds another config; the corpus is not the one
            that the config names; devices do not fit the batch; or the loss is no number any more.
        Stopped: should_stop said so. In processes other than the first either is SystemExit(0).
    """
    fabric = fabric or launcher()
    corpus = open_data(config)
    config = _checked(config, corpus, fabric.world_size)
    with (
        files.locked(folder) if fabric.is_global_zero else contextlib.nullcontext(),
        repeatable(fabric.device) if in_order else contextlib.nullcontext(),
    ):
        if _check(folder, config) is not None:
            _claim(folder, config, fabric, in_order)
        done = folder / "result.json"
        if done.exists():
            return Result.read(done, "Remove it, and the same command makes it again.").to_dict()
        fabric.launch()
        with _together(fabric):
            run = Pretrainer(config, corpus, folder, fabric, on_progress, on_line)
            run.claim = functools.partial(_claim, folder, config, fabric, in_order)
            result = run.run(should_stop, checkpoint_seconds)
        if fabric.is_global_zero:
            files.write_json(done, result)
        fabric.barrier()
    return result


@contextlib.contextmanager
def _together(fabric: Fabric) -> Iterator[None]:
    """An error of the first process ends those that it started, which would wait for it."""
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        for process in getattr(fabric.strategy.launcher, "procs", []):
            process.kill()
        raise


def open_data(config: PretrainConfig) -> Corpus:
    """The corpus that a config names."""
    return open_corpus(Path(config.data)) if config.data else default_corpus()


def _checked(config: PretrainConfig, corpus: Corpus, world: int) -> PretrainConfig:
    """The config with its corpus' hash, or a RunError that says what does not fit."""
    if config.data_hash not in ("", corpus.content_hash):
        raise RunError(
            f"the corpus in {corpus.folder} is not the one that this run is about (its content hash is "
            f"{corpus.content_hash}, not {config.data_hash}); give its folder with --data"
        )
    if config.model.vocab < corpus.vocab:
        raise RunError(f"the model's vocab {config.model.vocab} is smaller than the corpus' {corpus.vocab}")
    for name, tokens in (("train", corpus.train), ("valid", corpus.valid)):
        if len(tokens) <= config.context_len:
            raise RunError(
                f"the {name} split of {corpus.folder} has {len(tokens)} tokens, fewer than one row of "
                f"{config.context_len + 1}; choose a shorter --context or more text"
            )
    if config.batch % (world * config.micro_batch):
        raise RunError(
            f"batch {config.batch} is not a multiple of {world} devices times micro_batch "
            f"{config.micro_batch}"
        )
    return dataclasses.replace(config, data_hash=corpus.content_hash)


OTHER = "Restore it from a copy, or choose another --out."


def _check(folder: Path, config: PretrainConfig) -> dict[str, Any] | None:
    """What config.json holds, None if there is none. RunError if it is another run; its corpus may move."""
    path = folder / "config.json"
    if not path.exists():
        return None
    held = files.read_json(path, OTHER)
    if said := settings.differ({**held, "data": config.data}, config.to_dict()):
        raise RunError(
            f"{folder} holds a run with another config (in {path.name}, {said}); choose another --out"
        )
    return held


def _claim(folder: Path, config: PretrainConfig, fabric: Fabric, in_order: bool) -> None:
    """Write what this run is, where the folder does not say so yet, or where its corpus is by now.

    After the first step, before anything else is written: a run that is refused earlier leaves its folder to
    the corrected command.
    """
    if not fabric.is_global_zero:
        return
    path, held = folder / "config.json", _check(folder, config)
    if held is not None:
        if held.get("data") != config.data:
            files.write_json(path, config.to_dict())
    else:
        where = environment.describe(str(fabric.device), torch.get_num_threads())
        strategy = type(fabric.strategy).__name__
        where |= {"devices": fabric.world_size, "strategy": strategy, "in_order": in_order}
        files.write_json(folder / "environment.json", where)
        files.write_json(path, config.to_dict())


# --------------------------------------------------------------------------------------------- the trainer


class Pretrainer:
    """A model in training, in each process of a run."""

    def __init__(
        self,
        config: PretrainConfig,
        corpus: Corpus,
        folder: Path,
        fabric: Fabric,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_line: Callable[[dict[str, Any]], None] = lambda line: None,
    ) -> None:
        self.config, self.corpus, self.folder, self.fabric = config, corpus, folder, fabric
        self.on_progress, self.on_line = on_progress, on_line
        self.device, self.world = fabric.device, fabric.world_size
        self.metrics = folder / "metrics.jsonl"
        self.order = Order(len(corpus.train), config.context_len, config.seed)
        self.uncompiled: dict[str, str] = {}
        """Mixers that torch.compile fails on, and why."""
        self._build()
        self.claim: Callable[[], None] = lambda: None
        """Called once, after the first step and before anything is written."""
        self.step, self.seconds = 0, 0.0
        self.best: float | None = None
        self.valid_loss: float | None = None
        self.losses: list[Tensor] = []
        """Loss and norm of the gradient of each step since they were last told, on the device."""
        self.told, self.pace = time.monotonic(), 0.0
        peak = peak_flops(self.device)
        flops = flops_per_token(self.model, config.context_len)
        self.share_per_pace = None if peak is None else flops / (peak * self.world)
        self.reader = concurrent.futures.ThreadPoolExecutor(1)
        self.writer = Background()
        self._resume()
        self.coming = self.reader.submit(self._rows, self.step)

    def _build(self) -> None:
        """Model, pass and AdamW; every process builds the same weights and then keeps its part."""
        config, dtype = self.config, torch.bfloat16 if self.config.precision == "bf16" else None
        with seeded(config.seed):
            self.model = config.model.build()
        self.model = self.model.to(self.device)
        self._set_forms(dtype)
        if config.compile:
            self.uncompiled = compile_blocks(self.model, config.micro_batch, config.context_len, dtype)
            for name, why in self.uncompiled.items():
                warnings.warn(f"torch.compile fails on '{name}', which runs without it: {why}", stacklevel=2)
        self.module = self.fabric.setup_module(LanguageModelLoss(self.model, dtype, config.recompute))
        self._set_forms(dtype)  # moved to its device a model chooses them anew
        names = decayed(self.model)
        groups: list[dict[str, Any]] = [
            {"params": [w for name, w in self.model.named_parameters() if (name in names) == decays],
             "weight_decay": config.weight_decay if decays else 0.0}
            for decays in (True, False)
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )

    def _set_forms(self, dtype: torch.dtype | None) -> None:
        """Which form runs depends on the dtype that a mixer will see."""
        for mixer in self.model.mixers:
            mixer.form = mixer.config.resolved_form(self.device, dtype or torch.float32)

    # ------------------------------------------------------------------------------------------ the loop

    def run(self, should_stop: Callable[[], bool], checkpoint_seconds: float) -> dict[str, Any]:
        try:
            self._train(should_stop, checkpoint_seconds)
            self._write_later("model.safetensors", self._weights())
            self.writer.wait()
        finally:
            self.reader.shutdown(cancel_futures=True)
            self.writer.close()
        return Result(
            steps=self.step,
            tokens=self.tokens,
            valid_loss=self.valid_loss,
            valid_perplexity=None if self.valid_loss is None else perplexity(self.valid_loss),
            best_valid_loss=self.best,
            seconds=round(self.seconds, 3),
            parameters=self.model.parameter_count(),
            forms=tuple(mixer.form for mixer in self.model.mixers),
            uncompiled=self.uncompiled,
        ).to_dict()

    @property
    def tokens(self) -> int:
        """Read so far, over all devices."""
        return self.step * self.config.batch * self.config.context_len

    def _train(self, should_stop: Callable[[], bool], checkpoint_seconds: float) -> None:
        config = self.config
        self.told = saved = time.monotonic()
        claimed = False
        while self.step < config.steps:
            self.train_step()
            if not claimed:
                self.claim()
                claimed = True
            last = self.step == config.steps
            evaluate = last or self.step % config.evaluate_every == 0
            if not evaluate and not self._time_to_tell():
                continue
            self._tell()
            stop, late = self.fabric.broadcast((should_stop(), time.monotonic() - saved > checkpoint_seconds))
            if evaluate:
                self._evaluate()
            if evaluate or stop or late:
                self._save()
                saved = time.monotonic()
            if stop and not last:
                self.writer.wait()
                self._end(Stopped())
            self.told = time.monotonic()

    def train_step(self) -> Tensor:
        """One step; returns its loss and its gradient's norm, on the device."""
        config = self.config
        rows_BN = self.coming.result().to(self.device, non_blocking=True)
        self.coming = self.reader.submit(self._rows, self.step + 1)
        parts = rows_BN.split(config.micro_batch)
        total = torch.zeros((), device=self.device)
        for index, part in enumerate(parts):
            more = self.world > 1 and index + 1 < len(parts)
            with self.fabric.no_backward_sync(self.module, more) if more else contextlib.nullcontext():
                loss = self.module(part) / len(parts)
                self.fabric.backward(loss)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        told = torch.stack((total, whole(norm)))
        self.losses.append(told)
        return told

    def _rows(self, step: int) -> Tensor:
        """This process' part of a step's rows, (B, N): the work of another thread, one step ahead."""
        length, share = self.config.context_len + 1, self.config.batch // self.world
        first = self.fabric.global_rank * share
        starts = self.order.rows(step, self.config.batch)[first : first + share]
        rows_BN = torch.from_numpy(np.stack([self.corpus.train[s : s + length] for s in starts.tolist()]))
        return rows_BN.pin_memory() if self.device.type == "cuda" else rows_BN

    def _time_to_tell(self) -> bool:
        """In several processes by the step alone, or they would not agree."""
        if self.step % TELL_STEPS == 0:
            return True
        return self.world == 1 and time.monotonic() - self.told > TELL_SECONDS

    def _tell(self) -> None:
        """Fetch and write down the losses of the steps since the last time; stop if they are no numbers."""
        if not self.losses:
            return
        steps_S2 = self.fabric.all_reduce(torch.stack(self.losses), reduce_op="mean").tolist()
        now = time.monotonic()
        first, config = self.step - len(steps_S2), self.config
        self.seconds += now - self.told
        self.pace = len(steps_S2) * config.batch * config.context_len / (now - self.told)
        self.told, self.losses = now, []
        for index, (loss, norm) in enumerate(steps_S2):
            step = first + index + 1
            if not math.isfinite(loss) or not math.isfinite(norm):
                self._diverged(step, f"loss {loss:g}, gradient norm {norm:g}")
            self._line(
                {
                    "step": step,
                    "tokens": step * config.batch * config.context_len,
                    "loss": loss,
                    "learning_rate": config.rate(step - 1),
                    "grad_norm": norm,
                    "tokens_per_s": round(self.pace),
                    "mfu": self.mfu,
                    "memory": memory_bytes(self.device),
                }
            )
        if self.fabric.is_global_zero:
            loss = steps_S2[-1][0]
            self.on_progress(Progress(self.step, config.steps, loss, self.pace, self.mfu, self.valid_loss))

    @property
    def mfu(self) -> float | None:
        return None if self.share_per_pace is None else round(self.pace * self.share_per_pace, 4)

    def _line(self, line: dict[str, Any]) -> None:
        if self.fabric.is_global_zero:
            files.append_line(self.metrics, line)
            self.on_line(line)

    def _diverged(self, step: int, what: str) -> NoReturn:
        self.writer.wait()
        last = self.folder / "last.safetensors"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        rate = self.config.rate(step - 1)
        self._end(
            RunError(
                f"training diverged at step {step}: {what} at learning rate {rate:.3g}; {kept}. The same "
                "command would diverge again: choose a smaller --learning-rate, a longer --warmup or "
                "--precision fp32, and another --out"
            )
        )

    def _end(self, error: Exception) -> NoReturn:
        """Leave together: the first process says why."""
        self.fabric.barrier()
        raise error if self.fabric.is_global_zero else SystemExit(0)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def _evaluate(self) -> None:
        """The mean loss over the first windows of the validation split, as many for each process.

        Without torch.compile: it would compile passes without gradients, and the last rows, anew for a few
        passes, and may fail on them though it took the training.
        """
        config, valid = self.config, self.corpus.valid
        windows = min(config.evaluate_rows, (len(valid) - 1) // config.context_len)
        share = max(1, windows // self.world)
        first = self.fabric.global_rank * share % windows
        starts = [window * config.context_len for window in range(first, min(first + share, windows))]
        rows = np.stack([valid[start : start + config.context_len + 1] for start in starts])
        total = torch.zeros((), device=self.device)
        for part in torch.from_numpy(rows).split(config.micro_batch):
            total += self.module(part.to(self.device)) * len(part)
        self.valid_loss = float(self.fabric.all_reduce(total / len(starts), reduce_op="mean"))
        if not math.isfinite(self.valid_loss):  # the last step's update broke it
            self._diverged(self.step, f"validation loss {self.valid_loss:g}")
        self._line(
            {
                "step": self.step,
                "tokens": self.tokens,
                "valid_loss": self.valid_loss,
                "valid_perplexity": perplexity(self.valid_loss),
            }
        )
        if self.best is None or self.valid_loss < self.best:
            self.best = self.valid_loss
            self._write_later("best.safetensors", self._weights())

    # ---------------------------------------------------------------------------------------- checkpoints

    def _weights(self) -> dict[str, Tensor]:
        """Weights and lasting buffers, whole, copied to the CPU in the first process; empty in the others."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            if (copied := self._copied(tensor)) is not None:
                found[name] = copied
        return found

    def _moments(self) -> dict[str, Tensor]:
        """AdamW's moments, likewise, as exp_avg.NAME and exp_avg_sq.NAME."""
        found = {}
        for name, weight in self.model.named_parameters():
            for key in MOMENTS:
                if (copied := self._copied(self.optimizer.state[weight][key])) is not None:
                    found[f"{key}.{name}"] = copied
        return found

    def _copied(self, tensor: Tensor) -> Tensor | None:
        tensor = whole(tensor.detach())
        if not self.fabric.is_global_zero:
            return None
        return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)

    def _save(self) -> None:
        """Begin to write a checkpoint: what it holds is copied now, the file is made by another thread."""
        state = RunState(
            step=self.step,
            seconds=self.seconds,
            best=self.best,
            valid_loss=self.valid_loss,
            metrics_bytes=files.size_on_disk(self.metrics) if self.fabric.is_global_zero else 0,
        )
        weights = {f"model.{name}": tensor for name, tensor in self._weights().items()}
        self._write_later("last.safetensors", {**weights, **self._moments()}, state)

    def _write_later(self, name: str, tensors: dict[str, Tensor], state: RunState | None = None) -> None:
        """Have the other thread replace a file of the run folder, after what it was given before."""
        if not self.fabric.is_global_zero:
            return
        about = {
            "state": json.dumps((state or RunState(step=self.step)).to_dict()),
            "model": json.dumps(self.config.model.to_dict()),
        }
        self.writer.do(checkpoints.write, self.folder / name, tensors, about)

    def _resume(self) -> None:
        """Return to the last checkpoint; lines of metrics written after it will be written again."""
        path = self.folder / "last.safetensors"
        if not path.exists():
            if self.fabric.is_global_zero:
                self.metrics.unlink(missing_ok=True)
            return
        weights = self.model.state_dict()
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        with checkpoints.opened(path, "Remove it to start this run again.") as file:
            state = _state_of(file, self.config.model)
            if state.step > self.config.steps:
                raise file.damaged(f"it is of step {state.step:,} of {self.config.steps:,}")
            targets = {f"model.{name}": tensor for name, tensor in weights.items()}
            for weight in self.model.parameters():
                moments = self.optimizer.state[weight]
                moments["step"] = torch.tensor(float(state.step), device=self.device)
                for key in MOMENTS:
                    moments[key] = torch.zeros_like(weight)
                    targets[f"{key}.{names[id(weight)]}"] = moments[key]
            file.fill(targets, put=put)
        self.step, self.seconds, self.best, self.valid_loss = (
            state.step, state.seconds, state.best, state.valid_loss
        )  # fmt: skip
        if self.fabric.is_global_zero and (lost := files.shorten(self.metrics, state.metrics_bytes)):
            warnings.warn(
                f"{self.metrics} lacks {lost:,} bytes that were there at step {self.step:,}", stacklevel=2
            )


def perplexity(loss: float) -> float:
    """Of a mean loss in nats, as large as a number can be."""
    return math.exp(min(loss, 700.0))


MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Result(Config):
    """What result.json holds, once a run has ended."""

    steps: NonNegativeInt
    tokens: NonNegativeInt
    """Read in training, over all devices."""
    valid_loss: NonNegativeFloat | None
    """Mean cross-entropy on the validation text, in nats."""
    valid_perplexity: NonNegativeFloat | None
    best_valid_loss: NonNegativeFloat | None
    seconds: NonNegativeFloat
    """Of training, over all calls."""
    parameters: NonNegativeInt
    forms: tuple[str, ...]
    """Which form of each layer's mixer ran."""
    uncompiled: dict[str, str] = dataclasses.field(default_factory=dict)
    """Mixers that torch.compile failed on, and why."""


@dataclass(frozen=True, kw_only=True)
class RunState(Config):
    """What a checkpoint says beside its tensors."""

    step: NonNegativeInt
    seconds: NonNegativeFloat = 0.0
    """Of training, over all calls."""
    best: NonNegativeFloat | None = None
    """The lowest validation loss so far."""
    valid_loss: NonNegativeFloat | None = None
    metrics_bytes: NonNegativeInt = 0
    """Of metrics.jsonl at this step; what is behind is written again."""


def _state_of(file: checkpoints.TensorFile, model: ModelConfig) -> RunState:
    """What a checkpoint says of its run; RunError if it is of another model than the config."""
    if "state" not in file.about:
        raise file.damaged("its header does not say which step it is of")
    if "model" in file.about and model != ModelConfig.parse(file.about["model"], file.path, file.way_out):
        raise file.damaged("its header describes another model than config.json")
    return RunState.parse(file.about["state"], f"the header of {file.path}", file.way_out)


# ------------------------------------------------------------------------------------------- afterwards


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds: a model to evaluate, and what it was trained on."""

    model: Model
    config: PretrainConfig
    corpus: Corpus
    step: int


def step_of(path: Path, model: ModelConfig) -> int:
    """The training step that a checkpoint is of. Raises RunError if it is damaged, or of another model."""
    with checkpoints.opened(path, COPY) as file:
        return _state_of(file, model).step


COPY = "Get it from a copy, or train again in another folder."


def load_run(
    folder: Path, which: Literal["best", "last", "model"] | None = None, *, device: torch.device | str = "cpu"
) -> LoadedRun:
    """A trained model, for evaluation, with its config and corpus.

    Args:
        which: the checkpoint: of the lowest validation loss, the last one, or the end's; None for the end's,
            else the best, else the last.

    Raises:
        RunError: the folder holds no such checkpoint, or a damaged one, or the corpus is another by now.
    """
    names = (which,) if which else ("model", "best", "last")
    path = next((p for name in names if (p := folder / f"{name}.safetensors").exists()), None)
    missing = "config.json" if not (folder / "config.json").exists() else f"{which or 'model'}.safetensors"
    if path is None or missing == "config.json":
        raise RunError(f"{folder} holds no language model ({missing} is missing); `holdall train` makes one")
    config = PretrainConfig.read(folder / "config.json")
    corpus = open_data(config)
    _checked(config, corpus, 1)
    with checkpoints.opened(path, COPY) as file:
        step = _state_of(file, config.model).step  # before a forged config is built
        model = config.model.build()
        file.fill(model.state_dict(), prefix="model." if path.stem == "last" else "", put=put)
    return LoadedRun(model.to(device).eval(), config, corpus, step)


@torch.no_grad()
def generate(
    model: Model, tokens_BT: Tensor, count: int, *, vocab: int, temperature: float = 0.8, seed: int = 0
) -> Tensor:
    """`count` more tokens for each row, (B, count): the prompt is read once, then token by token.

    Args:
        vocab: only ids below are drawn: a model's vocabulary may be padded.
        temperature: 0 takes the likeliest token.
        seed: of the draws, which are made on the CPU: the same on every device.

    Raises:
        ValueError: a setting is out of range, the prompt is empty or has ids that the model does not know, or
            the logits are NaN or infinite.
    """
    settings.check("count", count, NonNegativeInt)
    settings.check("temperature", temperature, NonNegativeFloat)
    settings.check("vocab", vocab, Annotated[int, Range(least=1, most=model.config.vocab)])
    rows, length = tokens_BT.shape
    if not length:
        raise ValueError("the prompt has no tokens: give at least one, such as the corpus' end of a document")
    if rows and not 0 <= int(tokens_BT.min()) <= int(tokens_BT.max()) < model.config.vocab:
        raise ValueError(
            f"the prompt has ids outside of the model's vocabulary, 0 to {model.config.vocab - 1}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn_BN = torch.empty(rows, count, dtype=torch.long)
    if not rows or not count:
        return drawn_BN
    h_BTD, states = model.hidden(tokens_BT)
    for place in range(count):
        logits_BV = (h_BTD[:, -1] @ model.embed.weight.T)[:, :vocab].float().cpu()
        if not logits_BV.isfinite().all():
            raise ValueError("the model's logits are NaN or infinite: its weights are, or it diverged")
        drawn_BN[:, place] = _drawn(logits_BV, temperature, generator)
        if place < count - 1:
            next_B1 = drawn_BN[:, place : place + 1].to(tokens_BT.device)
            h_BTD, states = model.hidden(next_B1, states, inplace=True)
    return drawn_BN


def _drawn(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token of each row, (B,).

    Divided in fp64, and after the largest logit is subtracted: the smallest temperature then gives -inf where
    a token is less likely than the likeliest, never NaN.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    below_BV = logits_BV.double() - logits_BV.amax(-1, keepdim=True)
    p_BV = (below_BV / temperature).softmax(-1).float()
    return torch.multinomial(p_BV, 1, generator=generator)[:, 0]
