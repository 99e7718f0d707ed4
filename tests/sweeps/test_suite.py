"""The suite of small language models: what is trained in which order, and a tiny one from corpus to table."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from holdall import cli, recipes
from holdall.commands import suite as commands
from holdall.files import RunError
from holdall.recipes import lm_suite
from holdall.report.suite import result_of
from holdall.sweeps import suite
from holdall.sweeps.suite import SuiteRun
from holdall.text import write_corpus
from holdall.text.tokenizers import Bytes

SUITE = lm_suite.suite()


def finish(run: SuiteRun, out: Path, loss: float, *, scored: bool = True) -> None:
    folder = run.folder(out)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"valid_loss": loss}))
    if scored:
        (folder / "recall.json").write_text("{}")


def test_learning_rates_are_tried_first_and_the_best_is_taken(tmp_path: Path) -> None:
    families = ["attention", "h3"]
    tried = [SuiteRun("tried", "attention", rate) for rate in SUITE.tried_rates]
    whole = SuiteRun("whole", "h3", SUITE.learning_rate)
    assert list(suite.runs_left(SUITE, tmp_path, families)) == [*tried, whole]
    assert len(list(suite.runs_left(SUITE, tmp_path, SUITE.families))) == 3 * 5 + 17 - 5
    for run, loss in zip(tried, (5.0, 4.0, 6.0), strict=True):
        assert suite.best_rate(SUITE, "attention", tmp_path) is None
        finish(run, tmp_path, loss)
    best = SuiteRun("whole", "attention", SUITE.tried_rates[1])
    assert list(suite.runs_left(SUITE, tmp_path, families)) == [best, whole]
    finish(whole, tmp_path, 4.0, scored=False)  # trained, and ended before it was scored
    assert list(suite.runs_left(SUITE, tmp_path, families)) == [best, whole]
    (whole.folder(tmp_path) / "recall.json").write_text("{}")
    finish(best, tmp_path, 3.0)
    assert list(suite.runs_left(SUITE, tmp_path, families)) == []
    other = SuiteRun("whole", "h3", 5e-4)
    finish(other, tmp_path, 3.9)
    assert suite.models("h3", tmp_path) == [other.folder(tmp_path), whole.folder(tmp_path)]


def test_a_learning_rate_that_diverged_is_not_taken_nor_tried_again(tmp_path: Path) -> None:
    tried = [SuiteRun("tried", "mamba", rate) for rate in SUITE.tried_rates]
    for run, loss in zip(tried[1:], (5.0, 4.0), strict=True):
        finish(run, tmp_path, loss)
    tried[0].folder(tmp_path).mkdir(parents=True)
    assert list(suite.runs_left(SUITE, tmp_path, ["mamba"])) == tried[:1]
    (tried[0].folder(tmp_path) / suite.DIVERGED).touch()
    whole = SuiteRun("whole", "mamba", SUITE.tried_rates[2])
    assert list(suite.runs_left(SUITE, tmp_path, ["mamba"])) == [whole]
    assert result_of(tried[0].folder(tmp_path)) is None


@pytest.mark.parametrize(("named", "want"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-a,GPU-b", None)])
def test_only_gpus_that_this_process_may_use_are_used(
    named: str | None, want: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert suite.visible_gpus() == (want or ["GPU-a", "GPU-b"])


def test_a_folder_holds_one_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite._Suite, "train", lambda *_: None)
    with pytest.raises(suite.OutOfTime, match="17 of 17 models are not finished"):
        suite.run_suite(SUITE, tmp_path, data=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["suite"]["tried_rates"] == [0.002, 0.004, 0.001]
    with pytest.raises(RunError, match=r"holds another suite \(steps: 1600 there, 2 here.*--out"):
        suite.run_suite(dataclasses.replace(SUITE, steps=2), tmp_path, data=tmp_path)
    (tmp_path / "config.json").write_text('{"steps": 2}')  # of a run by the name of a suite
    with pytest.raises(RunError, match=r"holds no suite but something else.*--out"):
        suite.run_suite(SUITE, tmp_path, data=tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        suite.run_suite(SUITE, tmp_path, data=tmp_path, families=["atention"])


TINY: dict[str, Any] = {
    "context": 32, "batch": 2, "micro_batch": 2, "warmup": 1, "evaluate_every": 2, "evaluate_rows": 2,
    "steps": 2, "tried_steps": 1, "tried_rates": (1e-3,),
    # of the presets, based-mini alone is small
    "families": ("based", "h3"), "size": "mini", "reference": "based", "tried": ("based",),
}  # fmt: skip


def test_a_tiny_suite_from_corpus_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    source = tmp_path / "text.txt"
    source.write_text("\n\f".join(f"Number {k} of Bergey, and again number {k}." for k in range(200)))
    write_corpus([source], tmp_path / "corpus", Bytes(), valid=0.3, separator="\f")
    tiny = dataclasses.replace(SUITE, **TINY)

    def run(*words: str, config: suite.SuiteConfig = tiny) -> tuple[int, str]:
        """The exit status of `holdall suite` and what it printed."""
        monkeypatch.setitem(
            recipes.SUITES, "lm-suite", (lambda: config, {"based": lm_suite.PUBLISHED["attention"]})
        )
        monkeypatch.setattr(sys, "argv", ["holdall", "suite", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capfd.readouterr()
        return end.value.code, printed.out + printed.err

    out = tmp_path / "out"
    words = ["--data", str(tmp_path / "corpus"), "--out", str(out), "--family", "based"]
    words += ["--no-weights", "--device", "cpu"]
    # in too little time there is nothing to compare, which is no error, and what was there stays
    out.mkdir()
    (out / "results.jsonl").write_text("of before")
    code, printed = run(*words, "--minutes", "0.00001")
    assert code == 75
    assert "nothing to compare yet" in printed
    assert (out / "results.jsonl").read_text() == "of before"
    code, printed = run(*words)
    assert code == 0, printed
    assert printed.count("tried based at") == 2  # begins, ends
    table = [line for line in printed.splitlines() if line.startswith("| `")]
    assert len(table) == 1
    assert table[0].startswith("| `based` | 29k | 0.001 |")
    assert table[0].endswith("| 9.44 / 1.98 / 10.62 |")
    lines = list(map(json.loads, (out / "results.jsonl").read_text().splitlines()))
    assert [(line["kind"], line["steps"]) for line in lines] == [("tried", 1), ("whole", 2)]
    assert json.loads((out / "slices.json").read_text())["runs"][0]["label"] == "based"
    assert (out / "recall.png").exists()
    assert (out / "threshold-1" / "recall.png").exists()
    assert "parameters" in (out / "runs" / "whole" / "based-lr0.001" / "log.txt").read_text()
    assert not list(out.rglob("*.safetensors"))
    # again: nothing is left to do, nor is anything trained to compare what is there
    with monkeypatch.context() as patch:
        patch.setattr(suite._Suite, "_train", lambda *_: pytest.fail("trained again"))
        assert run(*words)[0] == 0
        assert run("--minutes", "0", "--out", str(out)) == (0, "\n".join([*printed.splitlines()[-3:], ""]))
    # a run that fails is named, and where to look
    (out / "config.json").unlink()
    code, printed = run(*words, "--family", "h3")
    assert code == 1
    assert re.search(r"h3 at 0.002 on the CPU: failed, see .*log.txt: .*'h3-mini'", printed)
    # only others than the one that all are compared with
    code, printed = run("--minutes", "0", "--out", str(tmp_path / "empty"))
    assert code == 2
    assert "has nothing to compare yet: based, to which" in printed


def test_a_suite_that_cannot_be_compared_is_an_error_and_not_one_of_too_little_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*args: Any, **options: Any) -> str:
        raise RunError("only runs that read the same text can be compared")

    how: dict[str, Any] = {
        "families": (), "minutes": None, "workers": None, "device": "cpu", "weights": False, "licence": "",
        "command": "",
    }  # fmt: skip
    monkeypatch.setattr(commands, "run_suite", lambda *args, **options: [])
    assert commands.suite("lm-suite", tmp_path, tmp_path / "none", **how) == 0
    monkeypatch.setattr(commands.reports, "write", differ)
    with pytest.raises(RunError, match="read the same text"):
        commands.suite("lm-suite", tmp_path, tmp_path / "none", **how)
