"""The runner: scores are lm-eval's own, depend on no batch and no order, and a killed run resumes.

Tasks are local files, so that no network is asked.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evals.rows import ROWS, written

from holdall import cli, mixers
from holdall.evals import documents, harness, run, suites
from holdall.evals.folder import EvalConfig, Result, ResultsFolder
from holdall.evals.scoring import contains
from holdall.evals.statistics import bootstrap
from holdall.files import RunError
from holdall.language_model import LanguageModel
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # lm-eval's libraries warn of one another
]
WIDTH, LETTERS = 16, b"abcdef \n"
CHOICES = """task: local_choice
dataset_path: json
custom_dataset: !function local.choices
output_type: multiple_choice
test_split: test
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 3}
"""
TEXT = """task: local_text
dataset_path: json
custom_dataset: !function local.choices
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: query
metric_list: [{metric: bits_per_byte}]
metadata: {version: 1}
"""
FUNCTIONS = """from holdall.evals.harness import Documents

def choices(**_):
    return {"test": Documents(
        {"query": "abc " * (n % 7) + str(n), "choices": [" a", f" {n}", "bb" * (n % 3 + 1)], "gold": n % 3}
        for n in range(30)
    )}
"""


def language_model(*names: str, dtype: torch.dtype = torch.float64, **options: Any) -> LanguageModel:
    """One that writes the letters of the documents, and not always the same."""
    layers = tuple(mixers.entry(name).configure(width=WIDTH) for name in names)
    with seeded(0):
        model = ModelConfig(vocab=264, width=WIDTH, layers=layers, mlp=24, tied=False, **options).build()
        assert model.head is not None
        model.head.weight.data.mul_(0.1)
        model.head.weight.data[list(LETTERS)] = torch.randn(len(LETTERS), WIDTH)
    for block in model.blocks:
        for parameter in block.parameters():
            parameter.data.mul_(4)
    return LanguageModel(model.to(dtype).eval(), Bytes())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder, whose answers are short, so that a model without training is right at times."""
    folder = tmp_path / "data"
    folder.mkdir()
    draw = random.Random(0)
    rows = [
        {
            "id": f"{n}",
            "context": " ".join("".join(draw.choices("abcdef", k=draw.randint(1, 9))) for _ in range(40))
            + " aa.",
            "question": f"What is number {n}?",
            "answers": ["aa", "bb"],
        }
        for n in range(8)
    ]
    rows[5]["context"] = rows[2]["context"]  # two questions about one text
    written(folder, "squad", rows, ".jsonl.xz")
    forms = [{**row, "text": f"Form {n}. {row['text']}"} for n, row in enumerate(ROWS["fda"])]
    written(folder, "fda", forms, ".jsonl.gz")
    (folder / "local_choice.yaml").write_text(CHOICES)
    (folder / "local_text.yaml").write_text(TEXT)
    (folder / "local.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library's own tasks, which are thousands of files."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))


def plan(data: Path, *names: str, others: tuple[str, ...] = (), **config: Any) -> run.Plan:
    config = {"window": 200, **config}
    return run.Plan(
        config=EvalConfig(**config),
        tasks=tuple(suites.tasks_of(names)),
        others=others,
        data=data,
        include=data,
    )


def scored(
    model: LanguageModel, wanted: run.Plan, out: Path, *, batch: int = 4, **how: Any
) -> tuple[ResultsFolder, list[Result]]:
    folder = ResultsFolder(out)
    folder.claim(wanted.config, ["recall"], wanted.names(), command="", device="cpu")
    return folder, run.evaluate(run.subject(model, "mine"), wanted, folder, batch=batch, **how)


