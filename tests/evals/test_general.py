"""General tasks ask what lm-eval asks: whole strings, and lm-eval's own tasks on the same questions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from holdall.evals import general, suites
from holdall.evals.folder import EvalConfig, ResultsFolder
from holdall.evals.run import Plan, evaluate, subject
from holdall.files import RunError
from holdall.language_model import LanguageModel
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

ENDINGS = ["pulls a fish out.", "sings [music] twice.", "paints the wall.", "drives off."]


class Case(NamedTuple):
    """A question in the file's form and in that of lm-eval's data set, and what a model is asked."""

    task: str
    row: dict[str, Any]
    hub: dict[str, Any]
    pairs: list[tuple[str, str]]
    gold: int | None


CASES = [
    Case(
        "lambada",
        {"context": 'She gave him the ring.\n\n"Where," he asked, "is my', "continuation": "ring"},
        {"text": 'She gave him the ring.\n\n"Where," he asked, "is my ring'},
        [('She gave him the ring.\n\n"Where," he asked, "is my', " ring")],
        None,
    ),
    Case(
        "lambada",  # a word that a line break stands before: only spaces divide words
        {"context": "He saw the", "continuation": "\n\nrecorder"},
        {"text": "He saw the \n\nrecorder"},
        [("He saw the", " \n\nrecorder")],
        None,
    ),
    Case(
        "hellaswag",  # of a video's captions
        {"query": 'Ice fishing: Two men ("a team!") sit. the old man', "choices": ENDINGS, "gold": 0},
        {
            "activity_label": "Ice fishing", "ctx_a": 'Two men ("a team!") sit.', "ctx_b": "the old man",
            "endings": ENDINGS, "label": "0",
        },
        [
            ('Ice fishing: Two men ("a team!") sit. The old man', " pulls a fish out."),
            ('Ice fishing: Two men ("a team!") sit. The old man', " sings twice."),
            ('Ice fishing: Two men ("a team!") sit. The old man', " paints the wall."),
            ('Ice fishing: Two men ("a team!") sit. The old man', " drives off."),
        ],
        0,
    ),
    Case(
        "hellaswag",  # of WikiHow: whole sentences, and marks in brackets that the file has left
        {
            "query": "Food: How to bake bread. Mix flour. add iPhone salt [slowly].", "choices": ENDINGS[2:],
            "gold": 1,
        },
        {
            "activity_label": "Food",
            "ctx_a": "[header] How to bake bread [title] Mix flour. [step] add iPhone salt [slowly].",
            "ctx_b": "", "endings": ENDINGS[2:], "label": "1",
        },
        [
            ("Food: How to bake bread. Mix flour. add iPhone salt .", " paints the wall."),
            ("Food: How to bake bread. Mix flour. add iPhone salt .", " drives off."),
        ],
        1,
    ),
    Case(
        "piqa",
        {"query": "Question: How do I dry a cup?\n", "choices": ["Use water.", "Use a towel."], "gold": 1},
        {"goal": "How do I dry a cup?", "sol1": "Use water.", "sol2": "Use a towel.", "label": 1},
        [
            ("Question: How do I dry a cup?\nAnswer:", " Use water."),
            ("Question: How do I dry a cup?\nAnswer:", " Use a towel."),
        ],
        1,
    ),
    Case(
        "arc_easy",
        {"query": "Question: What is hot?", "choices": ["ice", "fire", "snow", "rain"], "gold": 1},
        {
            "question": "What is hot?", "answerKey": "B",
            "choices": {"text": ["ice", "fire", "snow", "rain"], "label": ["A", "B", "C", "D"]},
        },
        [("Question: What is hot?\nAnswer:", f" {word}") for word in ("ice", "fire", "snow", "rain")],
        1,
    ),
    Case(
        "arc_challenge",  # of three choices, which the file fills up
        {"query": "Question: Its height will", "choices": ["rise", "fall", "rise", "stay"], "gold": 3},
        {
            "question": "Its height will", "answerKey": "3",
            "choices": {"text": ["rise", "fall", "stay"], "label": ["1", "2", "3"]},
        },
        [("Question: Its height will\nAnswer:", f" {word}") for word in ("rise", "fall", "stay")],
        2,
    ),
    Case(
        "winogrande",
        {
            "context_options": ["Ann called Mary because Ann", "Ann called Mary because Mary"],
            "continuation": "was lonely.", "gold": 0,
        },
        {
            "sentence": "Ann called Mary because _ was lonely.", "option1": "Ann", "option2": "Mary",
            "answer": "1",
        },
        [
            ("Ann called Mary because Ann", " was lonely."),
            ("Ann called Mary because Mary", " was lonely."),
        ],
        0,
    ),
    Case(
        "winogrande",  # a name at the end
        {"context_options": ["He sold the cup", "He sold the hat"], "continuation": ".", "gold": 1},
        {"sentence": "He sold the _.", "option1": "cup", "option2": "hat", "answer": "2"},
        [("He sold the cup", " ."), ("He sold the hat", " .")],
        1,
    ),
    Case(
        "openbookqa",
        {"query": "Predators eat", "choices": ["grass", "prey", "sand", "tin"], "gold": 1},
        {
            "question_stem": "Predators eat", "answerKey": "B",
            "choices": {"text": ["grass", "prey", "sand", "tin"], "label": ["A", "B", "C", "D"]},
        },
        [("Predators eat", f" {word}") for word in ("grass", "prey", "sand", "tin")],
        1,
    ),
    Case(
        "boolq",
        {"query": "Passage: Ice is cold.\nQuestion: is ice hard?", "choices": ["no", "yes"], "gold": 1},
        {"passage": "Ice is cold.", "question": "is ice hard", "label": 1},
        [
            ("Ice is cold.\nQuestion: is ice hard?\nAnswer:", " no"),
            ("Ice is cold.\nQuestion: is ice hard?\nAnswer:", " yes"),
        ],
        1,
    ),
    Case(
        "copa",  # lm-eval puts two spaces before a choice
        {"query": "The man, who fell, cried, because", "choices": ["he flew.", "it hurt."], "gold": 1},
        {
            "premise": "The man, who fell, cried.", "choice1": "He flew.", "choice2": "It hurt.",
            "question": "cause", "label": 1,
        },
        [
            ("The man, who fell, cried because", "  he flew."),
            ("The man, who fell, cried because", "  it hurt."),
        ],
        1,
    ),
]  # fmt: skip
BY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.task)


@BY_CASE
def test_a_row_is_asked_as_it_is_worked_out_here(case: Case) -> None:
    doc = general.document(case.task, case.row)
    assert general.pairs(doc) == case.pairs
    assert doc.get("gold") == case.gold


def test_every_task_has_a_case_a_form_and_a_file() -> None:
    names = {task.name for task in suites.SUITES["general"]}
    assert names == set(general.FORMS) == {case.task for case in CASES}
    folder = Path(general.__file__).with_name("tasks") / "general"
    assert {path.stem for path in folder.glob("*.yaml")} == names


def write(folder: Path, task: str, *rows: Any) -> Path:
    path = folder / f"{suites.named(task).file}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_read_from_the_data_folder(tmp_path: Path) -> None:
    write(tmp_path, "piqa", CASES[4].row, {**CASES[4].row, "gold": 0})
    assert [(doc["id"], doc["gold"]) for doc in general.rows(suites.named("piqa"), tmp_path)] == [
        ("1", 1),
        ("2", 0),
    ]
    with pytest.raises(RunError, match=r"piqa needs piqa\.jsonl .* in a folder that you name by --data"):
        next(general.rows(suites.named("piqa"), None))
    with pytest.raises(RunError, match=r"copa needs copa\.jsonl"):
        next(general.rows(suites.named("copa"), tmp_path))


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("piqa", {"gold": 2}, r"line 1 of .*piqa\.jsonl: gold = 2 is none of its 2 choices"),
        ("piqa", {"gold": True}, r"\['gold'\]|gold"),
        ("piqa", {"choices": ["a", ""]}, r"line 1 of .*choices"),
        ("piqa", {"query": None}, r"line 1 of .*query"),
        ("winogrande", {}, r"line 1 of .*winogrande\.jsonl: .*context_options.* winogrande reads"),
    ],
)
def test_a_row_of_another_form_is_refused(
    task: str, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, task, {**CASES[4].row, **changed})
    with pytest.raises(RunError, match=message):
        list(general.rows(suites.named(task), tmp_path))


# ------------------------------------------------------------------------------------------ lm-eval


UPSTREAM = {
    "lambada": "lambada/lambada_openai", "hellaswag": "hellaswag/hellaswag", "piqa": "piqa/piqa",
    "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_easy", "winogrande": "winogrande/default",
    "openbookqa": "openbookqa/openbookqa", "boolq": "super_glue/boolq/default",
    "copa": "super_glue/copa/default",
}  # fmt: skip
"""The files of lm-eval's own tasks, of which `arc_challenge` has another data set and nothing else."""


