"""Sweeps: what they leave, that they resume after Ctrl-C and kill -9, and that every recipe builds."""

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import children
import pytest
import torch
from safetensors.torch import load_file

from holdall import cli, commands, files, processes, recipes
from holdall.analysis.bits import accuracy, state_bits
from holdall.commands import bits as bits_command
from holdall.contract import Format, registry
from holdall.files import RunError
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.linformer import LinformerConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.recipes import patterns, quick
from holdall.report.data import load
from holdall.sweeps import OutOfTime, SweepConfig, Watcher, compile_ahead, in_order, pool, run_sweep
from holdall.sweeps import folder as folders
from holdall.sweeps import sweep as sweep_module
from holdall.sweeps.bits import lines_in_formats
from holdall.tasks.data import MQARData, MQARSegment, Segment, SingleQueryData
from holdall.tasks.information import recall_bits
from holdall.training.populations import TrainConfig, train, trained

TASK = MQARData(
    vocab=32,
    filler="zero",
    train=(MQARSegment(length=16, pairs=2, rows=64),),
    test=(MQARSegment(length=16, pairs=2, rows=20), MQARSegment(length=24, pairs=3, rows=20)),
)


def tiny(rates: tuple[float, ...] = (0.01, 0.02), epochs: int = 1) -> SweepConfig:
    points = []
    for label, mixer in (
        ("attention", AttentionConfig(width=8)),
        ("window 4", SlidingWindowConfig(width=8, window=4)),
    ):
        point = quick.point(label, label.split()[0], mixer)
        train = dataclasses.replace(
            point.train,
            model=dataclasses.replace(point.train.model, vocab=32),
            data=TASK,
            learning_rates=rates,
            batch=16,
            epochs=epochs,
        )
        points.append(dataclasses.replace(point, train=train))
    return SweepConfig(recipe="tiny", points=tuple(points))


def run(out: Path, sweep: SweepConfig | None = None, **options: Any) -> list[dict[str, Any]]:
    return run_sweep(sweep or tiny(), out, command="holdall frontier tiny", workers=2, **options)


