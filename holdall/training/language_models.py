"""Pretraining: a language model of any mixers on the token shards of a corpus, on one device or many.

    rows      windows of the training split in an order that is a function of (seed, step); of each step's
              rows every device takes its part, in passes of `micro_batch` rows whose gradients are summed
    pass      holdall/training/devices.py; models with a prefix fill in masked tokens, too (masking.py)
    update    gradients clipped by their norm, AdamW with warm-up and a cosine

Everything that decides a result is in the config; the state of a run is the step, the weights and AdamW's
moments. The run folder (holdall/training/chassis.py) holds them, and the same call resumes from there,
however the first one ended: bit-exactly on the same device and number of devices.

    tokenizer.json      with which the folder is a model's: see holdall/language_model.py
    metrics.jsonl       a line per step and per evaluation
    last.safetensors    the checkpoint: weights and moments
    best.safetensors    weights at the lowest validation loss
    model.safetensors   weights at the end

Letters: B rows, N = T + 1 tokens of a row, M masked tokens, V vocabulary; S steps, L losses of each.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from holdall import checkpoints, files, language_model
from holdall.contract import Config
from holdall.files import RunError
from holdall.model import ModelConfig, repeatable, seeded
from holdall.precision import choose_forms, dtype_of
from holdall.settings import (
    NonNegativeFloat,
    NonNegativeInt,
)
from holdall.text.corpus import Corpus, open_corpus
from holdall.text.default import default_corpus
from holdall.text.tokenizers import Tokenizer
from holdall.text.windows import Order
from holdall.training import schedule
from holdall.training.chassis import TRAIN_AGAIN, RunFolder, RunState, Stopped, read_state
from holdall.training.compiled import compile_blocks
from holdall.training.devices import Fabric, LanguageModelLoss, launcher, put, whole
from holdall.training.flops import flops_per_token, memory_bytes, peak_flops
from holdall.training.masking import Masked, Masking, check_mask_token
from holdall.training.optimizer import MOMENTS, decayed, moments
from holdall.training.options import PretrainOptions


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(PretrainOptions, Config):
    """A model, a corpus, and how the one learns from the other (holdall/training/options.py)."""

    model: ModelConfig
    """The language model."""

    def validate(self) -> None:
        if 0 < self.model.positions < self.context_len:
            raise ValueError(
                f"the model has {self.model.positions} positions, context_len is {self.context_len}"
            )
        if self.prefix >= self.context_len:
            raise ValueError(
                f"the model's prefix of {self.prefix} tokens takes all of a row of {self.context_len}, of "
                "which nothing would be predicted: take a longer context, twice the prefix say"
            )

    @property
    def prefix(self) -> int:
        """Tokens at a row's start that see each other, E; 0 for none."""
        return max(getattr(layer, "prefix", 0) for layer in self.model.layers)

    @property
    def masking(self) -> Masking | None:
        """What masks tokens of the prefix; None where that is not trained."""
        if not (self.prefix and self.mlm_weight and self.mlm_share):
            return None
        return Masking(prefix=self.prefix, share=self.mlm_share, seed=self.seed, context_len=self.context_len)

    @property
    def predictions(self) -> float:
        """Predictions of a row that carry a loss: of next tokens, and on average of masked ones."""
        next_tokens = self.context_len - max(self.prefix - 1, 0)
        masked = self.masking.share * (self.prefix - 1) if self.masking else 0.0
        return next_tokens + masked

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        peak = self.learning_rate * schedule.warmup(step, self.warmup)
        return peak * schedule.cosine(progress, self.min_learning_rate)


@dataclass(frozen=True)
class PretrainProgress:
    """Progress of a run, for progress bars."""

    step: int
    """Steps done."""
    steps: int
    """Steps of the whole run."""
    loss: float
    """Training loss of the last step, in nats per token; where tokens are masked the weighted sum of both."""
    tokens_per_s: float
    """Tokens read per second, over all devices."""
    mfu: float | None
    """Share of the devices' peak operations; None where that is unknown."""
    valid_loss: float | None
    """Validation loss of the last evaluation, in nats per token; None before the first."""


