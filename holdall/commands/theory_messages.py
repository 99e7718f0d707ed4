"""`holdall theory message`, `index`, `disjointness` and `floors`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich import box
from rich.table import Table

import holdall
from holdall import environment, files, mixers
from holdall.commands import busy, console, resolve_device, typed_command
from holdall.commands.loading import Loading
from holdall.contract import Format, closest
from holdall.language_model import pretrained
from holdall.model import ModelConfig, seeded
from holdall.report import data
from holdall.report import messages as picture
from holdall.sweeps.bits import trained_model
from holdall.tasks.set_disjointness import SetDisjointness
from holdall.theory import exchanges
from holdall.theory.by_hand import configured
from holdall.theory.disjointness import ByHandConfig, HandOvers, hand_over
from holdall.theory.floors import Setting
from holdall.theory.floors import floors as floors_of
from holdall.theory.index_by_hand import IndexConfig
from holdall.theory.messages import Conveyed, converse, reader

FORMATS = ("fp32", "bf16", "int8", "int4", "int2", "int1")
VOCAB = 64
"""Tokens of a model by hand, or with random weights."""
CONVEYED = ("bits\nconveyed", "at least\n(95%)", "per\nbit")
"""Heads of the columns of what was conveyed."""
BY_HAND = "by-hand:"
"""What the names of models by hand begin with, as there are mixers of the same names."""
ON_SETS = "jrt-figure2-small"
"""The recipe that trains models on sets in minutes."""

# ------------------------------------------------------------------------------------------------- models


class Sender(NamedTuple):
    """A model that the user named."""

    label: str
    model: Any
    vocab: int
    """The tokens that it was trained on, or has."""
    device: str


def senders(
    names: Sequence[str], loading: Loading, shape: tuple[int, int, int] | None = None, length: int = 0
) -> Iterator[Sender]:
    """The models that the user named, one by one.

    Args:
        shape: vocabulary, width and depth of models with random weights, the first also of models by hand;
            without it, none are made.
        length: tokens of the rows that models by hand are built for.
    """
    loading.load_mixers()
    device = resolve_device(loading.device)
    labels: set[str] = set()
    for name in names:
        for sender in _named(name, loading, device, shape, length):
            while sender.label in labels:  # of several folders, say
                sender = sender._replace(label=f"{sender.label} ({name})")
            labels.add(sender.label)
            yield sender


def _named(
    name: str, loading: Loading, device: str, shape: tuple[int, int, int] | None, length: int
) -> Iterator[Sender]:
    """The models of one name. ValueError, with what would do, for one that is known and cannot be taken."""
    by_hand, mixer = name.startswith(BY_HAND), name.partition(":")[0] in holdall.names()
    if (Path(name) / "results.jsonl").exists():
        yield from _of_sweep(Path(name), device)
    elif shape is None and (by_hand or mixer):
        what = "is built for pairs, not for sets" if by_hand else "is a mixer, which has not been trained"
        raise ValueError(
            f"{name} {what}. Leave it out for this task's own model by hand, whose size is --features; or "
            f"name a folder of trained models: `holdall frontier {ON_SETS}` writes runs/{ON_SETS}"
        )
    elif by_hand and shape is not None:
        config = configured(name.removeprefix(BY_HAND), vocab=shape[0], length=length)
        yield Sender(config.label, config.build().to(device), shape[0], device)
    elif mixer and shape is not None:
        vocab, width, depth = shape
        label, layer = mixers.configured(name, width)
        with seeded(0):
            model = ModelConfig(vocab=vocab, width=width, layers=(layer,) * depth).build()
        yield Sender(f"{label}, random weights", model.eval().to(device), vocab, device)
    else:
        close = closest(name.partition(":")[0], holdall.names()).rstrip()
        if shape is not None and close and not Path(name).exists() and name not in pretrained():
            raise ValueError(f"there is neither a mixer nor a folder '{name}'. {close}")
        language_model = loading.model(name)
        yield Sender(Path(name).name, language_model, language_model.config.vocab, device)


def _of_sweep(folder: Path, device: str) -> Iterator[Sender]:
    (sweep,) = data.load([folder])
    for model in sweep.models:
        for run in model.best[:1]:
            trained, config = trained_model(folder, run.line, device)
            yield Sender(f"{model.label}, d = {model.width}", trained, config.data.vocab, device)


# ----------------------------------------------------------------------------------------------- commands


def message(
    names: Sequence[str],
    pairs: int,
    vocab: int | None,
    rows: int,
    formats: Sequence[str],
    width: int,
    depth: int,
    seed: int,
    out: Path | None,
    loading: Loading,
) -> int:
    """The command `holdall theory message`; returns the exit status."""
    _check_picture(out)
    wanted = [Format.parse(text) for text in formats or FORMATS]
    found: dict[str, list[Conveyed]] = {}
    refused = {}
    with busy() as say:
        for sender in list(senders(names, loading, (vocab or VOCAB, width, depth), 4 * pairs)):
            tokens = min(vocab or sender.vocab, sender.vocab)
            if vocab is not None and vocab > sender.vocab:
                raise ValueError(f"{sender.label} has {sender.vocab} tokens, fewer than --vocab {vocab}")
            exchange = exchanges.recall(tokens, pairs, rows, seed, sender.device)
            try:
                reader(sender.model)
            except ValueError as error:
                refused[sender.label] = str(error)
                continue
            found[sender.label] = [
                converse(
                    sender.model, exchange, format, seed=seed, watch=_progress(say, sender.label, format)
                )
                for format in wanted
            ]
            _print_line(sender.label, found[sender.label][0])
    for label, conveyed in found.items():
        table = _table(label, conveyed[0].entropy_bits, "format")
        for each in conveyed:
            table.add_row(_folded(each.format), *_cells(each))
        console.print(table)
        _warn_above(label, conveyed)
    for label, why in refused.items():
        console.print(f"{label} is left out: {why}", soft_wrap=True)
    _write(found, out, resolve_device(loading.device))
    return 0 if found else 1


def index(
    bits: int,
    features: Sequence[int],
    one_hot: bool,
    rows: int,
    formats: Sequence[str],
    seed: int,
    device: str,
    out: Path | None,
) -> int:
    """The command `holdall theory index`; returns the exit status."""
    _check_picture(out)
    wanted = [Format.parse(text) for text in formats or (("int1",) if one_hot else ("fp32",))]
    table = _table("bits in linear attention", bits, "features", "format", "pre-\ndicted")
    device = resolve_device(device)
    exchange = exchanges.index(bits, rows, seed, device)
    found: dict[str, list[Conveyed]] = {}
    with busy() as say:
        for count in (bits,) if one_hot else features:
            config = IndexConfig(bits=bits, features=count, one_hot=one_hot, seed=seed)
            model = config.build().to(device)
            label = f"{count:,} {'one-hot' if one_hot else 'random'} features"
            for format in wanted:
                each = converse(model, exchange, format, seed=seed, watch=_progress(say, label, format))
                found.setdefault(label, []).append(each)
                predicted = config.predicted(str(format))
                table.add_row(
                    f"{count:,}",
                    _folded(each.format),
                    "" if predicted is None else f"{predicted:.2%}",
                    *_cells(each),
                )
    console.print(table)
    _write(found, out, device)
    return 0


def disjointness(
    names: Sequence[str],
    sizes: tuple[int, int],
    reads: int,
    distribution: Literal["blocked", "random"],
    vocab: int | None,
    features: int,
    rows: int,
    formats: Sequence[str],
    seed: int,
    out: Path | None,
    loading: Loading,
) -> int:
    """The command `holdall theory disjointness`; returns the exit status."""
    wanted = [Format.parse(text) for text in formats or ("fp32", "int4")]
    loaded = list(senders(names, loading))
    fewest = max(6, sizes[0] * sizes[1] + 4)
    own = fewest if distribution == "blocked" else max(1024, fewest)
    vocab = vocab or min((sender.vocab for sender in loaded), default=own)
    for sender in loaded:
        if sender.vocab < vocab:
            raise ValueError(f"{sender.label} has {sender.vocab} tokens, fewer than --vocab {vocab}")
    tasks = [
        SetDisjointness(vocab=vocab, first=a, second=b, reads=p, distribution=distribution)
        for p in range(1, reads + 1)
        for a, b in dict.fromkeys((sizes, sizes[::-1]))
    ]
    by_hand = f"by hand, {f'{features} random' if features else 'one-hot'} features"
    device = resolve_device(loading.device)
    found: dict[str, list[_Turns]] = {}
    with busy() as say:
        for task, format in itertools.product(tasks, wanted):
            for sender in loaded or [_by_hand(by_hand, task, features, seed, device)]:
                turns = _in_turns(sender, task, format, rows, seed, say)
                found.setdefault(sender.label, []).append(turns)
    heads = ("reads", "first", "second", "format", "messages", "right", "bits\nproven", *CONVEYED)
    for label, lines in found.items():
        table = _of_columns(f"{label}: common element of two sets, {distribution}", heads)
        for turns in lines:
            table.add_row(*_turns_cells(turns))
        console.print(table)
    console.print(
        "Proven: what this accuracy takes by Fano's inequality, of the one answer from two reads on. "
        "Conveyed: of one read of blocked sets, all of whose blocks are asked from one message.",
        soft_wrap=True,
    )
    if distribution == "random":
        console.print("Of random sets, proven bits are of as many elements as can be drawn independently.")
    if out is not None:
        plain = {label: [turns.to_dict() for turns in lines] for label, lines in found.items()}
        _write_numbers(out, "turns", plain, device)
    return 0


def _by_hand(label: str, task: SetDisjointness, features: int, seed: int, device: str) -> Sender:
    model = ByHandConfig(task=task, features=features, seed=seed).build()
    return Sender(label, model.to(device), task.vocab, device)


class _Turns(NamedTuple):
    """What came of the protocol of one task in one format."""

    task: SetDisjointness
    turns: HandOvers
    one: Conveyed | None
    """Of the one message of a single read of blocked sets, from which all blocks are asked."""

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.task.to_dict(),
            **dataclasses.asdict(self.turns),
            "conveyed": self.one and dataclasses.asdict(self.one),
        }


def _in_turns(
    sender: Sender, task: SetDisjointness, format: Format, rows: int, seed: int, say: Callable[[str], None]
) -> _Turns:
    watch = _progress(say, f"{task.first} then {task.second} elements, {task.reads} reads", format)
    turns = hand_over(sender.model, task, format, rows=rows, seed=seed, device=sender.device, watch=watch)
    one = None
    if task.reads == 1 and task.distribution == "blocked":
        exchange = exchanges.disjointness(task, max(8, rows // task.first), seed, sender.device)
        one = converse(sender.model, exchange, format, seed=seed)
    return _Turns(task, turns, one)


def _turns_cells(found: _Turns) -> list[str]:
    task, turns, one = found
    conveyed = ["", "", ""]
    if one is not None:
        conveyed = [f"{one.conveyed_bits:,.1f}", f"{one.at_least_bits:,.1f}", f"{one.efficiency:.4f}"]
    sent = "–".join(f"{bits:,}" for bits in dict.fromkeys((min(turns.message_bits), turns.largest)))
    messages = f"{len(turns.message_bits)} × {sent}"
    return [
        *map(str, (task.reads, task.first, task.second)), _folded(turns.format),
        messages, f"{turns.accuracy:.1%}", f"{turns.proven_bits:,.1f}", *conveyed,
    ]  # fmt: skip


def floors(**setting: Any) -> int:
    """The command `holdall theory floors`; returns the exit status."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for head in ("floor", "at least", "of", "bites", "when", "source"):
        table.add_column(head, justify="right" if head == "at least" else "left", overflow="fold")
    for floor in floors_of(Setting(**setting)):
        value = f"{floor.value:,.1f}" if floor.value % 1 else f"{floor.value:,.0f}"
        bites = "yes" if floor.bites else "no"
        table.add_row(floor.name, f"{value} {floor.unit}", floor.of, bites, floor.why, floor.source)
    console.print(table)
    return 0


