"""Training: repeatable bit-exactly, resumable after any kind of end, populations equal to single runs."""

import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from children import kill_and_resume
from safetensors.torch import load_file

import holdall
from holdall import files
from holdall.files import RunError
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.tasks.data import MQARData, MQARSegment, TaskData
from holdall.training.populations import Progress, Stopped, TrainConfig, Trainer, train

TASK = MQARData(
    vocab=32,
    filler="zero",
    train=(MQARSegment(length=16, pairs=2, rows=100), MQARSegment(length=24, pairs=3, rows=60)),
    test=(MQARSegment(length=16, pairs=2, rows=50), MQARSegment(length=24, pairs=3, rows=50)),
)


def config(**changes: object) -> TrainConfig:
    layers = (BaseConvConfig(width=16), TaylorConfig(width=16, feature_dim=4))
    base = TrainConfig(
        model=ModelConfig(vocab=32, width=16, layers=layers),
        data=TASK,
        learning_rates=(0.01,),
        batch=16,
        epochs=3,
        stop_at=0,
    )
    return dataclasses.replace(base, **changes)


def weights(folder: Path, member: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"model-{member}.safetensors")


def assert_same_run(a: Path, b: Path, member: int = 0) -> None:
    for name, tensor in weights(a, member).items():
        assert torch.equal(tensor, weights(b, member)[name]), name
    without_time = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in files.read_lines(f / "metrics.jsonl")]
        for f in (a, b)
    ]
    assert without_time[0] == without_time[1]


# ----------------------------------------------------------------------------------------------- batches


def test_an_epoch_shows_every_row_once_and_never_mixes_segments() -> None:
    data = TaskData(TASK)
    seen = {16: [], 24: []}
    for step in range(data.steps_per_epoch(16)):
        tokens, at, answers = data.batch(0, step, 16)
        assert at.shape == answers.shape == (len(tokens), {16: 2, 24: 3}[tokens.shape[1]])
        seen[tokens.shape[1]] += [tuple(row) for row in tokens.tolist()]
    for segment, length in zip(data.train, (16, 24), strict=True):
        assert sorted(seen[length]) == sorted(tuple(row) for row in segment.tokens_BN.tolist())


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    data, again = TaskData(TASK), TaskData(TASK)
    epoch = data.steps_per_epoch(16)
    again.batch(3, 7, 16)  # what was asked before does not matter
    torch.manual_seed(99)
    assert torch.equal(data.batch(1, 5, 16).tokens_BN, again.batch(1, 5, 16).tokens_BN)
    orders = [
        [data.batch(seed, first + step, 16).tokens_BN.tolist() for step in range(epoch)]
        for seed, first in ((0, 0), (1, 0), (0, epoch))
    ]
    assert orders[0] != orders[1]
    assert [len(rows[0]) for rows in orders[0]] == [len(rows[0]) for rows in orders[1]]
    assert orders[0] != orders[2]


def test_training_and_test_rows_differ() -> None:
    data = TaskData(dataclasses.replace(TASK, train=TASK.test))
    assert not torch.equal(data.train[0].tokens_BN, data.test[0].tokens_BN)


# ---------------------------------------------------------------------------------------------- the loop


@pytest.mark.quick
def test_it_learns(tmp_path: Path) -> None:
    task = dataclasses.replace(TASK, train=(MQARSegment(length=16, pairs=2, rows=2000),), test=TASK.test[:1])
    (result,) = train(config(data=task, epochs=12, stop_at=0.95, batch=32), tmp_path / "run")
    assert result["stopped"] == "accuracy"
    assert result["accuracy"] >= 0.95
    assert result["accuracy_by_difficulty"] == {"2": result["accuracy"]}


def test_the_same_config_gives_the_same_weights_whatever_the_global_random_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    train(config(), tmp_path / "a")
    state = torch.random.get_rng_state()
    train(config(), tmp_path / "b")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_too_the_same_config_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(config(learning_rates=(0.003, 0.01)), tmp_path / name, device="cuda")
    for member in (0, 1):
        assert_same_run(tmp_path / "a", tmp_path / "b", member)


