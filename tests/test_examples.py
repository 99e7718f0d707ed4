"""The examples run as they are, print what they promise, and keep what they say."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of examples/, as a user who downloaded it has it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("runs", "__*"))
    return tmp_path


def ran(folder: Path, *command: str) -> str:
    """What a command prints, run there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, sys.path)))}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shares(text: str) -> list[int]:
    """The percentages before "right"."""
    return [int(share) for share in re.findall(r"(\d+)% right", text)]


def test_a_mixer_reads_in_pieces_as_at_once(folder: Path) -> None:
    out = ran(folder, "examples/own_mixer.py")
    assert out.count("4,096 bytes of state") == 3
    (difference,) = re.findall(r"outputs differ by (\S+)", out)
    assert 0 <= float(difference) < 1e-4
    assert out.endswith("memory of each head in tokens: 4 16 64 256\n")


@pytest.mark.full
def test_the_mixer_obeys_the_laws(folder: Path) -> None:
    out = ran(folder, "-m", "holdall", "laws", "examples/own_mixer.py")
    assert "fading-sum obeys all laws" in out
    assert "it refuses" not in out


def test_a_task_is_answered_by_a_memory_that_overwrites_and_by_no_sum(folder: Path) -> None:
    out = ran(folder, "examples/own_task.py")
    row, *_ = out.splitlines()
    read, _, asked = row.partition(" | where is ")
    who, _, answers = asked.partition("? ")
    words = read.split()
    last = dict(zip(words[::2], words[1::2], strict=True))  # later mentions replace earlier ones
    assert [last[name] for name in who.split()] == answers.split()
    assert len(words) == 16
    a_sum, overwrites = shares(out)
    assert overwrites > a_sum + 40


def test_a_recipe_imports_the_files_beside_it(folder: Path) -> None:
    out = ran(folder, "examples/own_recipe.py")
    assert out.count("% right") == 4
    assert shares(out) == sorted(shares(out), reverse=True)
    assert out.startswith("DeltaNet ")
    assert "a report of it has frontier.png frontier.html table.md" in out


def test_a_state_is_saved_and_resumed(folder: Path) -> None:
    out = ran(folder, "examples/state_save_resume.py")
    (short, long) = re.findall(r"tokens read: ([\d,]+) bytes", out)
    assert short == long
    here, there = re.findall(r"in (?:this|another) process: +(.+)", out)
    assert here == there
    assert len(here) > 20
    assert "have read [50, 50, 200]" in out
    assert "bit-identical: True" in out
    (error,) = re.findall(r"float32: ([\d.]+)% off", out)
    assert 0 < float(error) < 5  # bf16 has 8 bits of mantissa: half a percent for one product


def test_the_notebook_runs_and_shows_its_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    path = folder / "examples" / "frontier.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), (
        "strip outputs"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), *filter(None, sys.path))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (shown,) = [output for output in codes[-1].outputs if output.output_type == "execute_result"]
    assert len(shown.data["image/png"]) > 10_000
    printed = "".join(output.get("text", "") for cell in codes for output in cell.outputs)
    assert "S_t = a_t S_{t-1} + k_t v_t^T" in printed
    assert re.search(r"^fading-sum +[\d,]+ bytes +[\d.]+%$", printed, flags=re.MULTILINE)


@pytest.mark.quick
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_first_what_it_shows_and_how_to_run_it(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert docstring.partition("\n")[0].endswith((".", ":"))
    assert f"\n    python examples/{path.name}" in docstring


@pytest.mark.quick
def test_every_example_has_a_test_that_runs_it() -> None:
    tests = Path(__file__).read_text()
    for path in (ROOT / "examples").iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f'"{path.name}"' in tests or f'"examples/{path.name}"' in tests, path.name
