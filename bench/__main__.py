"""All benchmarks, behind their tests: `make bench`.

    python -m bench [NAME...]      generator, training; all by default

A speed of something wrong is worth nothing, so the tests of what is measured run first and a red one ends
it. Each benchmark's results are appended to results/bench.jsonl, one line with device, versions and commit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rich.console import Console

from bench import generator, training
from holdall import runs

BENCHES = {"generator": generator, "training": training}
GATES = ["tests/ops", "tests/tasks", "tests/test_train.py"]
TABLE = Path(__file__).parents[1] / "results" / "bench.jsonl"


def main() -> int:
    names = sys.argv[1:] or list(BENCHES)
    if unknown := set(names) - set(BENCHES):
        print(f"unknown benchmark {', '.join(sorted(unknown))}; known: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    green = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *GATES], cwd=TABLE.parents[1], check=False
    )
    if green.returncode:
        print("the tests of what would be measured fail; no speeds", file=sys.stderr)
        return green.returncode
    where = runs.environment("cpu", runs.cores())
    for name in names:
        results = BENCHES[name].run()
        Console().print(BENCHES[name].table(results))
        runs.append_line(
            TABLE, {"bench": name, "command": f"python -m bench {name}", **where, "results": results}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