CHECKPOINT_SECONDS = 60.0
REPORT_STEPS, REPORT_SECONDS = 10, 0.5
"""How often losses are fetched, for which a GPU waits: after so many steps, or seconds in one process."""


def pretrain(
    config: PretrainConfig,
    folder: Path,
    *,
    fabric: Fabric | None = None,
    on_progress: Callable[[PretrainProgress], None] = lambda progress: None,
    on_line: Callable[[dict[str, Any]], None] = lambda line: None,
    should_stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    in_order: bool = True,
) -> dict[str, Any]:
    """Train a language model, or resume it, and return what result.json holds.

    With several devices every process calls this; the first one writes, and all must see the folder.

    Args:
        folder: the run folder; made if needed. If it holds a checkpoint of the same config, training resumes
            from there, and if it holds a result, that is returned.
        fabric: what `launcher` returned; None for one process on the CPU.
        on_progress, on_line: called about twice a second, and with each line of metrics.jsonl; in the first
            process alone.
        should_stop: called twice a second, or every ten steps of several processes; True writes a checkpoint
            and raises Stopped.
        checkpoint_seconds: between checkpoints: the most work that a crash loses.
        in_order: on a GPU, use deterministic reductions, so that the same run is bit-identical.

    Raises:
        RunError: the folder cannot be written, is in use, or holds another config; the corpus is not the one
            that the config names; devices do not fit the batch; or the loss is NaN or infinite.
        Stopped: should_stop returned True. In processes other than the first either is SystemExit(0).
    """
    fabric = fabric or launcher()
    corpus = open_data(config)
    config = _checked(config, corpus, fabric.world_size)
    with (
        files.locked(folder) if fabric.is_global_zero else contextlib.nullcontext(),
        repeatable(fabric.device) if in_order else contextlib.nullcontext(),
    ):
        run = _run_folder(config, folder, corpus.tokenizer, fabric, in_order)
        if run.holds_run():
            run.claim(fabric.device)  # its corpus may have moved
        if run.result.exists():
            return Result.read(run.result, TRAIN_AGAIN).to_dict()
        fabric.launch()
        with _together(fabric):
            trainer = Pretrainer(
                config, corpus, folder, fabric, on_progress=on_progress, on_line=on_line, in_order=in_order
            )
            result = trainer.run(should_stop, checkpoint_seconds)
        if fabric.is_global_zero:
            files.write_json(run.result, result)
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


def open_data(config: PretrainConfig, where: object = "the config") -> Corpus:
    """The corpus that a config names. Raises RunError if it is another by now; `where` has the config."""
    corpus = open_corpus(Path(config.data)) if config.data else default_corpus()
    if config.data_hash not in ("", corpus.content_hash):
        raise RunError(
            f"the corpus in {corpus.folder} is not the one that this run is about (its content hash is "
            f"{corpus.content_hash}, not {config.data_hash} as in {where}); give its folder with --data"
        )
    return corpus


def _checked(config: PretrainConfig, corpus: Corpus, world: int) -> PretrainConfig:
    """The config with its corpus' hash, or a RunError that says what does not fit."""
    if config.model.vocab < corpus.vocab:
        raise RunError(f"the model's vocab {config.model.vocab} is smaller than the corpus' {corpus.vocab}")
    if config.masking is not None:
        try:
            check_mask_token(config.model, corpus.vocab)
        except ValueError as error:
            raise RunError(str(error)) from error
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


def _run_folder(
    config: PretrainConfig, folder: Path, tokenizer: Tokenizer, fabric: Fabric, in_order: bool
) -> RunFolder:
    strategy = type(fabric.strategy).__name__
    return RunFolder(
        folder,
        config,
        "last.safetensors",
        about=language_model.header_of(config.model, tokenizer),
        beside={language_model.TOKENIZER: tokenizer.to_json()},
        environment={"devices": fabric.world_size, "strategy": strategy, "in_order": in_order},
        writes=fabric.is_global_zero,
        may_move=("data",),  # the hash of its content decides
    )


