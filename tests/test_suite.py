"""The suite of small language models: what is trained in which order, and a tiny one from corpus to table."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from bench import suite
from bench.suite import RATES, Job
from holdall.recipes.presets import FAMILIES
from holdall.text import write_corpus
from holdall.text.tokenizers import Bytes


def finish(job: Job, out: Path, loss: float, *, scored: bool = True) -> None:
    folder = job.folder(out)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"valid_loss": loss}))
    if scored:
        (folder / "recall.json").write_text("{}")


def test_learning_rates_are_tried_first_and_the_best_is_taken(tmp_path: Path) -> None:
    families = ["attention", "h3"]
    tried = [Job("attention", rate, suite.TRIED_STEPS) for rate in RATES]
    whole = Job("h3", suite.RATE, suite.STEPS)
    assert list(suite.jobs(tmp_path, families)) == [*tried, whole]
    assert len(list(suite.jobs(tmp_path, list(FAMILIES)))) == 3 * len(suite.TRIED) + 17 - len(suite.TRIED)
    for job, loss in zip(tried, (5.0, 4.0, 6.0), strict=True):
        assert suite.best_rate("attention", tmp_path) is None
        finish(job, tmp_path, loss)
    best = Job("attention", RATES[1], suite.STEPS)
    assert list(suite.jobs(tmp_path, families)) == [best, whole]
    finish(whole, tmp_path, 4.0, scored=False)  # trained, and ended before it was scored
    assert list(suite.jobs(tmp_path, families)) == [best, whole]
    (whole.folder(tmp_path) / "recall.json").write_text("{}")
    finish(best, tmp_path, 3.0)
    assert list(suite.jobs(tmp_path, families)) == []
    other = Job("h3", 5e-4, suite.STEPS)
    finish(other, tmp_path, 3.9)
    assert suite.models("h3", tmp_path) == [other.folder(tmp_path), whole.folder(tmp_path)]


def test_a_learning_rate_that_diverged_is_not_taken_nor_tried_again(tmp_path: Path) -> None:
    tried = [Job("mamba", rate, suite.TRIED_STEPS) for rate in RATES]
    for job, loss in zip(tried[1:], (5.0, 4.0), strict=True):
        finish(job, tmp_path, loss)
    tried[0].folder(tmp_path).mkdir(parents=True)
    assert list(suite.jobs(tmp_path, ["mamba"])) == tried[:1]
    (tried[0].folder(tmp_path) / suite.DIVERGED).touch()
    assert list(suite.jobs(tmp_path, ["mamba"])) == [Job("mamba", RATES[2], suite.STEPS)]
    assert suite.result_of(tried[0].folder(tmp_path)) is None


@pytest.mark.parametrize(("named", "want"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-a,GPU-b", None)])
def test_only_gpus_that_this_process_may_use_are_used(
    named: str | None, want: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert suite.visible_gpus() == (want or ["GPU-a", "GPU-b"])


def test_a_tiny_suite_from_corpus_to_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    source = tmp_path / "text.txt"
    source.write_text("\n\f".join(f"Number {k} of Bergey, and again number {k}." for k in range(200)))
    write_corpus([source], tmp_path / "corpus", Bytes(), valid=0.3, separator="\f")
    shape = {"context": 32, "batch": 2, "micro-batch": 2, "warmup": 1, "evaluate-every": 2}
    for name, value in {"SHAPE": shape, "STEPS": 2, "TRIED_STEPS": 1, "RATES": (1e-3,)}.items():
        monkeypatch.setattr(suite, name, value)
    out = tmp_path / "out"
    words = ["suite", "--data", str(tmp_path / "corpus"), "--out", str(out), "--family", "attention"]
    words += ["--no-weights", "--device", "cpu"]
    # no time for anything, and nothing to compare: neither is an error, and what was there stays
    out.mkdir()
    (out / "results.jsonl").write_text("of before")
    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "0"])
    assert suite.main() == 0
    assert "nothing to compare yet" in capfd.readouterr().err
    assert (out / "results.jsonl").read_text() == "of before"
    monkeypatch.setattr(sys, "argv", words)
    assert suite.main() == 0
    printed = capfd.readouterr().out
    assert printed.count("tried attention at") == 2  # begins, ends
    assert "to go or going" in printed
    assert printed.splitlines()[-1].startswith("| `attention` | 197k | 0.001 |")
    assert printed.splitlines()[-1].endswith("| 9.44 / 1.98 / 10.62 |")
    lines = list(map(json.loads, (out / "results.jsonl").read_text().splitlines()))
    assert [(line["kind"], line["steps"]) for line in lines] == [("tried", 1), ("whole", 2)]
    assert json.loads((out / "slices.json").read_text())["runs"][0]["label"] == "attention"
    assert (out / "recall.png").exists()
    assert (out / "threshold-1" / "recall.png").exists()
    assert "parameters" in (out / "runs" / "whole" / "attention-lr0.001" / "log.txt").read_text()
    assert not list(out.rglob("*.safetensors"))
    # again: nothing is left to do
    with monkeypatch.context() as patch:
        patch.setattr(suite.Suite, "_train", lambda *_: pytest.fail("trained again"))
        assert suite.main() == 0
    # a run that fails is named, and where to look
    monkeypatch.setattr(sys, "argv", [*words, "--family", "h3"])
    monkeypatch.setattr(suite, "SHAPE", {**shape, "micro-batch": 3})
    capfd.readouterr()
    assert suite.main() == 1
    assert re.search(r"h3 at 0.002 on the CPU: failed, see .*log.txt: .*3", capfd.readouterr().out)
    # only others than the one that all are compared with
    monkeypatch.setattr(sys, "argv", ["suite", "--collect", "--out", str(tmp_path / "empty")])
    (tmp_path / "empty").mkdir()
    assert suite.main() == 1
    assert "has no attention that was trained and scored" in capfd.readouterr().err