@pytest.fixture(scope="module", autouse=True)
def _workers_are_forked() -> Iterator[None]:
    """A sweep's workers are processes as ever, but need not import PyTorch first; see children.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "context", children.context)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    run(folder)
    return folder


def results(folder: Path) -> list[dict[str, Any]]:
    return files.read_lines(folder / "results.jsonl")


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.mark.quick
def test_a_sweep_leaves_one_line_per_model_and_learning_rate(tmp_path: Path) -> None:
    told: list[int] = []
    lines = run(tmp_path / "out", watcher=Watcher(finished=lambda index, lines: told.append(index)))
    assert files.read_lines(tmp_path / "out" / "results.jsonl") == lines
    assert sorted(told) == [0, 1, 2, 3]
    assert [(line["label"], line["learning_rate"]) for line in lines] == [
        (label, rate) for label in ("attention", "window 4") for rate in (0.01, 0.02)
    ]
    window = lines[2]
    # BaseConv: two inputs of width 8; window: three keys and values of width 8 in fp32, and an int64
    assert window["state_bytes"] == 4 * (2 * 8 + 2 * 3 * 8) + 8
    # attention: keys and values of all 24 tokens of the longest test row
    assert lines[0]["state_bytes"] == 4 * (2 * 8 + 2 * 24 * 8) + 8
    assert window["state_elements"] == 2 * 8 + 2 * 3 * 8 + 1
    assert window["options"] == {"window": 4}
    assert window["layers"] == ["base-conv", "sliding-window"]
    assert window["form"] == "parallel"
    assert window["steps"] == 4
    assert set(window["accuracy_by_difficulty"]) == {"2", "3"}
    bits = max(recall_bits(int(k), 16, a) for k, a in window["accuracy_by_difficulty"].items())
    assert window["recall_bits"] == pytest.approx(bits, abs=0.01)
    assert window["recall_efficiency"] == pytest.approx(bits / (8 * window["state_bytes"]))
    assert (tmp_path / "out" / window["run"] / window["weights"]).exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["command"] == "holdall frontier tiny"
    assert config["context_len"] == 24
    assert [segment["pairs"] for segment in config["test"]] == [2, 3]
    assert SweepConfig.from_dict({"recipe": "tiny", "points": config["points"]}) == tiny()


def test_parameters_are_counted(whole: Path) -> None:
    model = tiny().points[0].train.model
    (line, *_) = results(whole)
    assert line["parameters"] == sum(p.numel() for p in model.build().parameters())


def test_together_or_alone_the_lines_name_the_same_models(tmp_path: Path) -> None:
    jobs = tiny().jobs(together=True)
    assert [job.point.train.learning_rates for job in jobs] == [(0.01, 0.02)] * 2
    assert len({job.folder for job in tiny().jobs(together=False)}) == 4


def test_a_finished_sweep_trains_nothing_again(whole: Path) -> None:
    weights = sorted((whole / "runs").glob("*/model-0.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in weights]
    assert len(stamps) == 4
    assert run(whole) == results(whole)
    assert [path.stat().st_mtime_ns for path in weights] == stamps


def test_another_sweep_in_the_same_folder_is_refused(whole: Path) -> None:
    says = r"holds another sweep \(.*attention, width 8\.train\.learning_rates: .*\); choose .*--out"
    with pytest.raises(RunError, match=says):
        run(whole, tiny(rates=(0.05,)))
    with pytest.raises(RunError, match=r"holds another sweep \(the recipe is 'tiny', not 'other'\)"):
        run(whole, SweepConfig(recipe="other", points=tiny().points))
    other = dataclasses.replace(tiny().points[0], label="other rows")
    data = dataclasses.replace(TASK, test=TASK.test[:1])
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, data=data))
    with pytest.raises(RunError, match=r"holds another sweep \(test: "):
        run(whole, SweepConfig(recipe="tiny", points=(other,)))


def test_seeds_can_be_added_later(tmp_path: Path) -> None:
    def with_seeds(count: int) -> SweepConfig:
        points = [
            dataclasses.replace(point, train=dataclasses.replace(point.train, seeds=tuple(range(count))))
            for point in tiny().points
        ]
        return SweepConfig(recipe="tiny", points=tuple(points))

    first = run(tmp_path / "out", with_seeds(1), **TOGETHER)
    told: list[int] = []
    watcher = Watcher(progress=lambda index, progress: told.append(index))
    both = run(tmp_path / "out", with_seeds(2), watcher=watcher, **TOGETHER)
    assert set(told) <= {1, 3}  # what is new
    assert [line for line in both if line["seed"] == 0] == first
    assert [(line["label"], line["seed"], line["learning_rate"]) for line in both] == [
        (label, seed, rate) for label in ("attention", "window 4") for seed in (0, 1) for rate in (0.01, 0.02)
    ]
    assert both[2]["accuracy_by_difficulty"] != both[0]["accuracy_by_difficulty"]
    with pytest.raises(RunError, match=r"more seeds, \[1\] too; give at least --seeds 2"):
        run(tmp_path / "out", with_seeds(1), **TOGETHER)


def test_points_of_one_sweep_share_their_test() -> None:
    first, second = tiny().points
    other = dataclasses.replace(TASK, test=TASK.test[:1])
    second = dataclasses.replace(second, train=dataclasses.replace(second.train, data=other))
    with pytest.raises(ValueError, match="'window 4' is tested on other rows than 'attention'"):
        SweepConfig(recipe="tiny", points=(first, second))
    with pytest.raises(ValueError, match="would share the run folder"):
        SweepConfig(recipe="tiny", points=(first, first))


LONG = tiny(epochs=100)
"""Long enough to be stopped before anything is finished."""

SCRIPT = """
import json, sys
from pathlib import Path
from holdall.sweeps.sweep import SweepConfig, run_sweep
if __name__ == "__main__":
    sweep = SweepConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    try:
        run_sweep(sweep, Path(sys.argv[2]), command="holdall frontier tiny", workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a longer sweep that nobody disturbed."""
    folder = tmp_path_factory.mktemp("long") / "out"
    run(folder, LONG)
    return folder


@pytest.fixture(scope="module")
def long(alone: Path) -> list[dict[str, Any]]:
    """Its lines."""
    return results(alone)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, id="ctrl-c", marks=pytest.mark.full),
        pytest.param(signal.SIGKILL, id="kill-9"),
    ],
)
def test_a_stopped_sweep_goes_on_to_the_same_results(
    tmp_path: Path, how: signal.Signals, long: list[dict[str, Any]]
) -> None:
    script, config, out = tmp_path / "sweep.py", tmp_path / "sweep.json", tmp_path / "cut"
    script.write_text(SCRIPT)
    config.write_text(json.dumps(LONG.to_dict()))
    cut = subprocess.Popen([sys.executable, str(script), str(config), str(out)], start_new_session=True)
    until = time.monotonic() + 60
    while not list(out.glob("runs/*/metrics.jsonl")) and time.monotonic() < until:
        time.sleep(0.02)
    if how == signal.SIGINT:
        os.killpg(cut.pid, how)  # a terminal's Ctrl-C goes to every process of the group
        assert cut.wait(timeout=60) == 130
        assert list(out.glob("runs/*/checkpoint.safetensors"))
    else:
        cut.send_signal(how)  # the parent alone: its workers must not live on
        cut.wait(timeout=60)
    assert len(list(out.glob("runs/*/result.json"))) < 4
    resumed = run(out, LONG)  # which waits for runs in use, until their workers have noticed
    assert without_time(resumed) == without_time(long)


def one_worker(sweep: dict[str, Any], out: Path) -> None:
    """What each process of a Slurm array does."""
    processes.context = children.context  # type: ignore[assignment]
    run_sweep(SweepConfig.from_dict(sweep), out, command="holdall frontier tiny", workers=1)


def test_processes_share_a_folder_and_take_over_what_one_leaves_that_is_killed(
    tmp_path: Path, alone: Path
) -> None:
    out, until = tmp_path / "shared", time.monotonic() + 60
    lost, other = (children.start(one_worker, LONG.to_dict(), out) for _ in range(2))
    while len(list(out.glob("runs/*/metrics.jsonl"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)  # each has a run of its own
    lost.kill()
    lost.join()
    assert len(list(out.glob("runs/*/result.json"))) < 4
    told: list[int] = []
    watcher = Watcher(finished=lambda index, lines: told.append(index))
    lines = run_sweep(LONG, out, command="holdall frontier tiny", workers=1, watcher=watcher)
    other.join(60)
    assert other.exitcode == 0
    assert sorted(told) == [0, 1, 2, 3]
    assert without_time(lines) == without_time(results(alone))
    assert files.read_lines(out / "results.jsonl") == lines
    for line in lines:  # the weights too, to the last bit
        kept, wanted = (load_file(folder / line["run"] / line["weights"]) for folder in (out, alone))
        assert kept.keys() == wanted.keys()
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_a_run_that_another_process_trains_is_left_to_it_and_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "LOOK_SECONDS", 0.05)
    job, *_ = tiny().jobs(together=False)
    elsewhere = tmp_path / "out" / "runs" / job.folder
    waited: list[int] = []

    def finished(index: int, lines: list[dict[str, Any]]) -> None:
        waited.append(index)
        if len(waited) == 3:  # all but that one
            assert index != 0
            lock.__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(contextlib.ExitStack())
        lock.enter_context(files.locked(elsewhere))
        lines = run(tmp_path / "out", watcher=Watcher(finished=finished))
    assert waited[-1] == 0
    assert len(lines) == 4


def test_progress_of_runs_elsewhere_is_what_their_folders_say(tmp_path: Path) -> None:
    jobs = tiny(epochs=3).jobs(together=False)
    runs = folders.Runs(tiny(epochs=3), tmp_path, jobs, lambda: None)
    for path in runs.folders[:2]:
        path.mkdir(parents=True)
        files.append_line(path / "metrics.jsonl", {"step": 4, "loss": 2.0, "accuracy": 0.25})
    assert list(runs.moved()) == []  # whether anybody trains them is yet to be seen
    files.append_line(runs.folders[1] / "metrics.jsonl", {"step": 8, "loss": None, "accuracy": 0.5})
    ((index, now),) = runs.moved()
    assert (index, now.step, now.steps, now.accuracy, math.isnan(now.loss)) == (1, 8, 12, 0.5, True)
    assert list(runs.moved()) == []


def test_a_process_with_fewer_seeds_leaves_the_results_to_one_with_more(tmp_path: Path) -> None:
    def with_seeds(count: int) -> SweepConfig:
        points = [
            dataclasses.replace(point, train=dataclasses.replace(point.train, seeds=tuple(range(count))))
            for point in tiny(rates=(0.01,)).points
        ]
        return SweepConfig(recipe="tiny", points=tuple(points))

    more: list[dict[str, Any]] = []

    def meanwhile(index: int, lines: list[dict[str, Any]]) -> None:
        if not more:
            more.extend(run(tmp_path, with_seeds(2)))

    fewer = run(tmp_path, with_seeds(1), watcher=Watcher(finished=meanwhile))
    assert (len(fewer), len(more)) == (2, 4)
    assert files.read_lines(tmp_path / "results.jsonl") == more


TOGETHER: dict[str, Any] = {"together": True}
"""As on a GPU, each population one run."""


def test_populations_may_be_one_run_each(tmp_path: Path) -> None:
    told: list[int] = []
    watcher = Watcher(finished=lambda index, lines: told.append(index))
    lines = run(tmp_path / "out", watcher=watcher, keep_weights=False, **TOGETHER)
    assert sorted(told) == [0, 1]
    assert [line["learning_rate"] for line in lines] == [0.01, 0.02] * 2
    assert {line["weights"] for line in lines} == {None}


def test_out_of_time_everything_is_kept_and_the_next_call_goes_on(
    tmp_path: Path, long: list[dict[str, Any]]
) -> None:
    with pytest.raises(OutOfTime, match="of 4 runs are not finished"):
        run(tmp_path / "pieces", LONG, minutes=0.005)
    assert (tmp_path / "pieces" / "results.jsonl").exists()
    assert without_time(run(tmp_path / "pieces", LONG)) == without_time(long)


def test_a_machines_gpus_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pool.devices("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert pool.devices("cpu", 2) == ["cpu", "cpu"]


def test_every_model_but_the_first_is_compiled_ahead_once_on_one_of_the_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [point for sweep in recipes.sweeps("based-figure2", 2) for point in sweep.points]
    configs = [job.point.train for job in SweepConfig(recipe="x", points=tuple(points)).jobs(together=True)]
    assert len(configs) == 2 * len(points)
    started: list[Any] = []
    ended: list[str] = []
    context = SimpleNamespace(
        Process=lambda args, **_: SimpleNamespace(
            start=lambda: started.append(args), kill=lambda: ended.append(args[2]), join=lambda: None
        )
    )
    monkeypatch.setattr(compile_ahead.processes, "context", lambda: context)
    with compile_ahead.compiling_ahead(configs, ["cuda:0", "cuda:1"], []):
        assert not ended
    assert ended == ["cuda:0", "cuda:1"]
    assert [gpu for _, _, gpu, _ in started] == ["cuda:0", "cuda:1"]
    short = [TrainConfig.from_dict(plain) for plain, *_ in started for plain in plain]
    trained = {(each.model, len(each.learning_rates)) for each in short}
    assert len(short) == len(trained) == len(points) - 1  # two seeds of the first train at once
    lengths = [segment.length for segment in configs[0].data.train]
    for each in short:
        assert [segment.length for segment in each.data.train] == lengths
        assert each.epochs * sum(segment.rows for segment in each.data.train) == len(lengths) * each.batch
    started.clear()
    with compile_ahead.compiling_ahead(configs, ["cpu", "cpu"], []):
        assert not started


def test_what_cannot_be_compiled_ahead_is_passed_over(tmp_path: Path) -> None:
    short = [each.to_dict() for each in compile_ahead.to_compile([point.train for point in tiny().points], 0)]
    broken = short[0] | {"batch": 0}
    process = children.context().Process(
        target=compile_ahead.compile_share, args=([broken, *short], str(tmp_path), "cpu", [])
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert sorted(path.parent.name for path in tmp_path.glob("*/result.json")) == ["1", "2"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_sweep_on_all_gpus_of_a_machine(tmp_path: Path) -> None:
    lines = run(tmp_path / "out", device="cuda")
    used = {
        json.loads(path.read_text())["device"] for path in (tmp_path / "out").glob("runs/*/environment.json")
    }
    assert used == set(pool.devices("cuda", 2))
    assert len(lines) == 4


def test_without_time_nothing_is_trained(tmp_path: Path) -> None:
    with pytest.raises(OutOfTime, match="4 of 4 runs are not finished"):
        run(tmp_path / "out", minutes=0)
    assert not list((tmp_path / "out").glob("runs/*"))
    assert files.read_lines(tmp_path / "out" / "results.jsonl") == []


def test_a_sweep_can_be_made_in_pieces_and_put_together(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", **TOGETHER)
    for family in ("attention", "window"):  # as on two machines
        piece = run(tmp_path / family, families=[family], **TOGETHER)
        assert {line["family"] for line in piece} == {family}
        shutil.copytree(tmp_path / family / "runs", tmp_path / "all" / "runs", dirs_exist_ok=True)
    gathered = run(tmp_path / "all", minutes=0)  # on a third, which has no GPU
    assert without_time(gathered) == without_time(whole)
    assert files.read_lines(tmp_path / "all" / "results.jsonl") == gathered
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        run(tmp_path / "all", families=["atention"])


def test_a_population_trained_elsewhere_counts(tmp_path: Path, whole: Path) -> None:
    """What a GPU trained as one run is gathered on a machine where members are runs of their own."""
    (job, _) = tiny().jobs(together=True)
    train(job.point.train, tmp_path / "out" / "runs" / job.folder, together=True)
    lines = run(tmp_path / "out")
    assert [line["run"] for line in lines] == [
        "runs/attention-width-8-seed-0", "runs/attention-width-8-seed-0",
        "runs/window-4-width-8-lr-0.01-seed-0", "runs/window-4-width-8-lr-0.02-seed-0",
    ]  # fmt: skip
    alone = results(whole)
    assert [line["rows"] for line in lines] == [line["rows"] for line in alone] == [64] * 4
    for line, other in zip(lines, alone, strict=True):
        assert line["accuracy"] == pytest.approx(other["accuracy"], abs=0.05)


def test_a_folder_of_before_difficulties_had_names_is_gathered(tmp_path: Path) -> None:
    """Then the segments of every task had pairs, and so had the keys of accuracies."""
    segment = Segment(length=20, rows=8)
    data = SingleQueryData(vocab=10, task_name="associative-recall", train=(segment,), test=(segment,))
    point = tiny(rates=(0.01,)).points[0]
    point = dataclasses.replace(point, train=dataclasses.replace(point.train, data=data))
    sweep = SweepConfig(recipe="tiny", points=(point,))
    (job,) = sweep.jobs(together=False)
    run_folder = tmp_path / "runs" / job.folder

    def of_before(train: dict[str, Any]) -> dict[str, Any]:
        plain = json.loads(json.dumps(train))
        plain["data"]["practise"] = plain["data"].pop("loss")
        for segment in (*plain["data"]["train"], *plain["data"]["test"]):
            segment["pairs"] = 10
        return plain

    (plain,) = sweep.to_dict()["points"]
    (tmp_path / "config.json").write_text(
        json.dumps({"points": [{**plain, "train": of_before(plain["train"])}]})
    )
    run_folder.mkdir(parents=True)
    (run_folder / "config.json").write_text(json.dumps(of_before(job.point.train.to_dict())))
    result = {
        "learning_rate": 0.01, "seed": 0, "accuracy": 0.75, "accuracy_by_pairs": {"10": 0.75}, "steps": 1,
        "rows": 8, "stopped": "end", "seconds": 1.0, "forms": ["parallel", "parallel"], "weights": None,
    }  # fmt: skip
    (run_folder / "result.json").write_text(json.dumps([result]))
    (line,) = run(tmp_path, sweep, minutes=0)
    assert (line["difficulty"], line["accuracy_by_difficulty"]) == ("tokens", {"20": 0.75})
    assert line["recall_bits"] == pytest.approx(recall_bits(1, 4, 0.75), abs=0.01)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["points"] == json.loads(json.dumps(sweep.to_dict()["points"]))
    assert (config["difficulty"], config["test"][0]["difficulty"]) == ("tokens", 20)


def test_a_mixer_file_of_the_user_s_own_joins_in_every_process(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "add-a-mixer.md").read_text()
    file = tmp_path / "leaky.py"
    file.write_text(page.partition("```python\n")[2].partition("```")[0])
    from holdall import mixers

    (name,) = mixers.load(file)
    try:
        point = quick.point(name, name, mixers.entry(name).configure(width=8))
        train = dataclasses.replace(tiny().points[0].train, learning_rates=(0.01,))
        train = dataclasses.replace(
            train, model=dataclasses.replace(train.model, layers=point.train.model.layers)
        )
        sweep = SweepConfig(recipe="tiny", points=(dataclasses.replace(point, train=train),))
        (line,) = run(tmp_path / "out", sweep, plugins=[file])
        assert line["mixer"] == "leaky-sum"
        assert line["state_bytes"] == 4 * (2 * 8 + 8)
    finally:
        registry._registry.pop(name)  # the other tests of this process know nothing of it


# -------------------------------------------------------------------------------------- states in fewer bits

BITS: dict[str, Any] = {"every": 3, "seed": 0, "device": "cpu", "load": [], "command": "holdall bits"}


def test_bits_are_measured_of_the_weights_that_the_sweep_kept(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, formats = tmp_path / "bits", ["fp32", "int8", "int4+feedback"]
    assert bits_command.bits(whole, out, formats, **BITS) == 0
    lines, best = files.read_lines(out / "results.jsonl"), {}
    for line in results(whole):
        if line["label"] not in best or line["accuracy"] > best[line["label"]]["accuracy"]:
            best[line["label"]] = line
    labels = [(line["family"], line["label"]) for line in lines]
    assert labels == [(name, f"{name}, {each}") for name in ("attention", "window 4") for each in formats]
    for line in lines:
        own = best[line["family"]]
        format, run = Format.parse(line["format"]), whole / own["run"]
        assert line["learning_rate"] == own["learning_rate"]
        model = trained(run / own["weights"])
        segments = TASK.build().test
        scores = [accuracy(model, segment, format, every=3) for segment in segments]
        assert line["accuracy"] == sum(scores) / 2
        assert line["accuracy_by_difficulty"] == {"2": scores[0], "3": scores[1]}
        assert line["state_bytes"] == state_bits(model, 24, format) / 8
        proven = max(recall_bits(pairs, 16, score) for pairs, score in zip((2, 3), scores, strict=True))
        assert line["recall_efficiency"] == pytest.approx(proven / (8 * line["state_bytes"]))
        if line["format"] == "fp32":
            assert line["state_bytes"] == own["state_bytes"]
            assert line["accuracy"] == pytest.approx(own["accuracy"], abs=0.03)  # one tie of 40 answers
    printed = capsys.readouterr().out
    assert "…" not in printed  # no cell is cut off
    shares = [f"{line['accuracy']:.1%}" for line in lines if line["family"] == "window 4"]
    assert [text for text in shares if f" {text} " in printed] == shares
    assert load([out])[0].axis.unit == "bits"
    assert {"frontier.png", "frontier.html", "table.md"} < {path.name for path in out.iterdir()}


def three_formats_then_wait(sweep: Path, out: Path) -> None:
    """`holdall bits`, which is still measuring the fourth of four when it is killed."""

    def slow(*args: Any, **how: Any) -> Iterator[dict[str, Any]]:
        for line in lines_in_formats(*args, **how):
            if line["label"] == "window 4, int4":
                time.sleep(600)
            yield line

    bits_command.lines_in_formats = slow
    bits_command.bits(sweep, out, ["fp32", "int4"], **BITS)


def test_bits_resume_after_kill_9_and_measure_nothing_twice(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, out, measured = tmp_path / "alone", tmp_path / "cut", []
    process = children.start(three_formats_then_wait, whole, out)
    until = time.monotonic() + 60
    while len(files.read_lines(out / "measured.jsonl")) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (out / "results.jsonl").exists()
    with (out / "measured.jsonl").open("a") as file:
        file.write('{"of": {"na')  # as a killed process may leave it

    def watched(*args: Any, **how: Any) -> Iterator[dict[str, Any]]:
        for line in lines_in_formats(*args, **how):
            measured.append(line["label"])
            yield line

    monkeypatch.setattr(bits_command, "lines_in_formats", watched)

    def measured_by(folder: Path, sweep: Path, formats: list[str], **changes: Any) -> list[str]:
        measured.clear()
        assert bits_command.bits(sweep, folder, formats, **(BITS | changes)) == 0
        return list(measured)

    names, formats = ("attention", "window 4"), ["fp32", "int4"]
    all_four = [f"{name}, {format}" for name in names for format in formats]
    assert measured_by(out, whole, formats) == ["window 4, int4"]
    assert measured_by(alone, whole, formats) == all_four
    assert results(out) == results(alone)
    assert measured_by(out, whole, ["int8", *formats]) == ["attention, int8", "window 4, int8"]
    assert len(results(out)) == 6
    assert measured_by(out, whole, formats) == []
    assert results(out) == results(alone), "the formats that were asked for, in that order"
    assert measured_by(out, whole, formats, every=2) == all_four
    again = tmp_path / "again"  # the sweep, one of whose runs was trained once more
    shutil.copytree(whole, again)
    lines = [{**line, "seconds": line["seconds"] + (line["label"] == "attention")} for line in results(again)]
    (again / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_by(out, again, formats) == all_four[:2]


def test_bits_of_a_sweep_without_weights_are_refused(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "bare")
    lines = [{**line, "weights": None} for line in results(whole)]
    (tmp_path / "bare" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RunError, match="has no trained weights; `holdall frontier` keeps them"):
        bits_command.bits(tmp_path / "bare", tmp_path / "out", [], **BITS)
    damaged = {**results(whole)[0], "weights": "model-9.safetensors"}
    with pytest.raises(RunError, match=r"model-9.safetensors is missing. Train the run again"):
        list(lines_in_formats(whole, damaged, [Format("int8")], name="attention"))


def test_trained_weights_are_read_back(whole: Path) -> None:
    line = results(whole)[0]
    path = whole / line["run"] / line["weights"]
    assert trained(path).state_dict().keys() == load_file(path).keys()
    assert all(
        torch.equal(tensor, load_file(path)[name]) for name, tensor in trained(path).state_dict().items()
    )


# --------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", recipes.SWEEPS)
def test_every_recipe_builds_every_model(name: str) -> None:
    for each in recipes.sweeps(name, seeds=2):
        assert SweepConfig.from_dict(json.loads(json.dumps(each.to_dict()))) == each
        for point in each.points:
            assert point.train.seeds == (0, 1)
            model = point.train.model
            if model.width <= 128:
                length = min(32, model.positions or 32)
                assert dataclasses.replace(model, vocab=64).build().state_bytes(length) > 0


def test_published_recipes_are_as_published() -> None:
    zoology = recipes.sweeps("zoology-figure2")
    assert [(s.part, s.data.test[0].pairs, s.points[0].train.batch) for s in zoology] == [
        ("N64", 4, 512), ("N128", 8, 512), ("N256", 16, 256), ("N512", 64, 128),
    ]  # fmt: skip
    train = zoology[0].points[0].train
    assert train.learning_rates == pytest.approx((1e-4, 10**-3.3333333, 10**-2.6666667, 1e-2))
    assert (train.epochs, train.schedule, train.weight_decay, train.stop_at) == (64, "epoch", 0.1, 0.99)
    assert train.data.train[0].rows == 100_000
    assert {point.family for point in zoology[0].points} == {
        "attention", "Hyena", "H3", "RWKV-4", "BaseConv", "Based", "Mamba",
    }  # fmt: skip
    (based,) = recipes.sweeps("based-figure2")
    models = Counter(point.family for point in based.points)
    assert models == {
        "attention": 2, "Taylor": 9, "sliding window": 8, "Mamba": 9, "Mamba-2": 9, "Hyena": 3, "H3": 3,
        "GLA": 3, "DeltaNet": 3, "Gated DeltaNet": 3, "RWKV-7": 3,
    }  # fmt: skip
    assert sum(segment.rows for segment in based.data.train) == 180_000
    assert based.points[0].train.learning_rates == pytest.approx((1e-3, 10**-2.5, 1e-2, 10**-1.5))
    assert based.context_len == 1024


def test_an_unknown_recipe_helps() -> None:
    with pytest.raises(KeyError, match="Did you mean 'quick'"):
        recipes.sweeps("quik")


def test_based_is_a_pattern_of_layers() -> None:
    names = [layer.name for layer in patterns.based(64, repeats=2)]
    assert names == ["base-conv", "taylor", "sliding-window"] * 2


# ----------------------------------------------------------------------------------------- the command line


@pytest.fixture
def holdall(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The command line: what it prints, for these words."""
    monkeypatch.setattr(commands.console, "width", 100)

    def call(*words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["holdall", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said.out + said.err
        return said.out + said.err

    return call


def test_help_is_instant_and_names_the_commands() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-m", "holdall.cli", "--help"], stdout=subprocess.PIPE, check=True)
    assert all(word in done.stdout.decode() for word in ("frontier", "report", "zoo"))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.9  # PyTorch alone takes longer


def test_zoo_lists_every_mixer_with_counted_bytes(holdall: Callable[..., str]) -> None:
    says = holdall("zoo", "--width", "64", "--context", "32")
    for line in ("attention", "base-conv", "hyena", "linear-attention", "mamba", "retnet", "sliding-window"):
        assert line in says
    assert "8.01 KiB" in says  # attention: 2 x 32 x 64 numbers of bf16, and an int64


def test_zoo_describes_one_mixer_and_helps_with_names(holdall: Callable[..., str]) -> None:
    says = holdall("zoo", "mamba")
    assert "2312.00752" in says
    assert "expand = 2" in says
    assert "Did you mean 'mamba'" in holdall("zoo", "mamab", code=2)


def test_a_wrong_command_is_one_line_and_no_traceback(tmp_path: Path, holdall: Callable[..., str]) -> None:
    for arguments in (
        ("frontier", "quik"),
        ("frontier", "quick", "--add", "mamba:stat=4"),
        ("frontier", "quick", "--add", "mamba:state"),
        ("frontier", "based-figure2", "--pairs", "4"),
        ("frontier", "quick", "--load", str(tmp_path / "nothing.py")),
        ("report", str(tmp_path / "nothing")),
    ):
        says = holdall(*arguments, code=2)
        assert "error" in says
        assert "Traceback" not in says


def test_a_time_limit_has_its_own_exit_status(tmp_path: Path, holdall: Callable[..., str]) -> None:
    says = holdall("frontier", "quick", "--minutes", "0", "--out", str(tmp_path), "--device", "cpu", code=75)
    assert "Time is up: 24 of 24 runs are not finished" in says
    assert "the same command resumes it" in says
    says = holdall(
        "frontier", "quick", "--family", "Tailor", "--out", str(tmp_path), "--device", "cpu", code=2
    )
    assert "unknown family 'Tailor'" in says
    assert json.loads((tmp_path / "config.json").read_text())["points"][0]["train"]["precision"] == "fp32"


def test_report_remakes_figure_and_page_from_the_folder_alone(
    tmp_path: Path, whole: Path, holdall: Callable[..., str]
) -> None:
    says = holdall("report", str(whole), "--out", str(tmp_path / "shown"))
    for name, least in (("frontier.png", 10_000), ("frontier.html", 10_000), ("table.md", 500)):
        assert (tmp_path / "shown" / name).stat().st_size > least
        assert name in says


def test_the_shortest_run_comes_first_then_one_of_each_model_the_longest_of_them_before() -> None:
    """So there is a point soon, then each model's speed is known, and none is left alone at the end."""
    point = tiny().points[0]
    points = []
    for times in (1, 3, 2):
        model = dataclasses.replace(point.train.model, layers=times * point.train.model.layers)
        train = dataclasses.replace(point.train, model=model)
        points.append(dataclasses.replace(point, label=f"times {times}", train=train))
    jobs = SweepConfig(recipe="tiny", points=tuple(points)).jobs(together=False)
    order = [(jobs[index].point.label, *jobs[index].point.train.learning_rates) for index in in_order(jobs)]
    assert order == [
        ("times 1", 0.01), ("times 3", 0.01), ("times 2", 0.01),
        ("times 3", 0.02), ("times 2", 0.02), ("times 1", 0.02),
    ]  # fmt: skip


def test_a_sweep_that_is_refused_leaves_its_folder_free(tmp_path: Path) -> None:
    few = LinformerConfig(width=8, max_length=8)  # rows are longer than that
    point = tiny(rates=(0.01,)).points[0]
    train = dataclasses.replace(point.train, model=dataclasses.replace(point.train.model, layers=(few,)))
    with pytest.raises(RunError, match=r"attention-width-8-lr-0\.01-seed-0: .* max_length 8"):
        run(tmp_path / "out", SweepConfig(recipe="tiny", points=(dataclasses.replace(point, train=train),)))
    assert len(run(tmp_path / "out", SweepConfig(recipe="tiny", points=(point,)))) == 1
