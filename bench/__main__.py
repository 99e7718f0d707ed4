"""All benchmarks, behind their tests: `make bench`.

    python -m bench [NAME...] [--results FILE]
    python -m bench --last     the newest results there as Markdown, for results/bench.md; measures nothing

generator, training, zoo, drafts, session and serving run on a CPU, kernels, sweep, lm and decode on a GPU; by
default all that this machine can run. A part of the kernels is named kernels:taylor and so on.

A speed of something wrong is worth nothing, so the tests of what is measured run first and a red one ends
it. Each benchmark's results are appended to results/bench.jsonl, one line with device, versions and commit.
Control-C ends kernels, sweep and lm with what they have measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench import (
    collected,
    decode,
    drafts,
    generator,
    kernels,
    lm,
    markdown,
    serving,
    session,
    sweep,
    training,
    zoo,
)
from holdall import environment, files

ROOT = Path(__file__).parents[1]
BENCHES = {
    "generator": generator,
    "training": training,
    "zoo": zoo,
    "kernels": kernels,
    "sweep": sweep,
    "lm": lm,
    "drafts": drafts,
    "session": session,
    "serving": serving,
    "decode": decode,
}
GATES = {
    "generator": ["tests/tasks"],
    "training": ["tests/ops", "tests/tasks", "tests/training/test_populations.py"],
    "zoo": ["tests/ops", "tests/mixers", "tests/training/test_populations.py"],
    "sweep": ["tests/training/test_stacked.py", "tests/training/test_populations.py"],
    "lm": ["tests/training/test_language_models.py"],
    "drafts": ["tests/engine/test_drafts.py", "tests/engine/test_engine_drafts.py"],
    "session": ["tests/engine/test_fast.py"],
    "serving": ["tests/serve/test_server.py"],
    "decode": ["tests/engine/test_fast.py"],
}
ON_GPU = ("kernels", "sweep", "lm", "decode")


def gates_of(name: str) -> list[str]:
    """Paths of the tests of what a benchmark measures; of a part of the kernels, of that part."""
    bench, _, part = name.partition(":")
    return kernels.gates(*filter(None, [part])) if bench == "kernels" else GATES[bench]


def last(results: Path) -> dict[str, str]:
    """The table of each benchmark's newest run, as Markdown."""
    newest = {line["bench"]: line["results"] for line in files.read_lines(results)}
    return {name: markdown(BENCHES[name.partition(":")[0]].table(found)) for name, found in newest.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed beside its ceiling.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bench.jsonl")
    parser.add_argument("--last", action="store_true", help="print the newest results as Markdown instead")
    asked = parser.parse_args()
    if asked.last:
        for name, text in last(asked.results).items():
            print(f"## {name}\n\n{text}\n")
        return 0
    gpu = torch.cuda.is_available()
    names = asked.names or [name for name in BENCHES if gpu or name not in ON_GPU]
    for name in names:
        bench, _, part = name.partition(":")
        if bench not in BENCHES or (part and (bench != "kernels" or part not in kernels.MODULES)):
            parser.error(f"unknown benchmark {name}; known: {', '.join(BENCHES)}")
        if bench in ON_GPU and not gpu:
            parser.error(f"{name} needs a GPU")
    gates = sorted({gate for name in names for gate in gates_of(name)})
    # pytest-benchmark, where somebody has it installed, and pytest-xdist do not get on
    spread = (
        ["-n", str(environment.cores()), "-p", "no:benchmark"] if importlib.util.find_spec("xdist") else []
    )
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not full", *spread, *gates]
    if green := subprocess.run(tests, cwd=ROOT, check=False).returncode:
        print("the tests of what would be measured fail; no speeds", file=sys.stderr)
        return green
    for name in names:
        bench, _, part = name.partition(":")
        results, whole = collected(BENCHES[bench].run(*filter(None, [part])))
        table = BENCHES[bench].table(results)
        if table.row_count:
            Console().print(table)
            where = environment.describe("cuda" if bench in ON_GPU else "cpu", environment.cores())
            line = {"bench": name, "command": f"python -m bench {name}", **where, "results": results}
            files.append_line(asked.results, line)
        if not whole:
            print(f"stopped; what of {name} is measured by now is kept", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
