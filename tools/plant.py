"""Proves that a mixer is one file: `make plant`.

A copy of the repository gets the mixer of docs/add-a-mixer.md as one more file of its zoo, and nothing else.
There the checks, the quick tests and the laws must pass, and the commands must know the mixer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "leaky-sum"


def planted(copy: Path) -> None:
    """The repository as it is on disk, without what git ignores, and one mixer more."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    if (cache := ROOT / ".mypy_cache").is_dir():  # a minute of checking less
        shutil.copytree(cache, copy / cache.name)
    page = (ROOT / "docs" / "add-a-mixer.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    (copy / "holdall" / "mixers" / f"{NAME.replace('-', '_')}.py").write_text(code)


def main() -> int:
    """Run it; the exit status is that of the first command that fails."""
    tools = Path(sys.executable).parent
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "holdall"
        planted(copy)
        where = {**os.environ, "PYTHONPATH": str(copy)}
        for command in (
            [str(tools / "ruff"), "format", "--check", "--quiet", "."],
            [str(tools / "ruff"), "check", "--quiet", "."],
            [str(tools / "lint-imports"), "--no-cache"],
            [str(tools / "mypy")],
            [sys.executable, "-m", "holdall.cli", "zoo", NAME],
            [*pytest, "-m", "quick", "-n", os.environ.get("JOBS", "2")],
            [*pytest, "-m", "not compile and not full", "holdall/testing/test_laws.py", "-k", NAME],
        ):
            print("$", " ".join(command), flush=True)
            if status := subprocess.run(command, cwd=copy, env=where, check=False).returncode:
                print(f"With {NAME} as one more file of holdall/mixers this fails.")
                return status
    print(f"{NAME} is one file of holdall/mixers: checks, quick tests and laws pass with it.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