# ---------------------------------------------------------------------------------------------- what is shown


def _table(title: str, entropy: float, *first: str) -> Table:
    heads = (*first, "right", "bits\nsent", "of\nelements", *CONVEYED)
    return _of_columns(f"{title}: {entropy:,.1f} bits to say", heads)


def _of_columns(title: str, heads: Sequence[str]) -> Table:
    """A table of numbers, none of which is cut off in 80 columns."""
    apart = (0, 0, 0, int(console.width >= 90))
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=apart, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _cells(found: Conveyed) -> list[str]:
    return [
        f"{found.accuracy:.2%}",
        f"{found.message_bits:,}",
        f"{found.element_bits:,}",
        f"{found.conveyed_bits:,.1f}",
        f"{found.at_least_bits:,.1f}",
        f"{found.efficiency:.4f}",
    ]


def _folded(format: str) -> str:
    """The name of a format on two lines where it is long."""
    return format.replace("+", "\n+")


def _progress(say: Callable[[str], None], label: str, format: Format) -> Callable[[int, int], None]:
    return lambda done, total: say(f"{label} in {format}: {done} of {total} rows")


def _print_line(label: str, first: Conveyed) -> None:
    """A line as each model is done, where there is no terminal with a status line."""
    if not console.is_terminal:
        console.print(f"{label}: {first.conveyed_bits:,.1f} bits in {first.format}", soft_wrap=True)