# --------------------------------------------------------------------------------------------- the trainer


class Pretrainer:
    """A model in training, in each process of a run."""

    def __init__(
        self,
        config: PretrainConfig,
        corpus: Corpus,
        folder: Path,
        fabric: Fabric,
        on_progress: Callable[[PretrainProgress], None] = lambda progress: None,
        on_line: Callable[[dict[str, Any]], None] = lambda line: None,
        in_order: bool = True,
    ) -> None:
        self.config, self.corpus, self.fabric = config, corpus, fabric
        self.folder = _run_folder(config, folder, corpus.tokenizer, fabric, in_order)
        self.on_progress, self.on_line = on_progress, on_line
        self.device, self.world = fabric.device, fabric.world_size
        self.order = Order(len(corpus.train), config.context_len, config.seed)
        self.uncompiled: dict[str, str] = {}
        """Mixers that torch.compile fails on, and why."""
        self._build()
        self.step, self.seconds = 0, 0.0
        self.best: float | None = None
        self.valid_loss: float | None = None
        self.masking = config.masking
        self.losses: list[Tensor] = []
        """Of each step since the last report loss and gradient norm, and where tokens are masked the losses
        of next and of masked tokens, on the device."""
        self.reported_at, self.tokens_per_s = time.monotonic(), 0.0
        peak = peak_flops(self.device)
        flops = flops_per_token(self.model, config.context_len, config.predictions)
        self.share_per_token_per_s = None if peak is None else flops / (peak * self.world)
        self.reader = concurrent.futures.ThreadPoolExecutor(1)
        self._resume()
        self.next_rows = self.reader.submit(self._rows, self.step)

    def _build(self) -> None:
        """Model, pass and AdamW; every process builds the same weights and then keeps its part."""
        config, dtype = self.config, dtype_of(self.config.precision)
        with seeded(config.seed):
            self.model = config.model.build()
        self.model = self.model.to(self.device)
        choose_forms(self.model, dtype)
        if config.compile:
            self.uncompiled = compile_blocks(self.model, config.micro_batch, config.context_len, dtype)
            for name, why in self.uncompiled.items():
                warnings.warn(f"torch.compile fails on '{name}', which runs without it: {why}", stacklevel=2)
        self.module = self.fabric.setup_module(LanguageModelLoss(self.model, dtype, config.recompute))
        choose_forms(self.model, dtype)  # moved to its device a model chooses them again
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

    # ------------------------------------------------------------------------------------------ the loop

    def run(self, should_stop: Callable[[], bool], checkpoint_seconds: float) -> dict[str, Any]:
        with self.folder:
            try:
                self._train(should_stop, checkpoint_seconds)
                self.folder.write_later("model.safetensors", self._state(), self._weights())
            finally:
                self.reader.shutdown(cancel_futures=True)
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
        self.reported_at = time.monotonic()
        while self.step < config.steps:
            self.train_step()
            self.folder.claim(self.device)
            last = self.step == config.steps
            evaluate = last or self.step % config.evaluate_every == 0
            if not evaluate and not self._time_to_report():
                continue
            self._report()
            late = time.monotonic() - self.folder.saved_at > checkpoint_seconds
            stop, late = self.fabric.broadcast((should_stop(), late))
            if evaluate:
                self._evaluate()
            if evaluate or stop or late:
                self._save()
            if stop and not last:
                self.folder.wait()
                self._end(Stopped())
            self.reported_at = time.monotonic()

    def train_step(self) -> Tensor:
        """One step; returns what `losses` has of it, on the device."""
        config = self.config
        rows_BN, masked = self.next_rows.result()
        self.next_rows = self.reader.submit(self._rows, self.step + 1)
        parts = rows_BN.to(self.device, non_blocking=True).split(config.micro_batch)
        total, of_kinds = torch.zeros((), device=self.device), []
        for index, (part, of_part) in enumerate(zip(parts, masked, strict=True)):
            more = self.world > 1 and index + 1 < len(parts)
            with self.fabric.no_backward_sync(self.module, more) if more else contextlib.nullcontext():
                if of_part is None:
                    loss = self.module(part) / len(parts)
                else:
                    index_M = of_part.index_M.to(self.device, non_blocking=True)
                    losses_2 = self.module(part, of_part._replace(index_M=index_M)) / len(parts)
                    of_kinds.append(losses_2.detach())
                    loss = losses_2[0] + config.mlm_weight * losses_2[1]
                self.fabric.backward(loss)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        losses = torch.stack((total, whole(norm), *(torch.stack(of_kinds).sum(0) if of_kinds else ())))
        self.losses.append(losses)
        return losses

    def _rows(self, step: int) -> tuple[Tensor, Sequence[Masked | None]]:
        """This process' part of a step's rows, (B, N), and the masked tokens of each pass, None where none
        are; another thread reads them one step ahead."""
        config, length = self.config, self.config.context_len + 1
        share = config.batch // self.world
        first = self.fabric.global_rank * share
        starts = self.order.rows(step, config.batch)[first : first + share]
        rows_BN = torch.from_numpy(np.stack([self.corpus.train[s : s + length] for s in starts.tolist()]))
        pin = self.device.type == "cuda"
        rows_BN = rows_BN.pin_memory() if pin else rows_BN
        if self.masking is None:
            return rows_BN, [None] * (share // config.micro_batch)
        masked = self.masking.passes(step, config.batch, first, share, config.micro_batch)
        if pin:
            masked = [each._replace(index_M=each.index_M.pin_memory()) for each in masked]
        return rows_BN, masked

    def _time_to_report(self) -> bool:
        """In several processes by the step alone, or they would not agree."""
        if self.step % REPORT_STEPS == 0:
            return True
        return self.world == 1 and time.monotonic() - self.reported_at > REPORT_SECONDS

    def _report(self) -> None:
        """Fetch and log the losses since the last report; end the run if they are NaN or infinite."""
        if not self.losses:
            return
        steps_SL = self.fabric.all_reduce(torch.stack(self.losses), reduce_op="mean").tolist()
        now, config = time.monotonic(), self.config
        self.seconds += now - self.reported_at
        tokens = len(steps_SL) * config.batch * config.context_len
        self.tokens_per_s = tokens / (now - self.reported_at)
        self.reported_at, self.losses = now, []
        for step, (loss, norm, *of_kinds) in enumerate(steps_SL, self.step - len(steps_SL) + 1):
            if not math.isfinite(loss) or not math.isfinite(norm):
                self._diverged(step, f"loss {loss:g}, gradient norm {norm:g}")
            self._log(
                {
                    "step": step,
                    "tokens": step * config.batch * config.context_len,
                    "loss": loss,
                    **dict(zip(("ntp_loss", "mlm_loss"), of_kinds, strict=False)),
                    "learning_rate": config.rate(step - 1),
                    "grad_norm": norm,
                    "tokens_per_s": round(self.tokens_per_s),
                    "mfu": self.mfu,
                    "memory": memory_bytes(self.device),
                }
            )
        if self.fabric.is_global_zero:
            loss = steps_SL[-1][0]
            self.on_progress(
                PretrainProgress(self.step, config.steps, loss, self.tokens_per_s, self.mfu, self.valid_loss)
            )

    @property
    def mfu(self) -> float | None:
        if self.share_per_token_per_s is None:
            return None
        return round(self.tokens_per_s * self.share_per_token_per_s, 4)

    def _log(self, line: dict[str, Any]) -> None:
        self.folder.log(line)
        if self.fabric.is_global_zero:
            self.on_line(line)

    def _diverged(self, step: int, what: str) -> NoReturn:
        self.folder.wait()
        last = self.folder.checkpoint
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
        """End all processes together; the first one raises the error."""
        self.fabric.barrier()
        raise error if self.fabric.is_global_zero else SystemExit(0)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def _evaluate(self) -> None:
        """The mean loss over the first windows of the validation split, as many for each process.

        Without torch.compile: it would compile passes without gradients, and the last rows, again for a few
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
        self._log(
            {
                "step": self.step,
                "tokens": self.tokens,
                "valid_loss": self.valid_loss,
                "valid_perplexity": perplexity(self.valid_loss),
            }
        )
        if self.best is None or self.valid_loss < self.best:
            self.best = self.valid_loss
            self.folder.write_later("best.safetensors", self._state(), self._weights())

    # ---------------------------------------------------------------------------------------- checkpoints

    def _weights(self) -> dict[str, Tensor]:
        """Weights and lasting buffers, whole, copied to the CPU in the first process; empty in the others."""
        return self._copied(self.model.state_dict())

    def _moments(self) -> dict[str, Tensor]:
        """AdamW's moments, likewise, as exp_avg.NAME and exp_avg_sq.NAME."""
        states = {name: moments(self.optimizer, weight) for name, weight in self.model.named_parameters()}
        return self._copied(
            {f"{key}.{name}": state[key] for name, state in states.items() for key in MOMENTS}
        )

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())
            if self.fabric.is_global_zero:
                copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                copies[name] = copy.copy_(tensor)
        return copies

    def _state(self) -> PretrainState:
        return PretrainState(
            step=self.step,
            seconds=self.seconds,
            best=self.best,
            valid_loss=self.valid_loss,
            metrics_bytes=self.folder.metrics_bytes(),
        )

    def _save(self) -> None:
        """Begin to write a checkpoint: what it holds is copied now, the file is made by another thread."""
        weights = {f"model.{name}": tensor for name, tensor in self._weights().items()}
        self.folder.save(self._state(), {**weights, **self._moments()})

    def _resume(self) -> None:
        """Return to the last checkpoint, if there is one."""
        state = self.folder.resume(PretrainState, self.config.steps, self._fill)
        if state is not None:
            self.step, self.seconds = state.step, state.seconds
            self.best, self.valid_loss = state.best, state.valid_loss

    def _fill(self, file: checkpoints.TensorFile, state: PretrainState) -> None:
        _state_of(file, self.config.model)
        targets = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            adamw = moments(self.optimizer, weight)
            adamw["step"].fill_(state.step)
            targets |= {f"{key}.{name}": adamw[key] for key in MOMENTS}
        file.fill(targets, put=put)