def test_scores_are_those_of_simple_evaluate(data: Path, tmp_path: Path, small: None) -> None:
    made = language_model("taylor", "attention")
    wanted = plan(data, "squad", "squad_twice", "fda", others=("local_choice",))
    folder, lines = scored(made, wanted, tmp_path / "out")
    from holdall.adapters.lm_eval import HoldallLM

    passed = {"data": str(data), "window": 200, "tokenizer": harness.codec_of(made.tokenizer)}
    paths = [str(harness.TASKS), str(data)]
    theirs = lm_eval.simple_evaluate(
        model=HoldallLM(made, batch_size=3),
        tasks=[*wanted.names()],
        task_manager=TaskManager(include_path=paths, include_defaults=False, metadata=passed),
        bootstrap_iters=0,
    )
    assert [line.task for line in lines] == wanted.names()
    texts_of = {"squad": 7, "squad_twice": 7, "fda": len(ROWS["fda"])}
    for line in lines:
        assert line.value == theirs["results"][line.task][f"{line.metric},none"], line.task
        assert line.version == str(theirs["versions"][line.task])
        samples = folder.samples("mine", line.task)
        logged = theirs["samples"][line.task]
        assert line.count == len(samples) == len(logged)
        assert [one["right"] for one in samples] == [one[line.metric] for one in logged]
        texts = [one["text_key"] or one["doc"] for one in samples]
        assert (line.low, line.high) == bootstrap([one["right"] for one in samples], texts)
        assert len(set(texts)) == texts_of.get(line.task, line.count)
        assert all((one["text_key"] is not None) == (line.task in texts_of) for one in samples)
        assert line.low is not None
        assert line.high is not None
        assert line.low <= line.value <= line.high
    assert lines[-1].others == {"acc_norm": theirs["results"]["local_choice"]["acc_norm,none"]}
    assert [line.metric for line in lines] == ["contains"] * 3 + ["acc"]
    assert 0 < lines[0].value < 1  # not all alike, or the test would show little
    assert lines[0].prompt_hash != lines[1].prompt_hash


def test_the_samples_say_what_was_asked_and_answered(data: Path, tmp_path: Path, small: None) -> None:
    made = language_model("taylor")
    folder, lines = scored(made, plan(data, "squad", others=("local_choice",)), tmp_path / "out")
    rows = list(harness.rows(suites.named("squad"), harness.codec_of(made.tokenizer), data=data, window=200))
    samples = folder.samples("mine", "squad")
    for row, sample in zip(rows, samples, strict=True):
        assert (sample["doc"], sample["prompt"], sample["target"]) == (row.id, row.prompt, list(row.golds))
        assert sample["window"] == list(row.window or ())
        assert (sample["truncated"], sample["tokens"]) == (row.truncated, row.tokens)
        assert sample["right"] == contains(sample["output"], row.golds)
        one = made.generate(row.prompt, max_tokens=48, temperature=0, stop=("\n",))
        assert sample["output"] == one
    assert lines[0].truncated == sum(row.truncated for row in rows) > 0
    assert {len(sample["output"]) for sample in samples} != {0}
    chosen = folder.samples("mine", "local_choice")
    assert chosen[5]["choices"] == [" " + choice for choice in (" a", " 5", "bbbbbb")]
    assert chosen[5]["gold"] == 5 % 3
    for sample in chosen:
        likeliest = max(range(3), key=lambda place: sample["logprobs"][place])
        assert sample["right"] == (likeliest == sample["gold"])


def test_questions_that_are_all_about_one_text_have_no_interval(
    data: Path, tmp_path: Path, small: None
) -> None:
    rows = [row for _, row in documents.read_rows(data / "squad.jsonl.xz")]
    (data / "squad.jsonl.xz").unlink()
    written(data, "squad", [{**row, "context": rows[0]["context"]} for row in rows], ".jsonl")
    _, lines = scored(language_model("taylor"), plan(data, "squad_answer"), tmp_path / "all")
    _, one = scored(language_model("taylor"), plan(data, "squad_answer", limit=1), tmp_path / "one")
    assert [(line.count, line.low, line.high) for line in lines + one] == [(8, None, None), (1, None, None)]
    _, others = scored(
        language_model("taylor"), plan(data, others=("local_choice",), limit=1), tmp_path / "others"
    )
    assert [(line.unit, line.low) for line in others] == [("share", None)]


