"""The suite of small language models: what is trained in which order, and a tiny one from corpus to table."""

from __future__ import annotations

import json
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
    monkeypatch.setattr(sys, "argv", [*words, "--no-weights"])
    assert suite.main() == 0
    printed = capfd.readouterr().out
    assert printed.count("tried attention at") == 1
    assert "to go or going" in printed
    assert printed.splitlines()[-1].startswith("| `attention` | 197k | 0.001 |")
    assert printed.splitlines()[-1].endswith("| 9.44 / 1.98 / 10.62 |")
    lines = list(map(json.loads, (out / "results.jsonl").read_text().splitlines()))
    assert [(line["kind"], line["steps"]) for line in lines] == [("tried", 1), ("whole", 2)]
    assert json.loads((out / "slices.json").read_text())["runs"][0]["label"] == "attention"
    assert (out / "recall.png").exists()
    assert (out / "threshold-4" / "recall.png").exists()
    assert not list(out.rglob("*.safetensors"))
    # again: nothing is left to do
    monkeypatch.setattr(suite.Suite, "_train", lambda *_: pytest.fail("trained again"))
    assert suite.main() == 0
    # only others than the one that all are compared with
    monkeypatch.setattr(sys, "argv", ["suite", "--collect", "--out", str(tmp_path / "empty")])
    (tmp_path / "empty").mkdir()
    assert suite.main() == 1
    assert "has no attention that was scored" in capfd.readouterr().err
