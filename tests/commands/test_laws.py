"""`holdall laws`: a user's own mixer, held to every law and told in words."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdall import cli, commands, mixers
from holdall.contract import registry
from holdall.testing import laws

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-mixer.md").read_text()
RIGHT = PAGE.partition("```python\n")[2].partition("```")[0]
OUTPUT = "y_BTD = h_BTD.to(x_BTD.dtype) * F.silu(self.gate(x_BTD))"


pytestmark = pytest.mark.usefixtures("registry_as_before")


@pytest.fixture
def holdall(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command line: what it prints."""
    monkeypatch.setattr(commands.console, "width", 100)

    def call(*words: str, code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["holdall", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.out + said.err
        return said.out

    return call


def mixer_file(folder: Path, text: str = RIGHT) -> str:
    """The mixer of the docs, or a faulty one; with one variant, and not compiled, to be quick."""
    file = folder / "mine.py"
    file.write_text(text.replace('variants = ({}, {"memory": 100.0})', "variants = ({},)"))
    return str(file)


@pytest.fixture
def _few_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: law for name, law in laws.LAWS.items() if law.short or name == "untouched"}
    monkeypatch.setattr("holdall.commands.laws.LAWS", few)


def test_a_right_mixer_obeys_each_law_once(
    tmp_path: Path, holdall: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what shape checks wrap cannot be traced; test_laws.py compiles apart from them
    traced_apart = {name: law for name, law in laws.LAWS.items() if name != "compiled"}
    monkeypatch.setattr("holdall.commands.laws.LAWS", traced_apart)
    out = holdall("laws", mixer_file(tmp_path), code=0)
    listed = re.findall(r"^    (holds|broken|refused|skipped) +(\w+):", out, re.MULTILINE)
    assert sorted(name for _, name in listed) == sorted(traced_apart)
    assert {status for status, name in listed if name != "recorded"} == {"holds"}
    assert "leaky-sum obeys all laws" in out


@pytest.mark.usefixtures("_few_laws")
def test_a_mixer_that_sees_the_future_is_told_so_in_words(
    tmp_path: Path, holdall: Callable[..., str]
) -> None:
    text = RIGHT.replace(OUTPUT, f"{OUTPUT} + 1e-6 * x_BTD.mean(1, keepdim=True)")
    out = holdall("laws", mixer_file(tmp_path, text), code=1)
    assert re.search(
        r"broken   causal: output before token 1 changes when later tokens do: the mixer sees the future, "
        r"by [\d.]+e-07 where rounding explains \d.*e-1\d",
        out,
    )
    assert "look at: masks, convolutions" in out
    assert "holds    rows" in out
    assert "leaky-sum breaks 2 laws: splits, causal" in out


@pytest.mark.usefixtures("_few_laws")
def test_verdicts_as_json(tmp_path: Path, holdall: Callable[..., str]) -> None:
    text = RIGHT.replace("return self.config.width\n", "return self.config.width + 1\n")
    found = {
        line["law"]: line
        for line in json.loads(holdall("laws", mixer_file(tmp_path, text), "--json", code=1))
    }
    assert found["state_size"]["status"] == "broken"
    assert "16 elements are carried after 0 tokens, not 17" in found["state_size"]["says"]
    assert [name for name, line in found.items() if line["status"] == "broken"] == ["state_size"]
    assert found["causal"]["error"] is None
    text = RIGHT.replace(OUTPUT, f"{OUTPUT} + 1e-6 * x_BTD.mean(0)")
    found = {
        line["law"]: line
        for line in json.loads(holdall("laws", mixer_file(tmp_path, text), "--json", code=1))
    }
    assert found["rows"]["error"] > 1000 * found["rows"]["explained"] > 0


def judged(folder: Path, law: str, text: str) -> laws.Verdict:
    (name,) = mixers.load(Path(mixer_file(folder, text)))
    return laws.judge(laws.cases([name])[0], laws.LAWS[law])


def test_an_error_in_a_mixer_is_a_broken_law_with_its_line(tmp_path: Path) -> None:
    verdict = judged(tmp_path, "rows", RIGHT.replace(OUTPUT, "y_BTD = h_BTD @ h_BTD"))
    assert verdict.status == "broken"
    assert re.search(r"RuntimeError in .*mine\.py:\d+: ", verdict.says)


def test_a_refused_law_is_expected_to_be_broken(tmp_path: Path) -> None:
    refuses = 'state_type = LeakyState\n    refusals = {"rows": "it averages the batch"}'
    text = RIGHT.replace("state_type = LeakyState", refuses)
    verdict = judged(tmp_path, "rows", text)
    assert (verdict.status, verdict.says) == (
        "broken",
        "the mixer refuses this law and yet obeys it: take the refusal away",
    )
    registry._registry.pop("leaky-sum")
    verdict = judged(tmp_path, "rows", text.replace(OUTPUT, f"{OUTPUT} + x_BTD.mean(0)"))
    assert (verdict.status, verdict.says) == ("refused", "it averages the batch")


def test_the_laws_need_no_pytest() -> None:
    code = (
        "import sys, holdall.commands.laws; sys.exit(any(m in sys.modules for m in ('pytest', 'hypothesis')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_law_says_what_it_means_and_where_to_look() -> None:
    for name, law in laws.LAWS.items():
        assert all((law.says, law.broken, law.look)), name
    assert {name for name, law in laws.LAWS.items() if law.short} == {
        "splits", "causal", "definition", "fresh", "rows", "state_size",
    }  # fmt: skip