def test_results_say_what_a_score_counts_and_which_way_is_better(
    data: Path, tmp_path: Path, small: None
) -> None:
    wanted = plan(data, "squad", "squad_answer", others=("local_choice", "local_text"), limit=3)
    _, lines = scored(language_model("taylor"), wanted, tmp_path / "out")
    assert [(line.metric, line.unit, line.lower_is_better) for line in lines] == [
        ("contains", "share", False), ("nats", "nats", True), ("acc", "share", False),
        ("bits_per_byte", "", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("right", "lower", "is_mean", "unit"),
    [
        ([0, 1, 0.5], False, True, "share"),
        ([0, 1, 0.5], True, True, ""),  # as of Brier scores
        ([0, 1, 0.5], False, False, ""),  # as of Matthews correlations
        ([0, 61.5], False, True, ""),  # as of ROUGE from 0 to 100
    ],
)
def test_the_unit_of_a_metric_of_lm_eval(right: list[float], lower: bool, is_mean: bool, unit: str) -> None:
    assert run._unit(right, lower=lower, is_mean=is_mean) == unit


def test_answers_are_scored_by_their_own_log_likelihood(data: Path, tmp_path: Path, small: None) -> None:
    made = language_model("taylor", "attention")
    names = ("squad_answer", "squad_answer_twice", "fda_answer")
    folder, lines = scored(made, plan(data, *names, limit=4), tmp_path / "out")
    from holdall.adapters.lm_eval import HoldallLM

    lm = HoldallLM(made)
    shown = [("squad", 1), ("squad", 2), ("fda", 1)]
    for line, (of, reads) in zip(lines, shown, strict=True):
        assert (line.metric, line.of, line.reads) == ("nats", of, reads)
        wanted = []
        for sample in folder.samples("mine", line.task):
            (answer,) = sample["choices"]
            assert answer.startswith(" ")  # as a model would write it behind a colon
            assert answer == sample["target"]
            asked = lm.tok_encode(sample["prompt"]), lm.tok_encode(answer, add_special_tokens=False)
            ((log_likelihood, _),) = lm._loglikelihood_tokens([(None, *asked)], disable_tqdm=True)
            behind = made.score(sample["prompt"] + answer).log_prob_T[-len(answer) :]
            assert -sample["right"] == pytest.approx(log_likelihood, abs=1e-10, rel=0)
            assert -sample["right"] == pytest.approx(float(behind.sum()), abs=1e-10, rel=0)
            wanted.append(sample["right"])
        assert line.value == pytest.approx(sum(wanted) / len(wanted), rel=1e-12)
        assert line.low is not None
        assert line.high is not None
        assert line.low < line.value < line.high
        assert set(line.others) == {"acc"}
        prompts = [one["prompt"] for one in folder.samples("mine", line.task)]
        name = of if reads == 1 else f"{of}_twice"
        rows = harness.rows(suites.named(name), harness.codec_of(made.tokenizer), data=data, window=200)
        assert prompts == [row.prompt for row in itertools.islice(rows, 4)]
    assert {sample["target"] for sample in folder.samples("mine", "squad_answer")} == {" aa"}  # the first


def test_the_table_has_recall_and_answers_of_one_file(
    data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    language_model("taylor", dtype=torch.float32).save(tmp_path / "m1")
    words: list[str | Path] = ["--data", data, "--suite", "squad", "squad_twice", "squad_answer"]
    words += ["--limit", "2", "--window", "200", "--device", "cpu", "--out", tmp_path / "out"]
    assert command(monkeypatch, tmp_path / "m1", *words) == 0
    table = capsys.readouterr().out.partition("once")[2]
    nats = next(line for line in ResultsFolder(tmp_path / "out").results() if line.metric == "nats")
    (recall,) = (line for line in table.splitlines() if line.startswith("squad (%)"))
    (answers,) = (line for line in table.splitlines() if line.startswith("squad (nats)"))
    assert recall.count("[") == 2  # once and twice
    assert nats.high is not None
    assert nats.high >= 10
    assert f"{nats.value:.1f} [{nats.low:.1f},{nats.high:.1f}]" in answers


def test_a_file_without_rows_is_named(data: Path, tmp_path: Path, small: None) -> None:
    (data / "nq.jsonl").write_text("\n")
    with pytest.raises(RunError, match=r"nq: \S+nq.jsonl has no rows"):
        scored(language_model("taylor"), plan(data, "nq"), tmp_path / "out")
    written(data, "nq", [{"id": "0", "context": "aa", "question": "?", "answers": ["bb"]}], ".jsonl")
    with pytest.raises(RunError, match=r"no document of \S+nq.jsonl has an answer"):
        scored(language_model("taylor"), plan(data, "nq"), tmp_path / "out")


def test_missing_files_are_named_once_with_what_can_run_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ("based-mini", "--suite", "recall", "recall-twice", "answers")
    assert command(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    said = " ".join((printed.out + printed.err).split())
    for file in ("fda510k", "swde_books", "squad", "nq", "drop_contrast"):
        assert said.count(f"{file}.jsonl") == 1
    assert "in a folder that you name by --data" in said
    assert "docs/evals.md" in said
    assert said.endswith("--suite needles needs no files")
    assert len(said) < 400
    written(tmp_path, "squad", [{"id": "0", "context": "aa", "question": "?", "answers": ["aa"]}], ".jsonl")
    assert command(monkeypatch, *words, "lambada", "--data", tmp_path) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"missing in {tmp_path}: fda510k.jsonl" in said
    assert "docs/evals.md and docs/general-tasks.md" in said
    assert said.endswith("--suite squad squad_twice squad_answer has all it needs")


@pytest.mark.parametrize("name", ["nosuch", "nosuch.gguf"])
def test_a_model_that_is_not_there_is_refused_before_the_first_is_asked(
    name: str, data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    language_model("taylor", dtype=torch.float32).save(tmp_path / "m1")
    words: list[str | Path] = ["--data", data, "--suite", "squad", "--limit", "1", "--window", "200"]
    words += ["--device", "cpu", "--out", tmp_path / "out"]
    assert command(monkeypatch, tmp_path / "m1", tmp_path / name, *words) == 2
    assert f"{name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_whose_reader_is_not_installed_is_refused_before_the_first_is_asked(
    data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    language_model("taylor", dtype=torch.float32).save(tmp_path / "m1")
    (tmp_path / "m2.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    words: list[str | Path] = ["--data", data, "--suite", "squad", "--window", "200"]
    words += ["--out", tmp_path / "out"]
    assert command(monkeypatch, tmp_path / "m1", tmp_path / "m2.gguf", *words) == 2
    assert "needs the package gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refused_command_leaves_the_page_as_it_was(
    data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    language_model("taylor", dtype=torch.float32).save(tmp_path / "m1")
    words: list[str | Path] = [tmp_path / "m1", "--suite", "squad_answer", "--limit", "2", "--data", data]
    words += ["--device", "cpu", "--out", tmp_path / "out"]
    assert command(monkeypatch, *words, "--window", "200") == 0
    made = (tmp_path / "out" / "index.html").stat().st_mtime_ns
    capsys.readouterr()
    assert command(monkeypatch, *words, "--window", "300") == 2
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out" / "index.html").stat().st_mtime_ns == made


@pytest.mark.parametrize("ended", [KeyboardInterrupt(), RunError("a file is damaged")])
def test_a_stopped_command_writes_the_page_of_what_is_finished(
    ended: BaseException,
    data: Path,
    tmp_path: Path,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    language_model("taylor", dtype=torch.float32).save(tmp_path / "m1")
    words: list[str | Path] = ["--data", data, "--limit", "2", "--window", "200", "--device", "cpu"]
    finish, stop_at = ResultsFolder.finish, 0

    def stopped(self: ResultsFolder, result: Result, samples: Any) -> None:
        if len(self.results()) == stop_at:
            raise ended
        finish(self, result, samples)

    monkeypatch.setattr(ResultsFolder, "finish", stopped)
    for stop_at in (0, 1):
        out = tmp_path / f"out{stop_at}"
        status = command(monkeypatch, tmp_path / "m1", *words, "--suite", "squad", "fda", "--out", out)
        said = capsys.readouterr()
        if isinstance(ended, KeyboardInterrupt):
            assert status == 130
            assert "the same command resumes" in said.out
        else:
            assert status == 2
            assert "a file is damaged" in said.err
        assert (out / "index.html").exists() == (stop_at == 1)  # there is nothing to show before that
    assert "Not begun yet: fda" in (out / "index.html").read_text()


def in_another_order(
    self: run.Recorded, kind: str, requests: Sequence[Any], ask: Callable[..., list[Any]] = run.Recorded._ask
) -> list[Any]:
    """`Recorded._ask`, with requests that are shuffled before and answers that are put back after."""
    places = random.Random(1).sample(range(len(requests)), len(requests))
    given = dict(zip(places, ask(self, kind, [requests[place] for place in places]), strict=True))
    return [given[place] for place in range(len(requests))]


@pytest.mark.parametrize("names", [("taylor", "attention"), ("prefix-linear-attention", "sliding-window")])
def test_no_score_depends_on_the_batch_or_the_order(
    names: Sequence[str], data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = language_model(*names)
    folders = []
    for batch, shuffled in ((1, False), (7, False), (64, False), (7, True)):
        wanted = plan(data, "squad_twice", others=("local_choice",))
        if shuffled:
            monkeypatch.setattr(run.Recorded, "_ask", in_another_order)
        folder, _ = scored(made, wanted, tmp_path / f"{batch} {shuffled}", batch=batch)
        folders.append(folder)
    first = folders[0]
    for folder in folders[1:]:
        for want, got in zip(
            first.samples("mine", "squad_twice"), folder.samples("mine", "squad_twice"), strict=True
        ):
            assert got == want
        for want, got in zip(
            first.samples("mine", "local_choice"), folder.samples("mine", "local_choice"), strict=True
        ):
            assert got["logprobs"] == pytest.approx(want["logprobs"], abs=1e-10, rel=0)
            assert got["right"] == want["right"]
        for want_line, line in zip(first.results(), folder.results(), strict=True):
            assert (line.value, line.low, line.high) == (want_line.value, want_line.low, want_line.high)
            assert line.prompt_hash == want_line.prompt_hash


class Killed(Exception):  # noqa: N818 - it stands for a signal
    pass


def test_a_killed_run_asks_only_what_was_not_answered(data: Path, tmp_path: Path, small: None) -> None:
    made = language_model("taylor")
    wanted = plan(data, "squad", "squad_twice", others=("local_choice",))
    whole, _ = scored(made, wanted, tmp_path / "whole")

    def until(task: str, answers: int) -> dict[str, Any]:
        now = ""

        def begin(name: str) -> None:
            nonlocal now
            now = name

        def count(done: int, total: int) -> None:
            if now == task and done == answers:
                raise Killed

        return {"on_task": begin, "on_answers": count}

    for task, answers in (("squad", 5), ("squad_twice", 7), ("local_choice", 40)):
        with pytest.raises(Killed):
            scored(made, wanted, tmp_path / "out", **until(task, answers))
        kept = (tmp_path / "out" / "answers" / "mine" / f"{task}.jsonl").read_text()
        assert kept.count("\n") == answers
    asked: list[int] = []
    folder, lines = scored(made, wanted, tmp_path / "out", on_answers=lambda done, total: asked.append(done))
    assert asked[0] == 40  # the first call says what is there already
    assert lines == folder.results()
    for line, other in zip(lines, whole.results(), strict=True):
        assert Result.from_dict({**line.to_dict(), "seconds": other.seconds}) == other
        assert folder.samples("mine", line.task) == whole.samples("mine", line.task)
    assert not list((tmp_path / "out" / "answers" / "mine").glob("*.jsonl"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("what is finished was asked again")

    again, _ = scored(made, wanted, tmp_path / "out", on_task=refuse)
    assert again.results() == folder.results()


def test_a_limit_takes_the_first_documents(data: Path, tmp_path: Path, small: None) -> None:
    made = language_model("taylor")
    whole, _ = scored(made, plan(data, "squad"), tmp_path / "whole")
    few, lines = scored(made, plan(data, "squad", others=("local_choice",), limit=3), tmp_path / "few")
    assert few.samples("mine", "squad") == whole.samples("mine", "squad")[:3]
    assert [line.count for line in lines] == [3, 3]


def test_a_window_too_small_names_what_all_chosen_tasks_need(tmp_path: Path, small: None) -> None:
    made = language_model("taylor")
    codec = harness.codec_of(made.tokenizer)
    tasks = (
        "niah_single_2",
        "niah_single_1",
    )  # the second needs more, since its lines are longer than a word
    with pytest.raises(
        ValueError, match=r"no room for the question of niah_single_2, niah_single_1"
    ) as error:
        scored(made, plan(tmp_path, *tasks, window=200), tmp_path / "out")
    least = int(re.findall(r"--window (\d+) or more", str(error.value))[0])
    plan(tmp_path, *tasks, window=least).check_window(codec)
    for task in tasks:
        assert len(list(harness.rows(suites.named(task), codec, window=least))) == 200
    with pytest.raises(ValueError, match=r"of niah_single_1; give"):
        plan(tmp_path, *tasks, window=least - 1).check_window(codec)


def test_prompts_that_the_model_cannot_read_are_refused(data: Path, tmp_path: Path, small: None) -> None:
    made = language_model("attention", positions=300)
    folder, lines = scored(made, plan(data, "squad"), tmp_path / "out")
    assert lines
    with pytest.raises(
        ValueError, match=r"squad_twice has prompts of [\d,]+ tokens, .* mine can read 300: give a"
    ):
        scored(made, plan(data, "squad_twice"), tmp_path / "out")
    about = folder.models()["mine"]
    assert about["state_bytes"]["1024"] is None
    assert about["state_bytes"]["200"] == made.model.state_bytes(200)


def test_tasks_of_the_same_documents_encode_them_once(data: Path, small: None) -> None:
    encoded: list[str] = []

    class Counted:
        def encode(self, text: str) -> list[int]:
            return self.encode_batch([text])[0]

        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            encoded.extend(texts)
            return [list(text.encode()) for text in texts]

        def decode(self, ids: Sequence[int]) -> str:
            return bytes(ids).decode(errors="replace")

    asked = dataclasses.replace(run.subject(language_model("taylor"), "mine"), codec=Counted())
    wanted = plan(data, "squad", "squad_twice", "squad_answer")
    manager = run.Manager(wanted, asked)
    for name in wanted.names():
        manager.load(name)
    contexts = [row["context"] for _, row in documents.read_rows(data / "squad.jsonl.xz")]
    assert [encoded.count(context) for context in contexts] == [1] * len(contexts)


def test_an_answer_that_the_model_has_no_room_for_is_refused(data: Path, tmp_path: Path, small: None) -> None:
    row = {"id": "1", "context": "x " * 40 + "long" * 20, "question": "?", "answers": ["long" * 20]}
    written(data, "squad", [row], ".jsonl")
    wanted = plan(data, "squad_answer", window=300)
    (shown,) = harness.rows(suites.named("squad_answer"), harness.codec_of(Bytes()), data=data, window=300)
    for positions, fits in ((shown.tokens + 80, False), (shown.tokens + 81, True)):
        made = language_model("attention", positions=positions)
        if fits:
            assert scored(made, wanted, tmp_path / "fits")[1][0].count == 1
        else:
            with pytest.raises(ValueError, match="squad_answer has prompts of"):
                scored(made, wanted, tmp_path / "out")


def test_the_yaml_files_work_without_the_runner(data: Path) -> None:
    """As lm-eval's own command loads them: the tokenizer is that of the model it names."""
    passed = {"pretrained": "based-mini", "data": str(data), "window": 200, "limit": 2}
    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False, metadata=passed)
    (task,) = manager.load(["squad"])["tasks"].values()
    rows = harness.rows(suites.named("squad"), harness.codec_of(Bytes()), data=data, window=200)
    assert [doc["prompt"] for doc in task.eval_docs] == [row.prompt for row in itertools.islice(rows, 2)]


def test_one_name_in_a_suite_and_in_lm_eval_is_refused(data: Path, tmp_path: Path, small: None) -> None:
    with pytest.raises(ValueError, match="squad is a task of a suite and of lm-eval"):
        plan(data, "squad", others=("squad",))
    made = language_model("taylor")
    scored(made, plan(data, "squad", limit=1), tmp_path / "out")
    with pytest.raises(
        RunError, match=r"holds squad of the suite recall, with other documents\. Choose another"
    ):
        scored(made, plan(data, others=("squad",), limit=1), tmp_path / "out")


def test_an_unknown_task_is_named(data: Path, tmp_path: Path, small: None) -> None:
    with pytest.raises(ValueError, match="lm-eval has no task 'local_choise'"):
        scored(language_model("taylor"), plan(data, others=("local_choise",)), tmp_path / "out")


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["holdall", "eval", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command(
    data: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folders = []
    for number in (1, 2):
        folders.append(tmp_path / f"m{number}")
        language_model("taylor", *["attention"] * (number - 1), dtype=torch.float32).save(folders[-1])
    words: list[str | Path] = ["--data", data, "--suite", "squad", "squad_twice", "niah_single_1"]
    words += ["--limit", "2", "--window", "700", "--device", "cpu"]
    assert command(monkeypatch, *folders, *words, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "m1, squad:" in printed
    assert printed.count("niah_single_1") == 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["suite"] == ["recall", "recall-twice", "needles"]
    assert len(ResultsFolder(tmp_path / "out").results()) == 6
    assert command(monkeypatch, folders[0], *words, "--out", tmp_path / "out", "--limit", "3") == 2
    assert "other settings (limit: 2 there, 3 here)" in capsys.readouterr().err