def lm_eval_tasks(names: list[str], data: Path) -> dict[str, Any]:
    """Our tasks as lm-eval makes them of their YAML files."""
    from lm_eval.tasks import TaskManager

    folder = Path(general.__file__).with_name("tasks")
    manager = TaskManager(
        include_path=str(folder), include_defaults=False, metadata={"data": str(data), "limit": None}
    )
    return manager.load(names)["tasks"]


def upstream(task: str, rows: list[dict[str, Any]]) -> Any:
    """lm-eval's own task, on rows in the form of its data set."""
    import lm_eval
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(lm_eval.__file__).parent / "tasks" / f"{UPSTREAM[task]}.yaml"
    config = load_yaml(path, resolve_func=True)
    split = config.get("test_split") or config["validation_split"]
    made = Dataset(InMemoryTable.from_pylist(rows), fingerprint=task)
    config |= {
        "custom_dataset": lambda **_: {split: made},
        "dataset_path": None,
        "metadata": {"version": 1.0},
    }
    for unused in ("training_split", "validation_split"):
        if config.get(unused) != split:
            config.pop(unused, None)
    return ConfigurableTask(config=config)


def requests(task: Any) -> list[list[tuple[str, str]]]:
    """What a task asks of each of its documents."""
    task.build_all_requests(limit=None, rank=0, world_size=1)
    by_document: dict[int, list[tuple[str, str]]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(tuple(instance.args))
    return list(by_document.values())


@pytest.fixture
def _lm_eval() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
        import lm_eval.tasks  # noqa: F401


@pytest.mark.usefixtures("_lm_eval")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", UPSTREAM)
def test_the_harness_asks_what_its_own_task_asks(task: str, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.task == task]
    write(tmp_path, task, *(case.row for case in cases))
    ours, theirs = lm_eval_tasks([task], tmp_path)[task], upstream(task, [case.hub for case in cases])
    assert requests(ours) == requests(theirs) == [case.pairs for case in cases]
    assert ours.OUTPUT_TYPE == theirs.OUTPUT_TYPE
    # the same answers give the same scores, of each document in turn the first, the second ...
    for turn in range(2):
        for own, other, case in zip(ours.eval_docs, theirs.eval_docs, cases, strict=True):
            answers = [(-float(i != turn) - 0.1 * i, i == turn) for i in range(len(case.pairs))]
            got, want = ours.process_results(own, answers), theirs.process_results(other, answers)
            assert got == want
            assert suites.named(task).metric in got
    assert ours.aggregation().keys() == theirs.aggregation().keys()


@pytest.mark.usefixtures("_lm_eval")
@pytest.mark.filterwarnings("ignore")
def test_the_suite_is_run_and_its_samples_say_which_choice_is_right(tmp_path: Path) -> None:
    tasks = suites.SUITES["general"]
    for task in tasks:
        write(tmp_path, task.name, *(case.row for case in CASES if case.task == task.name))
    layers = (TaylorConfig(width=16),)
    with seeded(0):
        model = ModelConfig(vocab=264, width=16, layers=layers, mlp=24).build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    asked = subject(LanguageModel(model.eval(), Bytes()), "tiny")
    config, folder = EvalConfig(), ResultsFolder(tmp_path / "out")
    folder.claim(config, ["general"], list(general.FORMS), command="", device="cpu")
    lines = evaluate(asked, Plan(config=config, tasks=tasks, data=tmp_path), folder)
    assert [(line.task, line.metric, line.suite) for line in lines] == [
        (task.name, task.metric, "general") for task in tasks
    ]
    for line in lines:
        samples, cases = folder.samples("tiny", line.task), [case for case in CASES if case.task == line.task]
        assert line.count == len(samples) == len(cases)
        for sample, case in zip(samples, cases, strict=True):
            assert sample["gold"] == (case.gold or 0)
            scores = sample["logprobs"]
            assert len(sample["choices"]) == len(scores) == len(case.pairs)
            if case.gold is not None:
                # of a character, where that is the metric: the space before a choice is none of it
                lengths = [len(after) - 1 for _, after in case.pairs]
                each = [a / b for a, b in zip(scores, lengths, strict=True)]
                likeliest = max(
                    range(len(scores)), key=(each if line.metric == "acc_norm" else scores).__getitem__
                )
                assert sample["right"] == (likeliest == case.gold)
        assert line.value == pytest.approx(sum(sample["right"] for sample in samples) / len(samples))
    assert next(line for line in lines if line.task == "lambada").others["perplexity"] > 1
