"""The pages are true: their code runs, their file tree is the tree, their links lead somewhere."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import children
import pytest

import holdall
from holdall import cli, processes, recipes, states
from holdall.report import table
from holdall.report.data import load
from tools import readme

ROOT = Path(__file__).parents[1]
PAGES = [
    path for path in (ROOT, ROOT / "docs", ROOT / "results", ROOT / "examples") for path in path.glob("*.md")
]


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of one language."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
            if inside:
                found.append((line[3:], []))
        elif inside:
            found[-1][1].append(line)
    return ["\n".join(lines) + "\n" for name, lines in found if name == language]


@pytest.mark.quick
def test_the_readme_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile("".join(blocks(ROOT / "README.md", "python")), "README.md", "exec"), {})


@pytest.mark.parametrize("page", ["replay.md", "serving.md", "sweeps.md", "theory.md"])
def test_the_code_of_a_page_runs(page: str) -> None:
    exec(compile("".join(blocks(ROOT / "docs" / page, "python")), page, "exec"), {})


def test_the_page_of_states_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "states.md"
    exec(compile("".join(blocks(page, "python")), page.name, "exec"), {})
    printed = capsys.readouterr().out
    (refusals,) = blocks(page, "")
    assert refusals.count("\n") == 6
    assert refusals in printed


def test_the_page_of_states_lists_every_function() -> None:
    page = (ROOT / "docs" / "states.md").read_text()
    for name in states.__all__:
        assert f"`states.{name}(" in page or name[0].isupper(), name


def test_the_ten_lines_about_recipes_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "context", children.context)
    exec(compile("".join(blocks(ROOT / "docs" / "recipes.md", "python")), "recipes.md", "exec"), {})
    assert "('delta-net, kernel = 3', " in capsys.readouterr().out
    assert (tmp_path / "runs" / "small" / "frontier.png").stat().st_size > 10_000


def test_the_page_of_recipes_names_the_flags_that_recipes_take() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for setting in (*recipes.SETTINGS, "seeds"):
        assert f"`--{setting}`" in page, setting


def test_the_citation_and_the_package_name_one_version() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert about["version"] == holdall.__version__ == cited


def test_the_mixer_in_the_docs_obeys_every_law(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs" / "add-a-mixer.md", "python")
    (tmp_path / "leaky.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "holdall.testing.laws",
    ]
    done = subprocess.run(
        [*command, "--load", str(tmp_path / "leaky.py"), "-m", "not compile and not full"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "leaky-sum" not in done.stdout  # no failure is named
    assert re.search(r"\d\d passed", done.stdout)


@pytest.mark.quick
def test_the_readme_lists_the_rooms_as_they_are() -> None:
    page = (ROOT / "README.md").read_text()
    assert readme.updated(page) == page, "the README's list of rooms is old: run `make readme`"


@pytest.mark.quick
def test_every_file_of_the_package_lies_in_a_room() -> None:
    listed = readme.rooms()
    for path in (ROOT / "holdall").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            known = f"  {path.name}" in listed or path.name == "__init__.py"
            assert known, f"pyproject.toml names no layer for {path.name}"


@pytest.mark.quick
def test_the_readme_counts_the_mixers_that_the_zoo_page_measured() -> None:
    measured = set(re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "docs" / "zoo.md").read_text(), flags=re.M))
    page = (ROOT / "README.md").read_text()
    assert set(re.findall(r"\b(\d+) (?:sequence )?mixers", page)) == {str(len(measured))}


@pytest.mark.quick
def test_the_commands_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.M):
            assert target in targets, f"{page.name} names 'make {target}'"


@pytest.mark.quick
def test_the_flags_of_the_commands_that_the_pages_name_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted: dict[str, set[str]] = {}
    for page in PAGES:
        for code in blocks(page, "") + re.findall(r"`(holdall [^`]+)`", page.read_text()):
            for command, words in re.findall(r"\bholdall (theory [a-z]+|[a-z]+)\b([^#\n]*)", code):
                if not page.match("CHANGELOG.md"):
                    wanted.setdefault(command, set()).update(re.findall(r"(?<= )--[a-z][a-z-]*", words))
    assert {"laws", "zoo", "frontier", "report"} <= set(wanted)
    for command, flags in wanted.items():
        monkeypatch.setattr(sys, "argv", ["holdall", *command.split(), "--help"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr().out
        assert not ended.value.code, f"there is no holdall {command}"
        missing = {flag for flag in flags if not re.search(rf"{flag}\b", shown)}
        assert not missing, f"holdall {command} has no {missing}"


@pytest.mark.quick
@pytest.mark.parametrize("sweep", ["quick", "based-figure2"])
def test_the_tables_of_sweeps_are_those_of_their_results(sweep: str) -> None:
    folder = ROOT / "results" / sweep
    shown, _ = table.render(load([folder])).split("\n\n")
    assert shown in (folder / "README.md").read_text()


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


EXTRAS = {
    "text": {"lightning_fabric", "tokenizers", "zstandard"},
    "kernels": {"triton", "fla"},
    "gguf": {"gguf", "tokenizers"},
    "laws": {"pytest"},
    "cluster": {"ray"},
    "hub": {"transformers", "tokenizers"},
    "eval": {"lm_eval"},
    "serve": {"fastapi", "uvicorn", "prometheus_client", "pydantic"},
}
"""What each extra brings, as modules. Those of tests and development are not for users."""


@pytest.mark.quick
def test_an_extra_installs_what_the_package_imports() -> None:
    """And nothing is promised that is not there."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(about["optional-dependencies"]) == {*EXTRAS, "parity", "dev", "docs"}
    code = "".join(path.read_text() for path in (ROOT / "holdall").rglob("*.py"))
    for modules in EXTRAS.values():
        for module in modules:
            assert re.search(rf"(import|from|needed\(\"|find_spec\(\") ?{module}\b", code), module


def test_no_hint_names_a_package_index_that_does_not_have_holdall() -> None:
    for path in (*PAGES, *(ROOT / "holdall").rglob("*.py")):
        assert not re.search(r"pip install ['\"]?holdall", path.read_text()), path


def test_training_on_the_embedded_text_needs_no_extra(tmp_path: Path) -> None:
    blocked = sorted(
        {module for modules in EXTRAS.values() for module in modules} | {"tensorboard", "transformers"}
    )
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
from holdall import cli
sys.argv = ["holdall", "train", "--pattern", "base-conv", "--width", "8", "--depth", "1", "--context", "16",
            "--batch", "2", "--micro-batch", "1", "--steps", "2", "--evaluate-rows", "2", "--device", "cpu",
            "--out", {str(tmp_path / "run")!r}]
cli.main()
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "validation perplexity" in done.stdout