def perplexity(loss: float) -> float:
    """The perplexity of a mean loss in nats; finite, however large."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True, kw_only=True)
class Result(Config):
    """What result.json holds, once a run has finished."""

    steps: NonNegativeInt
    """Training steps done."""
    tokens: NonNegativeInt
    """Tokens read in training, over all devices."""
    valid_loss: NonNegativeFloat | None
    """Mean cross-entropy on the validation text at the end, in nats per token."""
    valid_perplexity: NonNegativeFloat | None
    """The perplexity that it means."""
    best_valid_loss: NonNegativeFloat | None
    """The lowest validation loss of all evaluations, in nats per token."""
    seconds: NonNegativeFloat
    """Spent training, over all calls."""
    parameters: NonNegativeInt
    """The model's trained weights."""
    forms: tuple[str, ...]
    """Which form of each layer's mixer ran."""
    uncompiled: dict[str, str] = dataclasses.field(default_factory=dict)
    """Mixers that torch.compile failed on, and why."""


@dataclass(frozen=True, kw_only=True)
class PretrainState(RunState):
    """What a checkpoint says of a language model beside its tensors."""

    best: NonNegativeFloat | None = None
    """The lowest validation loss so far, in nats per token; None before the first evaluation."""
    valid_loss: NonNegativeFloat | None = None
    """The last validation loss, likewise."""


def _state_of(file: checkpoints.TensorFile, model: ModelConfig) -> PretrainState:
    """What a checkpoint says of its run; RunError if it is of another model than the config."""
    state = read_state(file, PretrainState)
    if "model" in file.about and model != ModelConfig.parse(file.about["model"], file.path, file.way_out):
        raise file.damaged("its header describes another model than config.json")
    return state
