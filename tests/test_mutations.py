"""Whatever happens to a file of a run, a sweep or a picture, it is refused by its name, made again, or read
as what it says: never another exception. For files of corpora see tests/text."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import check, mutants

import holdall
from holdall.analysis import gallery, soundness
from holdall.analysis import recall as recalls
from holdall.contract import load_states, save_states
from holdall.files import RunError
from holdall.model import ModelConfig
from holdall.report import data, page, table
from holdall.report import matrix as matrices
from holdall.tasks.data import MQARData, MQARSegment
from holdall.text import default_corpus
from holdall.training.chassis import Stopped
from holdall.training.language_models import PretrainConfig, pretrain
from holdall.training.populations import TrainConfig, train


def small(vocab: int) -> ModelConfig:
    return ModelConfig(vocab=vocab, width=8, layers=(holdall.describe("base-conv").configure(width=8),))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, Path]:
    """A run of a language model that was stopped at its first evaluation."""
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        config = PretrainConfig(
            model=small(264),
            context_len=16,
            batch=2,
            micro_batch=2,
            steps=2,
            evaluate_every=1,
            evaluate_rows=2,
        )
        with pytest.raises(Stopped):
            pretrain(config, folder / "begun", should_stop=lambda: True)
        shutil.copytree(folder / "begun", folder / "whole")
        pretrain(config, folder / "whole")
        yield config, folder  # type: ignore[misc]


def copied(folder: Path, to: Path) -> Path:
    """A copy of a run folder, odd files and links included."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for path in folder.iterdir():
        if path.is_file() or path.is_symlink():
            shutil.copy(path, to, follow_symlinks=False)
        elif path.is_dir():
            (to / path.name).mkdir()
        else:
            os.mkfifo(to / path.name)
    return to


def weights(folder: Path) -> list[Any]:
    return [tensor.tolist() for tensor in holdall.load(folder).model.state_dict().values()]


# what is lost of a log is reported, and no reason not to resume
lossy = pytest.mark.filterwarnings("ignore:.*metrics.jsonl lacks")


@lossy
def test_a_run_of_a_language_model(language: tuple[PretrainConfig, Path], tmp_path: Path) -> None:
    config, folder = language
    right = weights(folder / "whole")
    refused = tried = 0

    def resumed() -> Any:
        with torch.random.fork_rng():
            pretrain(config, tmp_path / "copy")
        return weights(tmp_path / "copy")

    for name in ("config.json", "last.safetensors", "metrics.jsonl"):
        for what in mutants(folder / "begun" / name, name, count=14):
            copied(folder / "begun", tmp_path / "copy")
            refused += check(what, resumed, right, name)
            tried += 1
    assert tried / 4 < refused < tried


def test_a_finished_run_of_a_language_model(language: tuple[PretrainConfig, Path]) -> None:
    config, folder = language
    whole, right = folder / "whole", weights(folder / "whole")
    refused = tried = 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        for what in mutants(whole / name, name):
            # of a folder without model.safetensors another checkpoint is taken
            wanted = None if what.endswith("gone") or "itself" in what or name == "config.json" else right
            refused += check(what, lambda: weights(whole), wanted, "" if what.endswith("gone") else name)
            tried += 1
    for what in mutants(whole / "result.json", "result"):
        if "gone" not in what and "itself" not in what:
            refused += check(what, lambda: pretrain(config, whole) and None, None, "result.json")
            tried += 1
    assert tried / 2 < refused < tried


@lossy
def test_a_run_of_a_population(tmp_path: Path) -> None:
    segment = MQARSegment(length=32, pairs=2, rows=32)
    config = TrainConfig(
        model=small(64), data=MQARData(vocab=64, train=(segment,), test=(segment,)), learning_rates=(1e-3,),
        batch=16, evaluate_every=1,
    )  # fmt: skip
    asked: list[int] = []
    with pytest.raises(Stopped):
        train(config, tmp_path / "begun", should_stop=lambda: bool(asked.append(1)) or len(asked) == 2)
    shutil.copytree(tmp_path / "begun", tmp_path / "whole")

    def without_time(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**each, "seconds": 0} for each in results]

    right = without_time(train(config, tmp_path / "whole"))
    refused = tried = 0
    for name in ("config.json", "checkpoint.safetensors", "metrics.jsonl"):
        for what in mutants(tmp_path / "begun" / name, name, count=14):
            copied(tmp_path / "begun", tmp_path / "copy")
            refused += check(what, lambda: without_time(train(config, tmp_path / "copy")), right, name)
            tried += 1
    for what in mutants(tmp_path / "whole" / "result.json", "result"):
        if "gone" not in what and "itself" not in what:
            refused += check(what, lambda: train(config, tmp_path / "whole") and None, None, "result.json")
            tried += 1
    assert tried / 4 < refused < tried


