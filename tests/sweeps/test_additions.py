"""Mixers added to any recipe: trained as its own models are, in a folder that keeps what it holds."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import children
import pytest

from holdall import files, mixers, processes, recipes
from holdall.files import RunError
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.hyena import HyenaConfig
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.recipes import quick
from holdall.sweeps import SweepConfig, Watcher, plan, published, run_sweep, with_added
from holdall.sweeps.additions import frame, most_shared
from holdall.sweeps.published import Published
from holdall.tasks.data import MQARData, MQARSegment


@pytest.fixture(scope="module", autouse=True)
def _workers_are_forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "context", children.context)
        yield


def tiny(rates: tuple[float, ...] = (0.01,)) -> SweepConfig:
    """Two models of width 8, each a second's training."""
    data = MQARData(
        vocab=32,
        filler="zero",
        train=(MQARSegment(length=16, pairs=2, rows=64),),
        test=(MQARSegment(length=16, pairs=2, rows=20),),
    )
    mixers = {"attention": AttentionConfig(width=8), "BaseConv": BaseConvConfig(width=8)}
    points = (quick.point(label, label, mixer, task=data, rates=rates) for label, mixer in mixers.items())
    return SweepConfig(recipe="tiny", points=tuple(points))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny sweep, finished."""
    out = tmp_path_factory.mktemp("tiny") / "out"
    run_sweep(tiny(), out, workers=2)
    return out


def labels(out: Path) -> list[str]:
    return [line["label"] for line in files.read_lines(out / "results.jsonl")]


@pytest.mark.parametrize("name", recipes.SWEEPS)
def test_any_recipe_takes_any_mixer_as_its_own_models_are(name: str) -> None:
    for sweep in recipes.sweeps(name, seeds=2):
        bigger = with_added(sweep, ["delta-net:kernel=3"])
        assert bigger.points[: len(sweep.points)] == sweep.points
        added = bigger.points[len(sweep.points) :]
        widths = dict.fromkeys(point.train.model.width for point in sweep.points)
        assert [point.train.model.width for point in added] == list(widths)
        for point in added:
            assert (point.label, point.family) == ("delta-net, kernel = 3", "delta-net")
            own = most_shared(sweep, point.train.model.width)
            assert frame(point.train) == frame(own)
            assert point.train.model.layers[-1].options() == {"kernel": 3}


def test_a_mixer_stands_where_the_recipe_s_own_do() -> None:
    (based,) = recipes.sweeps("based-figure2")
    names = {point.label: [layer.name for layer in point.train.model.layers] for point in based.points}
    assert names["Mamba, n = 8"] == ["mamba", "mamba"]
    added = [point.train.model for point in with_added(based, ["s4d"]).points if point.label == "s4d"]
    assert [model.width for model in added] == [64, 128, 48, 256]
    for model in added:
        assert [layer.name for layer in model.layers] == ["base-conv", "s4d"]  # as most of its models are
    synthetics = recipes.sweeps("synthetics")[0]
    added = with_added(synthetics, ["delta-net"]).points[-1].train.model
    assert [layer.name for layer in added.layers] == ["delta-net", "delta-net"]
    assert added.positions == 0, "which only attention has there"
    assert added.mlp == 128


def test_lengths_and_places_are_those_of_task_and_layer() -> None:
    (sweep,) = recipes.sweeps("quick")
    hyena, rwkv, given = (
        point.train.model.layers[-1]
        for point in with_added(sweep, ["hyena", "rwkv-7:heads=1", "hyena:max_length=200"]).points[-3:]
    )
    assert isinstance(hyena, HyenaConfig)
    assert hyena.max_length == 96
    assert isinstance(rwkv, RWKV7Config)
    assert (rwkv.layer, rwkv.layers) == (1, 2)
    assert given.options() == {"max_length": 200}


def test_what_cannot_be_added_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match="Did you mean 'mamba'"):
        with_added(tiny(), ["mamb"])
    with pytest.raises(TypeError, match="mamba has no option 'stat'"):
        with_added(tiny(), ["mamba:stat=4"])
    called_s4d = dataclasses.replace(tiny().points[0], label="s4d")
    with pytest.raises(ValueError, match="give them other labels"):
        with_added(SweepConfig(recipe="tiny", points=(called_s4d,)), ["s4d"])


def test_what_is_there_already_is_not_added_again() -> None:
    (zoo,) = recipes.sweeps("zoo")
    assert with_added(zoo, ["hyena", "mamba", "retnet"]) == zoo


def test_an_added_mixer_alone_is_trained_and_stays(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = files.read_lines(out / "results.jsonl")
    trained: set[int] = set()
    watcher = Watcher(progress=lambda index, progress: trained.add(index))
    bigger = with_added(tiny(), ["s4d:state=4"])
    run_sweep(bigger, out, workers=2, watcher=watcher)
    assert trained <= {2}
    assert labels(out) == ["attention", "BaseConv", "s4d, state = 4"]
    assert files.read_lines(out / "results.jsonl")[:2] == before
    # without it, and with another one: what was added stays
    others: list[dict[str, Any]] = []
    assert len(run_sweep(tiny(), out, workers=2, watcher=Watcher(others=others.extend))) == 2
    assert [line["label"] for line in others] == ["s4d, state = 4"]
    run_sweep(with_added(tiny(), ["retnet"]), out, workers=2)
    assert labels(out) == ["attention", "BaseConv", "retnet", "s4d, state = 4"]
    held = json.loads((out / "config.json").read_text())["points"]
    assert [point["label"] for point in held] == labels(out)
    run_sweep(bigger, out, minutes=0)
    assert sorted(labels(out)) == ["BaseConv", "attention", "retnet", "s4d, state = 4"]


def test_a_mixer_that_is_not_loaded_stays_in_its_folder(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    config = json.loads((out / "config.json").read_text())
    foreign = json.loads(json.dumps(config["points"][0]))
    foreign["label"], foreign["train"]["model"]["layers"][-1]["name"] = "mine", "nobody-loaded-this"
    files.write_json(out / "config.json", {**config, "points": [foreign, *config["points"]]})
    line = {**files.read_lines(out / "results.jsonl")[0], "label": "mine"}
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    run_sweep(tiny(), out, workers=2)
    assert labels(out) == ["attention", "BaseConv", "mine"]


# ----------------------------------------------------------------------------------------- published runs


@pytest.fixture
def publish(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny sweep as one that comes with Holdall."""
    folder = tmp_path / "published" / "tiny"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("runs"))
    environment = json.loads((folder / "environment.json").read_text())
    files.write_json(folder / "environment.json", {**environment, "commit": "abcdef", "gpu": "H200"})
    monkeypatch.setattr(published, "FOLDER", tmp_path / "published")
    return folder


