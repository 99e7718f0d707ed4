"""The results folder: what it refuses to mix, answers that survive a crash, and names of models."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from holdall import files
from holdall.evals.folder import Answers, EvalConfig, Result, ResultsFolder, prompt_hash
from holdall.files import InUse, RunError

CONFIG = EvalConfig(window=512)


def claim(path: Path, config: EvalConfig = CONFIG, suites: tuple[str, ...] = ("kv",)) -> ResultsFolder:
    folder = ResultsFolder(path)
    folder.claim(config, suites, [f"{name}_task" for name in suites], command="holdall eval", device="cpu")
    return folder


def result(model: str = "mine", task: str = "fda", **other: Any) -> Result:
    fields = {
        "model": model, "task": task, "asked": task, "suite": "recall", "of": task, "reads": 1,
        "metric": "contains", "unit": "share", "lower_is_better": False, "value": 0.5, "low": 0.25,
        "high": 0.75, "others": {}, "count": 2, "truncated": 1, "version": "1", "prompt_hash": "0" * 64,
        "window": 512, "seconds": 1.0,
    }  # fmt: skip
    return Result(**(fields | other))


ABOUT = {"name": "mine", "source": "runs/mine", "fingerprint": "a", "precision": "float32"}


def test_settings_are_those_of_the_first_answer(tmp_path: Path) -> None:
    """A command that ends before it, over a damaged file say, leaves nothing that binds the next."""
    claim(tmp_path)
    folder = claim(tmp_path, EvalConfig(window=1024), suites=("kv",))
    held = json.loads((tmp_path / "config.json").read_text())
    assert (held["window"], held["suite"], held["tasks"]) == (1024, ["kv"], ["kv_task"])
    folder.answers("mine", "kv").add_partial("generate_until", ("prompt", {}), "answer")
    with pytest.raises(RunError, match="other settings"):
        claim(tmp_path)


def test_suites_are_added_and_other_settings_refused(tmp_path: Path) -> None:
    claim(tmp_path / "out").finish(result(), [])
    claim(tmp_path / "out", suites=("recall", "kv"))
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    assert held["suite"] == ["kv", "recall"]
    assert held["tasks"] == ["kv_task", "recall_task"]
    assert (held["window"], held["limit"], held["seed"]) == (512, None, 0)
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["device"] == "cpu"
    with pytest.raises(
        RunError,
        match=r"holds scores with other settings \(window: 512 there, 1024 here\)\. Choose another folder",
    ):
        claim(tmp_path / "out", EvalConfig(window=1024))


def test_the_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(RunError, match="holds something else than evaluations"):
        claim(tmp_path)


def test_a_window_must_show_something() -> None:
    with pytest.raises(ValueError, match="window = 60 must be at least 100"):
        EvalConfig(window=60)


def test_models_have_names_of_their_own(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    for about, wanted in (
        (ABOUT, "mine"),
        ({**ABOUT, "source": "elsewhere/mine"}, "mine-2"),
        ({**ABOUT, "name": "http://host:80/v1", "source": "http://host:80/v1"}, "http-host-80-v1"),
        ({**ABOUT, "name": "..", "source": ".."}, "model"),
        (ABOUT, "mine"),
    ):
        with folder.model(about) as name:
            assert name == wanted
    assert folder.models()["mine-2"]["source"] == "elsewhere/mine"


def test_other_weights_are_not_mixed_in(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    with folder.model(ABOUT):
        pass
    for other in ({"fingerprint": "b"}, {"precision": "bfloat16"}):
        with pytest.raises(RunError, match=r"runs/mine with other weights or precision; remove .*mine.json"):
            folder.model({**ABOUT, **other}).__enter__()
    # of a folder that does not say, nothing is assumed
    files.write_json(tmp_path / "models" / "mine.json", {"name": "mine", "source": "runs/mine"})
    with folder.model({**ABOUT, "precision": "bfloat16"}) as name:
        assert name == "mine"


def test_a_model_is_scored_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "locked", functools.partial(files.locked, patience=0.1))
    folder = claim(tmp_path)
    with folder.model(ABOUT), folder.model({**ABOUT, "source": "another"}) as other:
        assert other == "mine-2"
        with pytest.raises(InUse):
            ResultsFolder(tmp_path).model(ABOUT).__enter__()


def test_what_is_finished_is_read_back(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    sample = {"doc": "a", "prompt": "\ud800 half of a pair", "target": ["b"], "output": "c", "right": 0}
    folder.finish(result(value=0.25), [sample])
    folder.finish(result(), [{**sample, "prompt": "é"}])
    folder.finish(result(task="x/../y"), [])
    assert folder.results() == [result(), result(task="x/../y")]
    assert folder.samples("mine", "fda") == [{**sample, "prompt": "é"}]
    assert folder.samples("mine", "nq") == []
    assert sorted(path.name for path in (tmp_path / "samples" / "mine").iterdir()) == [
        "fda.jsonl",
        "x%2f..%2fy.jsonl",
    ]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = claim(tmp_path)
    folder.finish(result(), [])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"model": "mine"}\n')
    with pytest.raises(RunError, match=r"line 2 of .*results.jsonl is damaged"):
        folder.results()


def test_answers_survive_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "mine" / "fda.jsonl"
    request = ("prompt", {"until": ["\n"]})
    answers = Answers(path)
    answers.add_partial("generate_until", request, "one")
    answers.add_partial("loglikelihood", ("a", "b"), (-0.1 - 0.2, True))
    answers.add_partial("generate_until", request, "another")
    with path.open("a") as file:
        file.write('{"request": "0')
    again = Answers(path)
    assert len(again) == 2
    assert again.get("generate_until", request) == "one"
    assert again.get("loglikelihood", ("a", "b")) == (-0.1 - 0.2, True)  # to the last digit
    assert again.get("loglikelihood", request) is None
    assert again.get("generate_until", ("prompt", {"until": ["\n\n"]})) is None
    again.add_partial("generate_until", ("b", {}), "two")
    assert len(Answers(path)) == 3
    again.remove()
    assert not path.exists()


def test_the_hash_is_of_prompts_and_targets_in_order() -> None:
    pairs: list[tuple[str, Any]] = [("a", ["b"]), ("c", 1)]
    assert prompt_hash(pairs) == prompt_hash(iter(pairs))
    assert len({prompt_hash(pairs), prompt_hash(pairs[::-1]), prompt_hash(pairs[:1]), prompt_hash([])}) == 4
    assert prompt_hash([("ab", "")]) != prompt_hash([("a", "b")])