def test_a_sweep_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")  # millions of letters, always the same
    folder = tmp_path / "sweep"
    shutil.copytree(Path(__file__).parents[1] / "results" / "quick", folder)
    lines = (folder / "results.jsonl").read_text().splitlines()[:3]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    refused = 0

    def shown() -> None:
        sweeps = data.load([folder])
        assert page.render(sweeps).encode()
        assert table.render(sweeps).encode()

    for name in ("config.json", "environment.json", "results.jsonl"):
        for what in mutants(folder / name, name, count=10):
            refused += check(what, shown, None, name if "gone" not in what else str(folder))
    assert refused > 15


@pytest.fixture
def scored(language: tuple[PretrainConfig, Path], tmp_path: Path) -> Path:
    corpus = default_corpus()
    folder = tmp_path / "scored"
    folder.mkdir()
    torch.manual_seed(0)
    recalls.score(folder, {"step": 1}, corpus, small(264).build, context_len=32, rows=3)
    return folder


def test_kept_scores(scored: Path) -> None:
    kept = recalls.find(scored)
    assert kept is not None
    right = json.dumps(recalls.table(kept, 5))

    def found() -> str | None:
        kept = recalls.find(scored)
        return right if kept is None else json.dumps(recalls.table(kept, 5))

    refused = sum(
        check(what, found, right, "/recall.")  # either may name the other, which it does not fit
        for name in ("recall.json", "recall.npz")
        for what in mutants(scored / name, name)
    )
    assert refused > 40


def test_matrices(tmp_path: Path) -> None:
    values = np.tril(np.random.default_rng(0).normal(size=(1, 6, 6)))
    matrix = gallery.MixingMatrix(
        label="a", kind="exact", source="s", beside=(), unit="head", count=1, shown=(0,), values_STJ=values,
        causal=True, toeplitz=0.5, rank=2, full_rank=3, rank_1=1, state=4, sparsity=0.1, error=1e-16,
    )  # fmt: skip
    whole = gallery.Gallery(
        command="holdall matrix", length=6, width=4, input="random input", tokens=(), matrices=(matrix,),
        failures={}, environment={},
    )  # fmt: skip
    gallery.save(whole, tmp_path)
    refused = sum(
        check(what, lambda: matrices.render(gallery.load(tmp_path)) and None, None, name)
        for name in ("matrix.json", "matrix.npz")
        for what in mutants(tmp_path / name, name)
    )
    assert refused > 40


def test_measured_drifts(tmp_path: Path) -> None:
    line = {
        "mixer": "a",
        "dtype": "float32",
        "width": 8,
        "length": 9,
        "error": 1e-7,
        "last": 1e-8,
        "seconds": 0.5,
    }
    path = tmp_path / "soundness.jsonl"
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line)}\n")
    assert (
        sum(
            check(what, lambda: soundness.read(path) and None, None, path.name) for what in mutants(path, "s")
        )
        > 15
    )


def test_a_state_file(tmp_path: Path) -> None:
    mixer = holdall.build("gla", width=16)
    save_states([mixer(torch.randn(2, 5, 16))[1]], path := tmp_path / "state.safetensors")
    assert (
        sum(
            check(what, lambda: load_states(path, [mixer]) and None, None, path.name)
            for what in mutants(path, "s")
        )
        > 15
    )


def test_the_check_itself_goes_red() -> None:
    def wrong() -> None:
        raise KeyError("a")

    def unnamed() -> None:
        raise RunError("damaged")

    cases: list[tuple[Callable[[], Any], Any]] = [(wrong, None), (unnamed, None), (lambda: 1, 2)]
    for do, right in cases:
        with pytest.raises(AssertionError):
            check("what", do, right, "name.json")