def test_published_runs_are_shown_and_not_trained(tmp_path: Path, publish: Path, whole: Path) -> None:
    out, trained = tmp_path / "out", set()
    watcher = Watcher(progress=lambda index, progress: trained.add(index))
    lines = run_sweep(with_added(tiny(), ["retnet"]), out, workers=2, published=True, watcher=watcher)
    assert trained <= {2}
    assert not [path for path in (out / "runs").iterdir() if "retnet" not in path.name]
    assert [line.get("published") for line in lines] == [{"commit": "abcdef", "hardware": "H200"}] * 2 + [
        None
    ]
    assert [line["accuracy"] for line in lines[:2]] == [
        line["accuracy"] for line in files.read_lines(whole / "results.jsonl")
    ]
    # own runs take their place, once there are any
    lines = run_sweep(tiny(), out, workers=2)
    assert all("published" not in line for line in lines)
    lines = run_sweep(with_added(tiny(), ["retnet"]), out, workers=2, published=True)
    assert all("published" not in line for line in lines)


def test_only_what_was_trained_the_same_way_is_shown(publish: Path) -> None:
    def shown(sweep: SweepConfig) -> list[int | None]:
        """The published lines of each run; None if the model is to be trained."""
        there = map(Published(sweep).of, sweep.jobs(together=True))
        return [None if lines is None else len(lines) for lines in there]

    assert shown(tiny()) == [1, 1]
    assert shown(tiny(rates=(0.01, 0.02))) == [1, 1]
    points = list(tiny().points)
    points[0] = dataclasses.replace(points[0], train=dataclasses.replace(points[0].train, batch=16))
    points[1] = dataclasses.replace(points[1], train=dataclasses.replace(points[1].train, seeds=(0, 1)))
    changed = SweepConfig(recipe="tiny", points=tuple(points))
    assert shown(changed) == [None, 1, 0]  # another batch; seed 0, and seed 1 has no line
    files.write_json(
        publish / "config.json", {"points": [{**tiny().to_dict()["points"][0], "label": "other"}]}
    )
    assert shown(tiny()) == [None, None]


@pytest.mark.parametrize(
    "name", ["quick", "zoo", "zoology-small", "synthetics", "jrt-figure2-small", "based-figure2"]
)
def test_a_recipe_comes_with_runs_of_all_its_models(name: str) -> None:
    for sweep in recipes.sweeps(name):
        come_with = Published(sweep)
        there = [come_with.of(job) for job in sweep.jobs(together=True)]
        assert None not in there
        assert sum(map(bool, there)) >= len(there) - (3 if name == "based-figure2" else 0), "three never ran"
        (line, *_) = come_with.of(sweep.jobs(together=True)[0]) or []
        assert line["published"]["commit"]
        assert line["published"]["hardware"].endswith("H200" if name == "based-figure2" else "CPU cores")


