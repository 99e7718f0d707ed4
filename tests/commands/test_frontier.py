"""`holdall frontier` with mixers and recipes of a user's own, from the command line."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import children
import pytest

from holdall import __version__, cli, commands, files, processes
from holdall.commands import sweeps
from holdall.contract import registry

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-mixer.md").read_text()
MIXER = PAGE.partition("```python\n")[2].partition("```")[0]
OUTPUT = "y_BTD = h_BTD.to(x_BTD.dtype) * F.silu(self.gate(x_BTD))"
RECIPE = """
from holdall.mixers.attention import AttentionConfig
from holdall.recipes import quick
from holdall.sweeps import SweepConfig
from holdall.tasks.data import MQARData, MQARSegment


def sweeps(steps: int = 2):
    segment = MQARSegment(length=16, pairs=2, rows=32 * steps)
    test = MQARSegment(length=16, pairs=2, rows=20)
    data = MQARData(vocab=32, filler="zero", train=(segment,), test=(test,))
    point = quick.point("attention", "attention", AttentionConfig(width=8), task=data, rates=(0.01,))
    return SweepConfig(recipe="mine", points=(point,))
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In an empty folder, with workers that need not import PyTorch, and mixers that are forgotten."""
    before = dict(registry._registry)
    monkeypatch.setattr(processes, "context", children.context)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    yield
    registry._registry.clear()
    registry._registry.update(before)


@pytest.fixture
def holdall(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command line: what it prints."""
    monkeypatch.setattr(commands.console, "width", 100)

    def call(words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["holdall", *words.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.out + said.err
        return said.out

    return call


def leaky(change: str = "", state: str = "", name: str = "leaky-sum") -> None:
    """Write the mixer of the docs to leaky.py, or one with a fault."""
    text = MIXER.replace(OUTPUT, f"{OUTPUT}{change}").replace('"leaky-sum"', f'"{name}"')
    Path(f"{name}.py").write_text(
        text.replace("return self.config.width\n", f"return self.config.width{state}\n")
    )


def test_a_recipe_s_file_takes_a_mixer_s_file(holdall: Callable[..., str]) -> None:
    leaky()
    out = holdall("frontier mine.py --load leaky-sum.py --add leaky-sum:memory=5 --device cpu --workers 1")
    lines = files.read_lines(Path("runs/mine/results.jsonl"))
    assert [line["label"] for line in lines] == ["attention", "leaky-sum, memory = 5"]
    assert lines[1]["options"] == {"memory": 5.0}
    assert not any("laws" in line for line in lines)
    assert "breaks" not in out
    assert Path("runs/mine/frontier.png").exists()
    out = holdall("frontier mine.py --load leaky-sum.py --device cpu --dry-run")
    assert [re.findall(r"\S+", line)[-4:-1] for line in out.splitlines() if " 8 " in line] == [
        ["1", "-", "-"], ["-", "-", "1"],
    ]  # fmt: skip
    assert len(files.read_lines(Path("runs/mine/results.jsonl"))) == 2, "a dry run trains nothing"


def test_the_end_says_what_the_spread_is_and_how_to_learn_more(holdall: Callable[..., str]) -> None:
    small = "--pairs 2 --length 16 --vocab 32 --width 8 --steps 2 --rates 0.01 --family attention"
    command = f"holdall frontier quick {small} --device cpu --workers 1"
    out = " ".join(holdall(command.removeprefix("holdall ")).split())
    said = "spread: not known of one seed; two more, and bars in the picture:"
    assert out.endswith(f"{said} {command} --seeds 3")
    again = out.rpartition("picture: holdall ")[2]
    out = holdall(again)
    assert out.endswith(
        "spread: each point is the mean of 3 seeds, its bar reaches from the lowest to the highest\n"
    )
    lines = files.read_lines(Path("runs/quick/results.jsonl"))
    assert [line["seed"] for line in lines] == [0, 1, 2]
    assert "3 seeds: each point is their mean" in Path("runs/quick/table.md").read_text()
    # a recipe whose function has no such argument
    out = holdall("frontier mine.py --device cpu --workers 1")
    assert out.endswith("spread: not known of one seed\n")


def test_a_mixer_that_breaks_a_law_is_marked(holdall: Callable[..., str]) -> None:
    leaky(" + 0.01 * x_BTD.mean(1, keepdim=True)", name="ahead")
    leaky(state=" + 1", name="liar")
    out = holdall("frontier mine.py --load ahead.py --load liar.py --device cpu --workers 1")
    assert re.search(
        r"ahead breaks causal: output before .*: the mixer sees the future, by 0\.0\d+ where", out
    )
    assert re.search("liar breaks state_size: 8 elements are carried after 0 tokens, not 9", out)
    _, ahead, liar = files.read_lines(Path("runs/mine/results.jsonl"))
    assert set(ahead["laws"]["broken"]) == {"splits", "causal"}
    assert set(liar["laws"]["broken"]) == {"state_size"}
    assert "ahead ✗ splits ✗ causal" in out
    assert "liar ✗ state_size" in Path("runs/mine/table.md").read_text()
    holdall("frontier mine.py --device cpu --workers 1")  # without them they stay, with what was found
    assert [line.get("laws") for line in files.read_lines(Path("runs/mine/results.jsonl"))] == [
        None, ahead["laws"], liar["laws"],
    ]  # fmt: skip


def test_a_mixer_that_refuses_a_law_says_why(holdall: Callable[..., str]) -> None:
    leaky(" + 0.01 * x_BTD.mean(0)", name="mean")
    file = Path("mean.py")
    refusal = '    refusals = {"rows": "it averages the batch"}\n'
    file.write_text(
        file.read_text().replace("state_type = LeakyState\n", f"state_type = LeakyState\n{refusal}")
    )
    out = holdall("frontier mine.py --load mean.py --device cpu --workers 1")
    _, line = files.read_lines(Path("runs/mine/results.jsonl"))
    assert line["laws"] == {"refused": {"rows": "it averages the batch"}}
    assert "mean refuses rows: it averages the batch" in out


def test_laws_are_about_the_options_given_and_not_the_length_of_a_row(holdall: Callable[..., str]) -> None:
    """Linformer's max_length is that of a row, 16 tokens, which laws exceed."""
    holdall("frontier mine.py --add linformer --device cpu --workers 1")
    _, line = files.read_lines(Path("runs/mine/results.jsonl"))
    assert line["options"]["max_length"] == 16
    assert set(line["laws"]) == {"refused"}
    assert set(line["laws"]["refused"]) == {"splits", "causal"}


def test_only_added_mixers_are_held_to_the_laws(
    monkeypatch: pytest.MonkeyPatch, holdall: Callable[..., str]
) -> None:
    held: list[str] = []
    monkeypatch.setattr(sweeps, "short_verdicts", lambda config: held.append(config.name) or [])
    holdall("frontier mine.py --device cpu --workers 1")
    holdall("frontier mine.py --add retnet --device cpu --workers 1 --minutes 0", code=75)
    assert held == ["retnet"]


def test_a_recipe_is_written_and_runs_as_it_is(holdall: Callable[..., str]) -> None:
    holdall("recipe new my-own")
    small = "frontier my_own.py --steps 4 --width 8 --length 4 --rates 0.01 --device cpu --workers 1"
    assert "my-own: 5 models on cpu" in holdall(f"{small} --dry-run")
    holdall(f"{small} --family attention")  # its task is its own, and known to the workers
    (line,) = files.read_lines(Path("runs/my-own/results.jsonl"))
    assert set(line["accuracy_by_difficulty"]) == {"4"}
    text = Path("my_own.py").read_text().replace('"attention"', f'"{"attention " * 12}"')
    Path("long_names.py").write_text(text)
    out = holdall("frontier long_names.py --steps 4 --width 8 --length 4 --rates 0.01 --device cpu --dry-run")
    assert out.count("attention") >= 12
    assert "…" not in out, "a name is folded; numbers are never cut"
    assert "is there already" in holdall_error(holdall, "recipe new my-own")
    text = Path("my_own.py").read_text()
    assert "{" + "name}" not in text
    assert "holdall frontier my_own.py" in text


def holdall_error(holdall: Callable[..., str], words: str) -> str:
    with pytest.raises(AssertionError) as caught:
        holdall(words)
    return str(caught.value)


def test_steps_that_a_recipe_rounds_are_said(holdall: Callable[..., str]) -> None:
    said = holdall("frontier jrt-figure2-small --steps 301 --dry-run")
    assert "jrt-figure2-small: --steps 301 is rounded to 300, so that" in " ".join(said.split())
    assert "rounded" not in holdall("frontier quick --width 16 --steps 7 --dry-run")


def test_recipes_are_listed_with_their_flags(holdall: Callable[..., str]) -> None:
    out = " ".join(holdall("recipe").split())
    for word in ("quick", "--pairs", "based-figure2", "zoology-small"):
        assert word in out


def test_the_package_runs_and_tells_its_version(holdall: Callable[..., str]) -> None:
    assert holdall("--version") == f"holdall {__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "holdall", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"holdall {__version__}\n"