def _warn_above(label: str, conveyed: Sequence[Conveyed]) -> None:
    """Say so if more was conveyed than sent, beyond chance: no model can, but on rows that it has learned."""
    for each in conveyed:
        if each.at_least_bits > each.message_bits:
            console.print(
                f"{label} conveyed more than it sent in {each.format}: the rows cannot be fresh, and its "
                "weights know them. Give another --seed.",
                soft_wrap=True,
            )


def _check_picture(out: Path | None) -> None:
    """Refuse a picture whose name is that of the numbers beside it."""
    if out is not None and out.with_suffix(".json") == out:
        raise ValueError(f"{out} is where the numbers go: name the picture another way, such as .png")


def _write(found: dict[str, list[Conveyed]], out: Path | None, device: str) -> None:
    if out is None or not found:
        return
    console.print(f"  {picture.write(found, out, command=typed_command())}", soft_wrap=True)
    numbers = {label: [dataclasses.asdict(each) for each in points] for label, points in found.items()}
    _write_numbers(out.with_suffix(".json"), "messages", numbers, device)


def _write_numbers(path: Path, name: str, numbers: dict[str, Any], device: str) -> None:
    """Write what was measured, with the command and what it ran on."""
    about = environment.describe(device, torch.get_num_threads())
    files.make_folder(path.parent)
    files.write_json(path, {"command": typed_command(), "environment": about, name: numbers})
    console.print(f"  {path}", soft_wrap=True)
