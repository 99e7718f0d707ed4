"""The command `holdall train`: what it is to train from what was typed, a bar, and samples at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from holdall import language_model, mixers
from holdall.commands import TELL_SECONDS, Words, console, resolve_device
from holdall.engine import EngineConfig, Request, Sampling
from holdall.files import RunError
from holdall.language_model import LanguageModel
from holdall.model import ModelConfig
from holdall.recipes import presets
from holdall.text.corpus import Tokens
from holdall.training.devices import Strategy, launcher
from holdall.training.language_models import (
    PretrainConfig,
    PretrainProgress,
    Stopped,
    open_data,
    perplexity,
    pretrain,
)

SAMPLES, PROMPT, WRITTEN = 3, 64, 192
"""How many samples are printed, tokens of the validation text that each continues, and tokens of each."""


def train(
    name: str,
    out: Path | None,
    pattern: Sequence[str],
    shape: dict[str, int | None],
    changes: dict[str, Any],
    device: str,
    devices: int,
    nodes: int,
    strategy: Strategy,
    log: Sequence[str],
    load: Sequence[Path],
    in_order: bool,
) -> int:
    """The command; returns the exit status.

    `shape` has width, depth and mlp of a pattern, None where it was not given; `changes` the fields of
    PretrainConfig that were.
    """
    out = out or Path("runs") / ("pattern" if pattern else name)
    try:
        for file in load:
            mixers.load(file)
        device = resolve_device(device)
        fabric = launcher(device, devices, strategy, nodes)
        console.quiet = not fabric.is_global_zero
        config = configured(name, pattern, shape, changes, device, fabric.world_size)
        _print_header(config, name, pattern, fabric, out)
        loggers = [LOGGERS[kind](out, config) for kind in log if fabric.is_global_zero]

        def log_line(line: dict[str, Any]) -> None:
            for log in (view.line, *loggers):
                log(line)

        with _View(config) as view, _interrupted() as stop, _warnings_in_a_line():
            result = pretrain(
                config,
                out,
                fabric=fabric,
                on_progress=view.progress,
                on_line=log_line,
                should_stop=stop,
                in_order=in_order,
            )
        if fabric.is_global_zero:
            _print_result(result, out)
            _print_samples(language_model.load(out, device=device), open_data(config).valid)
    except Stopped:
        console.print(f"Stopped. Saved in {out}; the same command resumes from here.", soft_wrap=True)
        return 130
    return 0


def configured(
    name: str,
    pattern: Sequence[str],
    shape: dict[str, int | None],
    changes: dict[str, Any],
    device: str,
    world: int = 1,
) -> PretrainConfig:
    """The config that a command line means. Raises KeyError, TypeError or ValueError with the way out."""
    if not pattern and any(value is not None for value in shape.values()):
        raise ValueError("--width, --depth and --mlp are those of a --pattern; a preset has its own")
    on_gpu = device != "cpu"
    fields = {
        "precision": "bf16" if on_gpu else "fp32",
        "compile": on_gpu,
        **presets.training(name),
        **changes,
    }
    if fields.get("data"):
        fields["data"] = str(Path(fields["data"]).absolute())
    draft = PretrainConfig(model=presets.preset("based-mini", 2), **fields)  # the corpus decides its vocab
    corpus = open_data(draft)
    if pattern:
        model = _patterned(pattern, corpus.vocab, **shape)
    else:
        model = presets.preset(name, corpus.vocab, context_len=draft.context_len)
    config = dataclasses.replace(draft, model=model, data_hash=corpus.content_hash)
    if "micro_batch" not in changes:  # as much as is left for each device
        config = dataclasses.replace(
            config, micro_batch=math.gcd(config.micro_batch, max(1, config.batch // world))
        )
    return config


def _patterned(
    pattern: Sequence[str], vocab: int, width: int | None, depth: int | None, mlp: int | None
) -> ModelConfig:
    """A model of mixers in turn, as MIXER or MIXER:option=value,option=value."""
    width = width or 256
    kinds = [mixers.configured(each, width)[1] for each in pattern]
    layers = tuple(kinds[layer % len(kinds)] for layer in range(depth or max(len(kinds), 4)))
    return ModelConfig(
        vocab=presets.padded(vocab, layers),
        width=width,
        layers=layers,
        mlp=2 * width if mlp is None else mlp,
        mlp_kind="swiglu",
        norm="rms",
    )


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show a warning's message, without its place in the code, above the progress bar."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(f"warning: {message}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first time training stops after its step, the second time at once."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)
        console.print("Stopping after this step; once more to stop at once.")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------------------------------------- what is printed


def _print_header(config: PretrainConfig, name: str, pattern: Sequence[str], fabric: Any, out: Path) -> None:
    device, world = torch.device(fabric.device), fabric.world_size
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    forms = sorted({layer.resolved_form(device, dtype) for layer in config.model.layers})
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    where += f" x {world}, {type(fabric.strategy).__name__.removesuffix('Strategy')}" if world > 1 else ""
    tokens = config.steps * config.batch * config.context_len
    text = (
        f": {len(config.model.layers)} layers of width {config.model.width} on {where}, form "
        f"{' and '.join(forms)}, {config.precision}{', compiled' if config.compile else ''}; "
        f"{config.steps:,} steps of {config.batch} x {config.context_len:,} tokens, "
        f"{tokens / 1e6:,.1f} million; "
    )
    if config.masking:
        text += (
            f"{config.mlm_share:.0%} of a prefix of {config.prefix:,} are masked, with a loss of weight "
            f"{config.mlm_weight:g}; "
        )
    text += f"in {out}"
    console.print(Text.assemble((" ".join(pattern) or name, "bold"), text), soft_wrap=True)


class _View:
    """A bar with loss, speed and time left; without a terminal, a line now and then and per evaluation."""

    def __init__(self, config: PretrainConfig) -> None:
        self.bars = Bars(
            BarColumn(),
            Words("{task.completed:,} of {task.total:,}  {task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.steps = config.steps
        self.bar = self.bars.add_task("", total=config.steps, status="", visible=not console.quiet)
        self.printed_at = time.monotonic()

    def __enter__(self) -> _View:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def progress(self, progress: PretrainProgress) -> None:
        status = f"loss {progress.loss:.3f}  {progress.tokens_per_s:,.0f} tokens/s"
        status += f"  {progress.mfu:.0%} of peak" if progress.mfu is not None else ""
        if progress.valid_loss is not None:
            status += f"  valid perplexity {perplexity(progress.valid_loss):.2f}"
        self.bars.update(self.bar, completed=progress.step, status=status)
        if not console.is_terminal and time.monotonic() - self.printed_at > TELL_SECONDS:
            self.printed_at = time.monotonic()
            console.print(f"step {progress.step:,} of {progress.steps:,}: {status}")

    def line(self, line: dict[str, Any]) -> None:
        if "valid_loss" in line:
            losses = f"loss {line['valid_loss']:.4f}, perplexity {line['valid_perplexity']:.3f}"
            console.print(f"step {line['step']:,} of {self.steps:,}: validation {losses}")


def _print_result(result: dict[str, Any], out: Path) -> None:
    pace = result["tokens"] / max(result["seconds"], 1e-3)
    console.print(
        f"{result['parameters']:,} parameters; {result['tokens']:,} tokens in {result['seconds']:,.0f} s "
        f"({pace:,.0f}/s); validation perplexity {result['valid_perplexity']:.3f}; in {out}",
        soft_wrap=True,
    )


def _print_samples(trained: LanguageModel, valid: Tokens) -> None:
    """How the model continues the validation text from a few places."""
    tokenizer = trained.tokenizer
    if len(valid) < 2 * PROMPT:
        return
    starts = [int(share * (len(valid) - PROMPT)) for share in torch.linspace(0.1, 0.9, SAMPLES).tolist()]
    prompts = [valid[start : start + PROMPT].tolist() for start in starts]
    requests = [
        Request(prompt=tuple(prompt), sampling=Sampling(max_tokens=WRITTEN, temperature=0.8, seed=i))
        for i, prompt in enumerate(prompts)
    ]
    engine = trained.engine(EngineConfig(rows=SAMPLES, max_context=PROMPT + WRITTEN))
    written = [""] * SAMPLES
    for piece in engine.run(requests):
        written[piece.ticket - 1] += piece.text
    for prompt, rest in zip(prompts, written, strict=True):
        console.print()
        console.print(Text.assemble((tokenizer.decode(prompt), "dim"), (rest, "bold")))


# ----------------------------------------------------------------------------------------------- loggers


Log = Callable[[dict[str, Any]], None]
"""What is called with each line of metrics.jsonl, which remains the truth."""


def _tensorboard(out: Path, config: PretrainConfig) -> Log:
    """Lightning Fabric's logger: event files in the run folder, for `tensorboard --logdir`."""
    try:
        from lightning_fabric.loggers import TensorBoardLogger

        logger = TensorBoardLogger(out, name="tensorboard", version="")
        logger.experiment  # noqa: B018 - which imports tensorboard
    except ImportError as error:
        raise RunError(
            f"--log tensorboard needs the packages lightning-fabric and tensorboard: {error}"
        ) from error
    return _logging(logger)


def _wandb(out: Path, config: PretrainConfig) -> Log:
    """A run of Weights & Biases by the name of the run folder; a resumed one continues there."""
    try:
        import wandb
    except ImportError as error:
        raise RunError(f"--log wandb needs the package wandb: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="holdall", name=out.name, id=out.name, resume="allow", dir=str(out), config=config.to_dict()
    )
    return lambda line: run.log(_values(line), step=line["step"])


def _logging(logger: Any) -> Log:
    """Each line to one of Fabric's loggers, at once."""

    def log(line: dict[str, Any]) -> None:
        logger.log_metrics(_values(line), step=line["step"])
        logger.save()

    return log


def _values(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step" and value is not None}


LOGGERS: dict[str, Callable[[Path, PretrainConfig], Log]] = {"tensorboard": _tensorboard, "wandb": _wandb}
