"""`holdall laws`: what a mixer obeys and what it breaks, in words."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from holdall import mixers
from holdall.commands import busy, console
from holdall.contract import MixerConfig
from holdall.testing.laws import LAWS, Case, Law, Verdict, cases, judge

GROUPS = ("time", "rows", "calls", "state", "gradients", "dtypes", "compiler")


def laws(names: Sequence[str], as_json: bool) -> int:
    """The command `holdall laws`: each law once, over all variants; the exit status is 1 if one is broken."""
    if not names:
        raise ValueError("name a mixer, or the file of your own: holdall laws my_mixer.py")
    wanted = [n for name in names for n in (mixers.load(Path(name)) if name.endswith(".py") else [name])]
    torch.set_num_threads(1)  # the tensors are small
    found: list[Verdict] = []
    for name in wanted:
        variants = cases([mixers.entry(name).name])
        if as_json:
            found += [judge(case, law) for law in _in_groups() for case in variants]
        else:
            found += _show(name, variants)
    if as_json:
        console.print(json.dumps([_plain(verdict) for verdict in found], indent=1), soft_wrap=True)
    return int(any(verdict.status == "broken" for verdict in found))


def _show(name: str, variants: Sequence[Case]) -> list[Verdict]:
    """Hold a mixer to all laws, and print a line for each as it is done."""
    console.print(Text.assemble((name, "bold"), f": {_count(len(variants), 'variant')}, {len(LAWS)} laws"))
    found, group, began = [], "", time.monotonic()
    for number, law in enumerate(_in_groups(), 1):
        if law.group != group:
            group = law.group
            console.print(Text(f"  {group}", "bold"))
        verdicts = []
        with busy() as say:
            for case in variants:
                say(f"{number} of {len(LAWS)}: {law.name}, {case}")
                verdicts.append(judge(case, law))
        found += verdicts
        _print(law, verdicts)
    names = {
        status: dict.fromkeys(verdict.law.name for verdict in found if verdict.status == status)
        for status in ("broken", "refused")
    }
    broken, refused = names["broken"], names["refused"]
    ends = f"breaks {_count(len(broken), 'law')}: {', '.join(broken)}" if broken else "obeys all laws"
    ends += f"; it refuses {', '.join(refused)}" if refused else ""
    console.print(f"{name} {ends} ({time.monotonic() - began:.0f} s)", soft_wrap=True)
    return found


def _print(law: Law, verdicts: Sequence[Verdict]) -> None:
    """A line for a law; if it is broken, what is, in the first variant that breaks it, and where to look."""
    worst = next(
        (v for s in ("broken", "refused", "skipped") for v in verdicts if v.status == s), verdicts[0]
    )
    style = {"holds": "green", "broken": "bold red"}.get(worst.status, "yellow")
    says = law.says if worst.status == "holds" else worst.says
    console.print(Text.assemble("    ", (f"{worst.status:8}", style), f" {law.name}: {says}"), soft_wrap=True)
    if worst.status == "broken":
        others = sum(verdict.status == "broken" for verdict in verdicts) - 1
        more = f", and {_count(others, 'other variant')}" if others else ""
        console.print(f"             in {worst.case}{more}; look at: {law.look}", soft_wrap=True)


def _in_groups() -> list[Law]:
    return sorted(LAWS.values(), key=lambda law: GROUPS.index(law.group))


def _plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values."""
    law, config = verdict.law, verdict.case.config
    return {
        "mixer": config.name, "options": config.options(), "law": law.name, "group": law.group,
        "status": verdict.status, "says": verdict.says or law.says, "error": verdict.error,
        "explained": verdict.explained, "look": law.look if verdict.status == "broken" else "",
    }  # fmt: skip


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def short_verdicts(config: MixerConfig) -> list[Verdict]:
    """What comes of holding a mixer to the short laws, with its options, in seconds."""
    return [judge(Case(config), law) for law in LAWS.values() if law.short]