def test_seeds_and_learning_rates_give_other_weights(tmp_path: Path) -> None:
    train(config(learning_rates=(0.01, 0.02), seeds=(0, 1)), tmp_path / "run")
    embeds = [weights(tmp_path / "run", member)["embed.weight"] for member in range(4)]
    assert len({tuple(embed.flatten().tolist()) for embed in embeds}) == 4


@pytest.mark.parametrize("together", [False, True])
def test_a_member_of_a_population_ends_where_it_would_have_ended_alone(
    tmp_path: Path, together: bool
) -> None:
    rates, seeds = (0.003, 0.01), (0, 1)
    results = train(config(learning_rates=rates, seeds=seeds, epochs=2), tmp_path / "all", together=together)
    for index, result in enumerate(results):
        one = config(learning_rates=(result["learning_rate"],), seeds=(result["seed"],), epochs=2)
        folder = tmp_path / f"alone-{index}"
        (alone,) = train(one, folder)
        assert result["accuracy"] == pytest.approx(alone["accuracy"], abs=0.02)
        for name, tensor in weights(folder).items():
            # AdamW divides by the root of squares, so that rounding of 1e-7 can grow to a share of the rate
            torch.testing.assert_close(weights(tmp_path / "all", index)[name], tensor, rtol=1e-3, atol=2e-4)


def test_a_member_that_is_done_leaves_the_others_to_go_on(tmp_path: Path) -> None:
    task = dataclasses.replace(TASK, train=(MQARSegment(length=16, pairs=2, rows=2000),), test=TASK.test[:1])
    slow, fast = train(
        config(data=task, learning_rates=(1e-6, 0.01), epochs=10, stop_at=0.9, batch=32),
        tmp_path / "run",
        together=True,
    )
    assert (slow["stopped"], fast["stopped"]) == ("end", "accuracy")
    assert fast["steps"] < slow["steps"] == 10 * 63


def test_divergence_is_reported_and_counts_as_no_accuracy(tmp_path: Path) -> None:
    (result,) = train(config(learning_rates=(1e30,)), tmp_path / "run")
    assert result["stopped"] == "diverged"
    assert result["accuracy"] is None
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == [result]


def test_progress_is_reported(tmp_path: Path) -> None:
    reports: list[Progress] = []
    train(config(epochs=30), tmp_path / "run", on_progress=reports.append)
    assert reports
    assert all(0 < each.step <= each.steps == 30 * 11 for each in reports)


# ------------------------------------------------------------------------------------------------ resuming


def test_stopped_anywhere_it_resumes_bit_exactly(tmp_path: Path) -> None:
    train(config(learning_rates=(0.003, 0.01)), tmp_path / "whole")
    for stop_after in (1, 3, 9, 15):  # four stops in one run, one of them within its first steps
        steps = iter(range(10**6))
        with pytest.raises(Stopped):
            train(
                config(learning_rates=(0.003, 0.01)),
                tmp_path / "cut",
                should_stop=lambda steps=steps, last=stop_after: next(steps) == last,
            )
        assert not (tmp_path / "cut" / "result.json").exists()
    train(config(learning_rates=(0.003, 0.01)), tmp_path / "cut")
    for member in (0, 1):
        assert_same_run(tmp_path / "whole", tmp_path / "cut", member)
    assert not (tmp_path / "cut" / "checkpoint.safetensors").exists()


def test_killed_at_any_moment_the_same_command_gives_the_same_result(tmp_path: Path) -> None:
    run = config(epochs=30)
    train(run, tmp_path / "whole")
    kill_and_resume(train, run, tmp_path / "cut", at=(3, 12, 21), checkpoint="checkpoint.safetensors")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(config(), tmp_path / "run")
    again = train(config(), tmp_path / "run", should_stop=lambda: True)
    assert first == again


