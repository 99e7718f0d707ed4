"""The run folder: whose it is, what it holds, and what a run finds when it resumes."""

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from holdall import checkpoints, files
from holdall.contract import Config
from holdall.files import RunError
from holdall.training.chassis import Background, RunFolder, RunState, read_state
from holdall.training.schedule import cosine, warmup

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Run(Config):
    """A config with a field that its first version did not have, and one that may move."""

    rate: float = 0.5
    newer: int = 7
    data: str = "here"


def folder(path: Path, config: Run = Run(), **options: object) -> RunFolder:
    return RunFolder(path, config, "checkpoint.safetensors", may_move=("data",), **options)


def saved(path: Path, step: int = 3, lines: int = 2) -> RunFolder:
    """A folder with a checkpoint and that many lines of metrics, and one more line after it."""
    with folder(path, about={"model": "tiny"}) as run:
        run.claim(CPU)
        for line in range(lines):
            run.log({"line": line})
        run.save(RunState(step=step, metrics_bytes=run.metrics_bytes()), {"x": torch.arange(3.0)})
        run.log({"line": "after"})
    return run


def test_a_folder_is_claimed_by_one_config(tmp_path: Path) -> None:
    run = folder(tmp_path, environment={"devices": 2})
    assert not run.holds_run()
    run.claim(CPU)
    assert run.holds_run()
    assert json.loads((tmp_path / "config.json").read_text()) == Run().to_dict()
    assert json.loads((tmp_path / "environment.json").read_text())["devices"] == 2
    says = r"another config \(in config.json, rate: 0.5 there, 0.25 here\); choose another folder"
    for refused in (RunFolder.holds_run, lambda run: run.claim(CPU)):
        with pytest.raises(RunError, match=says):
            refused(folder(tmp_path, Run(rate=0.25)))


def test_data_may_move(tmp_path: Path) -> None:
    folder(tmp_path).claim(CPU)
    folder(tmp_path, Run(data="there")).claim(CPU)
    assert json.loads((tmp_path / "config.json").read_text())["data"] == "there"


def test_a_folder_from_before_a_field_existed_has_its_default(tmp_path: Path) -> None:
    files.write_json(tmp_path / "config.json", {"rate": 0.5, "data": "here"})
    assert folder(tmp_path).holds_run()
    with pytest.raises(RunError, match="newer: 7 there, 8 here"):
        folder(tmp_path, Run(newer=8)).holds_run()
    files.write_json(tmp_path / "config.json", {"rate": 0.5, "data": "here", "unheard_of": 1})
    with pytest.raises(RunError, match="unheard_of: 1 there, nothing here"):
        folder(tmp_path).holds_run()


def test_a_checkpoint_is_resumed_with_the_metrics_of_its_step(tmp_path: Path) -> None:
    saved(tmp_path)
    run, x = folder(tmp_path), torch.zeros(3)
    state = run.resume(RunState, 5, lambda file, state: file.fill({"x": x}))
    assert state is not None
    assert state.step == 3
    assert x.tolist() == [0.0, 1.0, 2.0]
    assert files.read_lines(run.metrics) == [{"line": 0}, {"line": 1}]
    with checkpoints.opened(run.checkpoint) as file:
        assert json.loads(file.about["model"]) == "tiny"
        assert read_state(file, RunState) == state


def test_without_a_checkpoint_metrics_begin_again(tmp_path: Path) -> None:
    saved(tmp_path).checkpoint.unlink()
    assert folder(tmp_path).resume(RunState, 5, lambda file, state: None) is None
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lost_metrics_are_reported(tmp_path: Path) -> None:
    run = saved(tmp_path)
    run.metrics.write_text('{"line": 0}\n')
    with pytest.warns(UserWarning, match=r"metrics.jsonl lacks 12 bytes that were there at step 3"):
        folder(tmp_path).resume(RunState, 5, lambda file, state: None)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run = saved(tmp_path, step=6)
    with pytest.raises(RunError, match="it is of step 6 of 5"):
        folder(tmp_path).resume(RunState, 5, lambda file, state: None)
    checkpoints.write(run.checkpoint, {}, {"model": "{}"})
    with pytest.raises(RunError, match="does not say which step"):
        folder(tmp_path).resume(RunState, 5, lambda file, state: None)


def test_a_process_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    with folder(tmp_path, writes=False) as run:
        run.claim(CPU)
        run.log({"line": 0})
        run.save(RunState(step=1, metrics_bytes=run.metrics_bytes()), {"x": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_what_went_wrong_in_the_background_is_raised_by_the_next_call() -> None:
    def fail() -> None:
        raise OSError("disk full")

    for next_call in (Background.wait, lambda background: background.start(print)):
        background = Background()
        background.start(fail)
        with pytest.raises(OSError, match="disk full"):
            next_call(background)
        background.close()


def test_one_job_runs_at_a_time() -> None:
    background, done, gate = Background(), [], threading.Event()

    def wait() -> None:
        gate.wait(10)
        done.append("first")

    background.start(wait)
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: done.append("second"))
    assert done[0] == "first"
    background.wait()
    assert done == ["first", "second"]
    background.close()


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    assert [warmup(step, 4) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert warmup(0, 0) == 1.0
    assert [cosine(progress) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [cosine(progress, 0.1) for progress in (0, 0.5, 1)] == pytest.approx([1, 0.55, 0.1])
