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
from holdall.files import RunError
from holdall.language_model import LanguageModel, generate
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
"""How many samples are written, tokens of the validation text that each goes on from, and tokens of each."""


def train(
    name: str,
    data: Path | None,
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

    `shape` has width, depth and mlp of a pattern, `changes` fields of PretrainConfig; None is the preset's.
    """
    out = out or Path("runs") / ("pattern" if pattern else name)
    try:
        for file in load:
            mixers.load(file)
        device = resolve_device(device)
        fabric = launcher(device, devices, strategy, nodes)
        console.quiet = not fabric.is_global_zero
        config = configured(name, data, pattern, shape, changes, device, fabric.world_size)
        _print_header(config, name, pattern, fabric, out)
        trackers = [_TRACKERS[each](out, config) for each in log if fabric.is_global_zero]

        def tell(line: dict[str, Any]) -> None:
            for each in (view.line, *trackers):
                each(line)

        with _View(config) as view, _interrupted() as stop, _warnings_in_a_line():
            result = pretrain(
                config,
                out,
                fabric=fabric,
                on_progress=view.progress,
                on_line=tell,
                should_stop=stop,
                in_order=in_order,
            )
        if fabric.is_global_zero:
            _print_result(result, out)
            _print_samples(language_model.load(out, device=device), open_data(config).valid)
    except Stopped:
        told = f"Stopped. Everything so far is in {out}; the same command goes on from here."
        console.print(told, soft_wrap=True)
        return 130
    return 0


def configured(
    name: str,
    data: Path | None,
    pattern: Sequence[str],
    shape: dict[str, int | None],
    changes: dict[str, Any],
    device: str,
    world: int = 1,
) -> PretrainConfig:
    """The config that a command line means. Raises KeyError, TypeError or ValueError with the way out."""
    given = {field: value for field, value in changes.items() if value is not None}
    if not pattern and any(value is not None for value in shape.values()):
        raise ValueError("--width, --depth and --mlp are those of a --pattern; a preset has its own")
    fields = {**presets.training(name), **given}
    default = PretrainConfig.__dataclass_fields__["context_len"].default
    context_len = fields.get("context_len", default)
    corpus = open_data(PretrainConfig(model=_placeholder(), data=str(data or "")))
    if pattern:
        model = _patterned(pattern, corpus.vocab, **shape)
    else:
        model = presets.preset(name, corpus.vocab, context_len=context_len)
    on_gpu = device != "cpu"
    fields = {"precision": "bf16" if on_gpu else "fp32", "compile": on_gpu, **fields}
    config = PretrainConfig(
        model=model, data=str(data.absolute()) if data else "", data_hash=corpus.content_hash, **fields
    )
    if "micro_batch" not in given:  # as much as is left for each device
        config = dataclasses.replace(
            config, micro_batch=math.gcd(config.micro_batch, max(1, config.batch // world))
        )
    return config


def _placeholder() -> ModelConfig:
    return presets.preset("based-mini", 2)


def _patterned(
    pattern: Sequence[str], vocab: int, width: int | None, depth: int | None, mlp: int | None
) -> ModelConfig:
    """A model of mixers in turn, as MIXER or MIXER:option=value,option=value."""
    width = width or 256
    kinds = [mixers.configured(each, width)[1] for each in pattern]
    layers = tuple(kinds[layer % len(kinds)] for layer in range(depth or max(len(kinds), 4)))
    return ModelConfig(
        vocab=8 * math.ceil(vocab / 8),
        width=width,
        layers=layers,
        mlp=2 * width if mlp is None else mlp,
        mlp_kind="swiglu",
        norm="rms",
    )


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """As something said to the user, not as a place in the code; above the bar, not through it."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(f"warning: {message}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which here ends nothing by itself; the second time it does."""
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
        f"{tokens / 1e6:,.1f} million; in {out}"
    )
    console.print(Text.assemble((" ".join(pattern) or name, "bold"), text), soft_wrap=True)


class _View:
    """A bar with loss, speed and time left; without a terminal, a line now and then and per evaluation."""

    def __init__(self, config: PretrainConfig) -> None:
        self.bars = Bars(
            BarColumn(),
            Words("{task.completed:,} of {task.total:,}  {task.fields[says]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.steps = config.steps
        self.bar = self.bars.add_task("", total=config.steps, says="", visible=not console.quiet)
        self.told = time.monotonic()

    def __enter__(self) -> _View:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def progress(self, progress: PretrainProgress) -> None:
        says = f"loss {progress.loss:.3f}  {progress.tokens_per_s:,.0f} tokens/s"
        says += f"  {progress.mfu:.0%} of peak" if progress.mfu is not None else ""
        if progress.valid_loss is not None:
            says += f"  valid perplexity {perplexity(progress.valid_loss):.2f}"
        self.bars.update(self.bar, completed=progress.step, says=says)
        if not console.is_terminal and time.monotonic() - self.told > TELL_SECONDS:
            self.told = time.monotonic()
            console.print(f"step {progress.step:,} of {progress.steps:,}: {says}")

    def line(self, line: dict[str, Any]) -> None:
        if "valid_loss" in line:
            says = f"loss {line['valid_loss']:.4f}, perplexity {line['valid_perplexity']:.3f}"
            console.print(f"step {line['step']:,} of {self.steps:,}: validation {says}")


def _print_result(result: dict[str, Any], out: Path) -> None:
    pace = result["tokens"] / max(result["seconds"], 1e-3)
    console.print(
        f"{result['parameters']:,} parameters; {result['tokens']:,} tokens in {result['seconds']:,.0f} s "
        f"({pace:,.0f}/s); validation perplexity {result['valid_perplexity']:.3f}; in {out}",
        soft_wrap=True,
    )


def _print_samples(trained: LanguageModel, valid: Tokens) -> None:
    """How the model goes on from places of the validation text, its state carried from token to token."""
    model, tokenizer = trained.model, trained.tokenizer
    if len(valid) < 2 * PROMPT:
        return
    starts = [int(share * (len(valid) - PROMPT)) for share in torch.linspace(0.1, 0.9, SAMPLES).tolist()]
    prompts = [valid[start : start + PROMPT].tolist() for start in starts]
    written = generate(model, torch.tensor(prompts, device=model.device), WRITTEN, vocab=tokenizer.vocab)
    for prompt, rest in zip(prompts, written.tolist(), strict=True):
        if tokenizer.end in rest:
            rest = rest[: rest.index(tokenizer.end)]
        console.print()
        console.print(Text.assemble((tokenizer.decode(prompt), "dim"), (tokenizer.decode(rest), "bold")))


# ---------------------------------------------------------------------------------------------- trackers


Tell = Callable[[dict[str, Any]], None]


def _tensorboard(out: Path, config: PretrainConfig) -> Tell:
    """Event files in the run folder, for `tensorboard --logdir`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError(f"--log tensorboard needs the package tensorboard: {error}") from error
    writer = SummaryWriter(str(out / "tensorboard"))

    def tell(line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                writer.add_scalar(key, value, line["step"])
        writer.flush()

    return tell


def _wandb(out: Path, config: PretrainConfig) -> Tell:
    """A run of Weights & Biases by the name of the run folder; a resumed one goes on there."""
    try:
        import wandb
    except ImportError as error:
        raise RunError(f"--log wandb needs the package wandb: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="holdall", name=out.name, id=out.name, resume="allow", dir=str(out), config=config.to_dict()
    )

    def tell(line: dict[str, Any]) -> None:
        run.log({key: value for key, value in line.items() if value is not None}, step=line["step"])

    return tell


_TRACKERS: dict[str, Callable[[Path, PretrainConfig], Tell]] = {"tensorboard": _tensorboard, "wandb": _wandb}