def test_the_weights_of_every_mixer_make_the_trained_model_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    write = Trainer._write_weights
    monkeypatch.setattr(Trainer, "_write_weights", lambda self, path, member: (
        trained.append(member.model), write(self, path, member)))  # fmt: skip
    entries = map(holdall.describe, holdall.names())
    layers = tuple(entry.configure(width=16, **entry.config.variants[0]) for entry in entries)
    few = (MQARSegment(length=8, pairs=1, rows=4),)
    task = dataclasses.replace(TASK, train=few, test=few)
    model = ModelConfig(vocab=32, width=16, layers=layers)
    train(config(model=model, data=task, batch=4, epochs=1), tmp_path)
    again, tokens = model.build(), torch.arange(10)[None]
    again.load_state_dict(weights(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(tokens)[0], trained[0](tokens)[0])
    assert again(tokens)[0].isfinite().all()


def test_a_checkpoint_holds_buffers_too(tmp_path: Path) -> None:
    layers = (holdall.describe("performer").configure(width=16),)
    again = config(model=ModelConfig(vocab=32, width=16, layers=layers))
    calls = iter(range(100))
    with pytest.raises(Stopped):
        train(again, tmp_path, should_stop=lambda: next(calls) > 2)
    assert "0.blocks.0.mixer.projection_FK" in load_file(tmp_path / "checkpoint.safetensors")
    train(again, tmp_path)
    train(again, tmp_path / "at once")
    assert_same_run(tmp_path, tmp_path / "at once")


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    train(config(), tmp_path / "run")
    says = r"in config.json, learning_rates\[0\]: 0.01 there, 0.02 here\); choose another folder"
    with pytest.raises(RunError, match=says):
        train(config(learning_rates=(0.02,)), tmp_path / "run")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    asked = iter(range(100))
    with pytest.raises(Stopped):
        train(config(), tmp_path / "run", should_stop=lambda: next(asked) == 2)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged"):
        train(config(), tmp_path / "run")


def test_a_full_disk_is_a_clear_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(), tmp_path / "whole")
    folder = tmp_path / "run"
    steps = iter(range(100))
    with pytest.raises(Stopped):
        train(config(), folder, should_stop=lambda: next(steps) == 15)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"run/.*: No space left on device.*same command"):
            train(config(), folder, checkpoint_seconds=0)
    assert not list(folder.glob(".*.tmp"))
    train(config(), folder)
    assert_same_run(tmp_path / "whole", folder)


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*file.*: Not a directory.*--out"):
        train(config(), tmp_path / "file" / "run")


@pytest.mark.parametrize("part", ["_member", "_resume", "train_step"])
def test_a_run_that_is_refused_before_its_first_step_leaves_its_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not this one")

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, part, refuse)
        with pytest.raises(ValueError, match="not this one"):
            train(config(), tmp_path / "run")
    with pytest.raises(Stopped):  # and one that is stopped before it
        train(config(), tmp_path / "run", should_stop=lambda: True)
    train(config(batch=32), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch"] == 32


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    used = pytest.raises(RunError, match="in use by another run")
    with files.locked(tmp_path / "run"), used, files.locked(tmp_path / "run", patience=0.2):
        pass
    with files.locked(tmp_path / "run", patience=0.2):
        pass


def test_a_torn_last_line_is_left_out_and_an_atomic_write_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert files.read_lines(tmp_path / "lines") == [{"a": 1}, {"a": 2}]
    files.write_json(tmp_path / "value.json", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == ["lines", "value.json"]


def test_bad_settings_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"learning_rates = \(nan,\) must be positive and finite"):
        config(learning_rates=(math.nan,))
    with pytest.raises(ValueError, match="16 positions, the task rows of 24"):
        config(model=dataclasses.replace(config().model, positions=16))
    with pytest.raises(ValueError, match=r"vocab 16 is smaller than the task's 32"):
        config(model=dataclasses.replace(config().model, vocab=16))
    with pytest.raises(ValueError, match="member occurs twice"):
        config(learning_rates=(0.01, 0.01))