# --------------------------------------------------------------------------------------------------- plans


def test_a_plan_counts_and_writes_nothing(tmp_path: Path, publish: Path, whole: Path) -> None:
    models, seconds = plan(with_added(tiny(), ["retnet"]), tmp_path / "none", published=True)
    assert [(m.finished, m.published, m.left) for m in models] == [(0, 1, 0), (0, 1, 0), (0, 0, 1)]
    assert not (tmp_path / "none").exists()
    assert models[2].seconds > 0 == models[0].seconds
    assert seconds == pytest.approx(models[2].seconds)
    lines = files.read_lines(whole / "results.jsonl")
    assert [m.parameters for m in models[:2]] == [line["parameters"] for line in lines]
    assert [m.state_bytes for m in models[:2]] == [line["state_bytes"] for line in lines]
    models, _ = plan(with_added(tiny(), ["retnet"]), whole, families=["attention"])
    assert [(m.finished, m.left) for m in models] == [(1, 0), (1, 0), (0, 0)]


def test_a_plan_takes_the_speed_of_finished_runs(whole: Path) -> None:
    """Another rate of a model whose first is finished takes what the first took."""
    (took, _) = (line["seconds"] for line in files.read_lines(whole / "results.jsonl"))
    models, _ = plan(tiny(rates=(0.01, 0.02)), whole)
    assert (models[0].finished, models[0].left) == (1, 1)
    assert models[0].seconds == pytest.approx(took, rel=0.01)


# ------------------------------------------------------------------------------------------ flags and files


def test_a_recipe_s_settings_are_its_function_s_arguments() -> None:
    (sweep,) = recipes.sweeps(
        "quick", pairs=(2, 6), vocab=64, width=(16, 32), depth=4, steps=61, rates=(0.01,)
    )
    assert sweep.data.vocab == 64
    assert [(s.length, s.pairs, s.rows) for s in sweep.data.train] == [(64, 2, 31 * 32), (64, 6, 30 * 32)]
    assert {job.steps for job in sweep.jobs(together=True)} == {61}
    assert [point.train.model.width for point in sweep.points] == [16] * 12 + [32] * 12
    assert all(len(point.train.model.layers) == 4 for point in sweep.points)
    assert all(point.train.learning_rates == (0.01,) for point in sweep.points)
    (sweep,) = recipes.sweeps("quick", task="induction-heads", length=(20, 40))
    assert (sweep.data.difficulty, [s.length for s in sweep.data.test]) == ("tokens", [20, 40])
    with pytest.raises(ValueError, match="recipe based-figure2 has no --pairs; it has --seeds, --rates"):
        recipes.sweeps("based-figure2", pairs=(4,))
    for wrong, says in (
        ({"depth": 3}, "odd"),
        ({"pairs": (4, 8), "length": (64, 64, 64)}, "2 numbers of pairs need one length, or as many, not 3"),
        ({"steps": 2}, "2 steps are fewer"),
        ({"task": "induction-heads", "pairs": (4,)}, "no pairs"),
    ):
        with pytest.raises(ValueError, match=says):
            recipes.sweeps("quick", **wrong)


def test_a_recipe_in_a_file_runs_with_its_own_task(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = recipes.TEMPLATE.read_text().replace("{file}", "mine.py").replace("{name}", "mine")
    file.write_text(text)
    (sweep,) = recipes.sweeps(str(file), seeds=1, width=(8,), steps=4, length=(4,), rates=(0.01,))
    assert len(sweep.points) == 5
    small = dataclasses.replace(sweep, points=sweep.points[:1])
    lines = run_sweep(with_added(small, ["retnet"]), tmp_path / "out", workers=2, plugins=[file])
    assert [line["label"] for line in lines] == ["attention", "retnet"]
    assert set(lines[0]["accuracy_by_difficulty"]) == {"4"}
    rows = sweep.data.build().test[0]
    assert (rows.tokens_BN[:, :4] == rows.answer_BQ).all()
    with pytest.raises(ValueError, match="has no --depth; it has --seeds, --length, --vocab, --width"):
        recipes.sweeps(str(file), depth=4)
    file.write_text(text.replace("def sweeps(", "def other("))
    with pytest.raises(ValueError, match=r"has no function sweeps\(seeds\)"):
        recipes.sweeps(str(file))
    file.write_text("def sweeps():\n    return [1]\n")
    with pytest.raises(ValueError, match="must return SweepConfigs"):
        recipes.sweeps(str(file))
    file.write_text("def sweeps(:\n")
    with pytest.raises(RunError, match="line 1: "):
        recipes.sweeps(str(file))


def test_a_mixer_file_need_register_nothing_only_as_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    assert mixers.run_file(file).x == 1
    with pytest.raises(ValueError, match="registered no mixer"):
        mixers.load(file)
