"""Evaluations: what page, picture and table say, and what a reader's browser makes of the page."""

import base64
import itertools
import json
import math
import re
import zlib

import numpy as np
import pytest
from report.evaluations import ATTACK, Writer, answers, small

from holdall.commands import sweeps as commands
from holdall.files import RunError
from holdall.report import evals, evals_chart, evals_samples
from holdall.report.evals_data import differences, load

NATS = {"metric": "nats", "unit": "nats", "lower_is_better": True}


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def block_of(task: dict) -> dict:
    return json.loads(zlib.decompress(base64.b64decode(task["block"])))


def cells_of(page: str) -> dict[str, list[tuple[str, str]]]:
    """Text and interval of each cell of the table of scores, by model."""
    body = re.search(r'<table id="scores">.*?<tbody>(.*?)</tbody>', page, re.S)[1]
    rows = re.findall(r'<tr>\s*<th scope="row" title="(.*?)".*?</th>(.*?)</tr>', body, re.S)
    return {name: re.findall(r"<span>(.*?)</span><small>(.*?)</small>", row) for name, row in rows}


@pytest.fixture
def folder(tmp_path):
    small(tmp_path / "eval")
    return tmp_path / "eval"


# -------------------------------------------------------------------------------------------- statistics


def test_texts_are_drawn_with_all_their_questions(tmp_path):
    writer, widths = Writer(tmp_path / "eval"), {}
    for name, keys in {
        "alone": {},
        "three": {index: {"text_key": f"{index % 40}"} for index in range(120)},
    }.items():
        for suffix, twice in (("", False), ("_twice", True)):
            lines = answers(0.5, twice=twice, documents=40, seed=twice) * 3  # of each text alike
            lines = [{**line, "doc": index, **keys.get(index, {})} for index, line in enumerate(lines)]
            writer.task(name, f"fda{suffix}", lines)
    evaluation = load(tmp_path / "eval")
    for model in evaluation.models:
        found = evaluation.gain(model, "recall"), evaluation.interval(model, 1, "recall")
        widths[model.name] = [interval.high - interval.low for interval in found]
    assert widths["three"] == pytest.approx([3**0.5 * width for width in widths["alone"]], rel=0.1)


def test_questions_that_are_all_about_one_text_have_no_interval(tmp_path):
    writer = Writer(tmp_path / "eval")
    for task in ("fda", "fda_twice"):
        writer.task("a", task, [{**line, "text_key": "one"} for line in answers(0.5, twice=task != "fda")])
    evaluation = load(tmp_path / "eval")
    (model,) = evaluation.models
    for interval in (evaluation.gain(model, "recall"), evaluation.interval(model, 2, "recall")):
        assert np.isnan([interval.low, interval.high]).all()
    assert [interval for _, interval in cells_of(evals.render(evaluation))["a"][:3]] == ["", "", ""]
    assert "nan" not in evals.markdown(evaluation)


def test_difference_is_paired_over_the_documents_of_both(tmp_path):
    writer = Writer(tmp_path / "eval")
    writer.model("a", (1, 1, 1))
    once, twice = answers(0.5, documents=200), answers(0.5, twice=True, documents=200)
    for index, line in enumerate(twice):
        line["right"] = max(once[index]["right"], int(index < 10))  # never worse than once
    writer.task("a", "fda", once)
    writer.task("a", "fda_twice", twice[:150])
    evaluation = load(tmp_path / "eval")
    gain = differences(evaluation.models[0], evaluation.compared("recall"))
    gain_N = np.array([twice[i]["right"] - once[i]["right"] for i in range(150)])
    assert gain.value == pytest.approx(gain_N.mean())
    error = gain_N.std() / 150**0.5
    assert error < 0.02  # of unpaired answers it were 0.06
    assert gain.high - gain.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    once_interval = evaluation.interval(evaluation.models[0], 1, "recall")
    assert once_interval.high - once_interval.low > 0.12


# ---------------------------------------------------------------------------------------------- as a text


def test_table_has_every_score_with_its_interval_and_marks_the_best(folder):
    page = evals.render(load(folder))
    cells = cells_of(page)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for name, row in cells.items():
        by_task = {line["task"]: line for line in lines if line["model"] == name}
        order = ["fda", "fda_twice", "swde", "swde_twice"]
        assert [text for text, _ in row[3:]] == [f"{100 * by_task[task]['value']:.1f}" for task in order]
        assert row[3][1] == f"{100 * by_task['fda']['low']:.1f} to {100 * by_task['fda']['high']:.1f}"
        once = (by_task["fda"]["value"] + by_task["swde"]["value"]) / 2
        assert row[0][0] == f"{100 * once:.1f}"
        gain = (by_task["fda_twice"]["value"] + by_task["swde_twice"]["value"]) / 2 - once
        assert row[2][0] == f"{100 * gain:+.1f}".replace("-", "−")
    best = max(line["value"] for line in lines if line["task"] == "fda")
    fda = [line["model"] for line in lines if line["task"] == "fda" and line["value"] == best]
    assert len(re.findall(r'class="best[^"]*" title="fda once', page)) == len(fda)
    assert "12 questions, 4 cut to the window, version 1, prompts " in page
    assert not re.search(r"\{\{\w+\}\}", page.replace(re.search(r"<script>.*?</script>", page, re.S)[0], ""))


def test_nothing_is_best_where_all_are_equal(tmp_path):
    writer = Writer(tmp_path / "eval")
    for name in "ab":
        writer.model(name, (5, 5, 5))
        for task in ("fda", "fda_twice"):
            writer.task(name, task, answers(0, twice=task != "fda"))
    page = evals.render(load(tmp_path / "eval"))
    assert cells_of(page)["a"][:3] == [("0.0", "0.0 to 0.0"), ("0.0", "0.0 to 0.0"), ("0.0", "0.0 to 0.0")]
    assert 'class="best' not in page
    assert "recalls most" not in page
    assert "gives" not in page.partition("</header>")[0]


@pytest.mark.parametrize(("right", "said"), [(1, False), (10, True)])
def test_a_gain_is_named_where_its_interval_is_above_zero(tmp_path, right, said):
    writer = Writer(tmp_path / "eval")
    writer.model("a", (5, 5, 5))
    once, twice = answers(0.5, documents=40), answers(0.5, twice=True, documents=40)
    for index, (line, again) in enumerate(zip(once, twice, strict=True)):
        line["right"], again["right"] = int(index == 39), int(index == 39 or index < right)
    writer.task("a", "fda", once)
    writer.task("a", "fda_twice", twice)
    assert ("gives" in evals.render(load(tmp_path / "eval")).partition("</header>")[0]) == said


def test_table_for_readmes(folder):
    evals.write(folder)
    text = (folder / "table.md").read_text()
    assert text.splitlines()[0] == "| model | state | mean of recall | gain | fda | swde |"
    rows = [line.split(" | ") for line in text.splitlines()[2:5]]
    assert {row[0].strip("| ") for row in rows} == {"attention", "based", "mamba-2"}
    states = {row[0].strip("| "): row[1] for row in rows}
    assert states["attention"] == "12 MiB / 24 MiB"
    assert states["based"] == "1.27 MiB"
    assert any("**" in row[4] for row in rows)
    assert "State: bytes per sequence after 1,024 tokens and, where it grows, after 2,048." in text
    assert (folder / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_a_prompt_is_stored_once_for_all_models(folder):
    tasks = data_of(evals.render(load(folder)))["tasks"]
    block = block_of(tasks[0])
    assert [task["name"] for task in tasks] == ["fda", "swde"]
    assert len(tasks[0]["columns"]) == 6
    assert len(block["texts"]) == 24  # 12 documents, once and twice, of three models
    assert [cell["output"] for cell in block["cells"][0]] == [
        line["output"] for line in map(json.loads, _samples(folder, tasks, block))
    ]


def _samples(folder, tasks, block):
    names = [model["name"] for model in data_of(evals.render(load(folder)))["models"]]
    model, reads, _ = tasks[0]["columns"][0]
    return (folder / "samples" / names[model] / ("fda" if reads == 1 else "fda_twice.jsonl")).with_suffix(
        ".jsonl"
    ).read_text().splitlines()  # fmt: skip


def test_texts_are_limited_and_scores_are_not(folder):
    task = data_of(evals.render(load(folder), samples=5))["tasks"][0]
    block = block_of(task)
    assert (task["documents"], task["shown"]) == (12, 5)
    assert all(len(scores) == 12 for scores in block["scores"])
    assert all(len(cells) == 5 for cells in block["cells"])
    page = evals.render(load(folder), samples=5)
    assert "5 of 12 of fda, 5 of 12 of swde" in page
    assert "--samples 12" in page
    assert "--samples" not in evals.render(load(folder))


def test_of_a_long_prompt_what_is_near_answers_and_ends_is_kept():
    text = "".join(f"w{index} " for index in range(20_000))
    prompt = f"{text}the Gold is here {text}"
    kept = evals_samples.fold(prompt, ["gold"])
    assert len(kept) < evals_samples.LONGEST
    assert kept.startswith("w0 w1 ")
    assert kept.endswith("w19999 ")
    assert "the Gold is here" in kept
    cut = [int(number.replace(",", "")) for number in re.findall(r"… ([\d,]+) characters", kept)]
    notes = sum(map(len, re.findall(r"\n\[….*?…\]\n", kept)))
    assert len(kept) - notes + sum(cut) == len(prompt)
    assert evals_samples.fold("short", ["x"]) == "short"


def test_what_is_missing_is_no_zero(tmp_path):
    writer = Writer(tmp_path / "eval", tasks=["fda", "fda_twice", "swde", "swde_twice", "nq", "nq_twice"])
    for name, state in (("a", (5, 5, 5)), ("b", (9, 9, 9))):
        writer.model(name, state)
        writer.task(name, "fda", answers(0.6))
        writer.task(name, "fda_twice", answers(0.8, twice=True))
    writer.task("a", "swde", answers(0.5))
    writer.task("a", "swde_twice", answers(0.7, twice=True))
    writer.samples("b", "swde", answers(0.5)[:4], tail='{"doc": 4, "prom')  # it is being written
    (tmp_path / "eval/answers/b").mkdir(parents=True)
    (tmp_path / "eval/answers/b/swde_twice.jsonl").write_text('{"request": "0", "answer": "x"}\n')
    evaluation = load(tmp_path / "eval")
    page = evals.render(evaluation)
    assert cells_of(page)["b"][-2:] == [("…", ""), ("…", "")]
    assert 'title="4 questions so far"' in page
    assert 'title="1 answers so far"' in page
    assert "6 of 8 scores are there" in page
    assert "Missing: b (swde once, swde twice)" in page
    assert "Not begun yet: nq, nq_twice" in page
    # the mean is over all tasks, which only one has
    assert [task.name for task in evaluation.compared("recall")] == ["fda", "swde"]
    assert cells_of(page)["b"][:3] == [("–", "")] * 3
    assert [model.name for model in evals_chart.drawn(evaluation, "recall")] == ["a"]
    assert "b is not in the picture: it lacks scores that the mean is taken over." in page
    assert "nq" not in evals.markdown(evaluation).splitlines()[0]


def test_mean_of_a_running_evaluation_is_over_what_all_have(tmp_path):
    writer = Writer(tmp_path / "eval")
    for name, tasks in (("a", ("fda", "fda_twice", "swde")), ("b", ("fda", "fda_twice", "nq"))):
        writer.model(name, (5, 5, 5))
        for task in tasks:
            writer.task(name, task, answers(0.6, twice=task.endswith("twice")))
    writer.task("b", "swde_twice", answers(0.7, twice=True))
    evaluation = load(tmp_path / "eval")
    assert [task.name for task in evaluation.compared("recall")] == ["fda"]
    assert (
        evals_chart.mean_text(evaluation, "recall") == "fda, which all models have so far (without nq, swde)"
    )


def test_other_tasks_stand_beside_recall_and_not_in_its_mean(tmp_path):
    writer = small(tmp_path / "eval")
    choices = [
        {"doc": i, "prompt": "2+2", "choices": ["4", "5"], "logprobs": [-1, -math.inf], "gold": 0, "right": 1}
        for i in range(3)
    ]  # fmt: skip
    writer.task("based", "piqa", choices, suite="general", reads=None, metric="acc_norm")
    other = {"suite": "general", "reads": None, "metric": "perplexity", "unit": "", "lower_is_better": True}
    writer.result("based", "lambada", [0.0], **other, value=12.345)
    writer.result("mamba-2", "lambada", [0.0], **other, value=9.0)
    evaluation = load(tmp_path / "eval")
    assert [task.name for task in evaluation.recall_tasks("recall")] == ["fda", "swde"]
    page = evals.render(evaluation)
    # the columns are fda, swde, lambada and piqa
    assert [text for text, _ in cells_of(page)["based"][-2:]] == ["12.35", "100.0"]
    (best,) = re.findall(r'class="best[^"]*" title="lambada[^>]*data-value="(.*?)"', page)
    assert best == "9.0"
    piqa = next(task for task in data_of(page)["tasks"] if task["name"] == "piqa")
    cell = block_of(piqa)["cells"][0][0]
    assert cell["logprobs"] == [-1, None]
    assert cell["gold"] == 0


def test_a_column_is_in_percent_only_if_all_its_scores_are_shares(tmp_path):
    writer = Writer(tmp_path / "eval")
    other = {
        "suite": "",
        "reads": None,
        "metric": "rouge1",
    }  # of lm-eval's own, whose units are seen in scores
    writer.result("a", "summaries", [0.0, 1.0], **other)
    writer.result("b", "summaries", [1.0], **other, unit="", value=42.5)
    evaluation = load(tmp_path / "eval")
    assert len(evaluation.tasks) == 1
    cells = cells_of(evals.render(evaluation))
    assert {name: row[0][0] for name, row in cells.items()} == {"a": "0.50", "b": "42.50"}


def test_answers_without_a_number_of_their_own_have_a_score_and_no_samples(tmp_path):
    writer = Writer(tmp_path / "eval")
    lines = [
        {"doc": i, "prompt": "x", "target": "x", "logprobs": [-3.5], "right": [-3.5, 2]} for i in range(3)
    ]
    writer.samples("a", "wikitext", lines)
    other = {"metric": "word_perplexity", "unit": "", "lower_is_better": True, "low": None, "high": None}
    writer.result("a", "wikitext", [1], **other, reads=None, value=31.5)
    page = evals.render(load(tmp_path / "eval"))
    assert cells_of(page)["a"] == [("31.50", "")]
    assert data_of(page)["tasks"] == []
    assert "Right and wrong answers" not in page


@pytest.mark.parametrize("gold", [1, " no"])
def test_the_right_choice_is_named_by_its_text(tmp_path, gold):
    writer = Writer(tmp_path / "eval")
    line = {
        "doc": 0,
        "prompt": "",
        "target": gold,
        "choices": [" yes", " no"],
        "logprobs": [-1, -2],
        "gold": gold,
    }
    writer.task("a", "boolq", [{**line, "right": 0}], metric="acc", reads=None)
    block = block_of(data_of(evals.render(load(tmp_path / "eval")))["tasks"][0])
    assert block["documents"] == [["0", ["no"]]]
    assert block["cells"][0][0]["gold"] == 1


def test_states_that_were_not_counted_are_absent(tmp_path):
    writer = Writer(tmp_path / "eval")
    writer.json("models/a.json", {"name": "a", "state_bytes": {"512": 10, "1024": 20, "2048": None}})
    for task in ("fda", "fda_twice"):
        writer.task("a", task, answers(0.5, twice=task != "fda"))
    evaluation = load(tmp_path / "eval")
    assert evaluation.models[0].grows
    assert [[p.reads for p in model.points] for model in evals_chart.drawn(evaluation, "recall")] == [[1]]
    assert "10 B after 512, 20 B after 1,024</td>" in evals.render(evaluation)


def two_suites(folder):
    """The same tasks asked in two ways, of models that write no right answer."""
    writer = Writer(folder)
    for name, state, chance in (("a", 4096, 0.4), ("b", 8192, 0.7)):
        writer.model(name, (state,) * 3)
        for task in ("fda", "swde"):
            for twice in ("", "_twice"):
                writer.task(name, task + twice, answers(0, twice=bool(twice)))
                more = {"of": task, "metric": "acc", "suite": f"answers{twice.replace('_', '-')}"}
                lines = answers(chance, twice=bool(twice), seed=len(task + twice))
                writer.task(name, f"{task}_answer{twice}", lines, **more, others={"nats": 2.5})
    return load(folder)


def test_tasks_stand_in_the_order_of_the_config(tmp_path):
    writer = Writer(tmp_path / "eval", tasks=["swde", "swde_twice", "fda", "swde_answer"])
    for task, more in (
        ("fda", {}),
        ("swde_twice", {}),
        ("zoo", {}),
        ("swde_answer", {"of": "swde", "suite": "answers", "metric": "acc"}),
        ("swde", {}),
    ):
        writer.result("a", task, [1, 0], **more)
    tasks = [(task.name, task.suite) for task in load(tmp_path / "eval").tasks]
    assert tasks == [("swde", "recall"), ("fda", "recall"), ("swde", "answers"), ("zoo", "recall")]


def test_each_suite_has_its_mean_and_its_picture(tmp_path):
    evaluation = two_suites(tmp_path / "eval")
    assert evaluation.suites == ("answers", "recall")  # the one that says more is first
    assert [len(evaluation.compared(suite)) for suite in evaluation.suites] == [2, 2]
    assert evaluation.models[0].name == "b"
    page = evals.render(evaluation)
    row = [text for text, _ in cells_of(page)["a"]]
    assert row[3:6] == ["0.0", "0.0", "0.0"]
    assert row[0] != "0.0"
    assert len(row) == 6 + 8
    charts = data_of(page)["charts"]
    assert [chart["suite"] for chart in charts] == ["answers", "recall"]
    assert charts[0]["text"].startswith(
        "Answers that are the likeliest text (mean over fda and swde) against"
    )
    assert charts[0]["layout"]["yaxis"]["title"]["text"] != charts[1]["layout"]["yaxis"]["title"]["text"]
    assert {task["name"] for task in data_of(page)["tasks"]} == {
        "fda (recall)", "swde (recall)", "fda (answers)", "swde (answers)"
    }  # fmt: skip
    assert re.search(
        r"<th scope=\"row\">fda \(answers\) once</th><td>nats</td><td>2.5</td><td>2.5</td>", page
    )
    head = evals.markdown(evaluation).splitlines()[0]
    assert "mean of answers | gain | mean of recall | gain |" in head
    assert "fda (answers)" in head


@pytest.fixture
def in_nats(tmp_path):
    """Two models on the suites of answers, of three documents."""
    writer = Writer(tmp_path / "eval", suite=["answers", "answers-twice"])
    nats = {"a": ([2.0, 4.0, 6.0], [2.5, 4.5, 6.5]), "b": ([3.0, 5.0, 9.0], [2.0, 3.0, 8.0])}
    for name, readings in nats.items():
        writer.model(name, (4096,) * 3)
        for twice, values in zip(("", "_twice"), readings, strict=True):
            lines = [
                {**line, "right": value, "choices": [" Answer"], "logprobs": [-value], "gold": 0}
                for line, value in zip(answers(0, documents=3), values, strict=True)
            ]
            writer.samples(name, f"fda_answer{twice}", lines)
            more = {"of": "fda", "suite": f"answers{twice.replace('_', '-')}", "low": 1.5, "high": 9.25}
            writer.result(name, f"fda_answer{twice}", values, **NATS, **more, others={"acc": 0.0})
    return tmp_path / "eval"


def test_of_nats_lower_is_better(in_nats):
    evaluation = load(in_nats)
    assert [model.name for model in evaluation.models] == ["b", "a"]  # by the mean read twice: 4.33 and 4.5
    gains = [differences(model, evaluation.compared("answers")) for model in evaluation.models]
    assert [gain.value for gain in gains] == pytest.approx([4 / 3, -0.5])  # more is better, here too
    page = evals.render(evaluation)
    cells = cells_of(page)
    assert [text for text, _ in cells["a"]] == ["4.00", "4.50", "−0.50", "4.00", "4.50"]
    assert [text for text, _ in cells["b"]] == ["5.67", "4.33", "+1.33", "5.67", "4.33"]
    assert "1.50 to 9.25" in page
    assert page.count('class="best') == 4  # of the mean and of the task, once and twice
    assert "Right answers are likeliest to <strong>b</strong>: 5.67 nats each read once, 4.33 nats" in page
    assert "Reading twice gives <strong>b</strong> the most, +1.33 nats" in page
    (chart,) = data_of(page)["charts"]
    low, high = chart["layout"]["yaxis"]["range"]
    assert 0 < low < 2.5
    assert 8 < high < 10
    assert "%" not in chart["layout"]["yaxis"]["tickformat"]
    assert chart["layout"]["yaxis"]["title"]["text"] == "Nats per right answer, fda (lower is better)"
    assert "5.67 nats" in str(chart["traces"])
    assert [task["lower"] for task in data_of(page)["tasks"]] == [True]
    text = evals.markdown(evaluation)
    assert re.findall(r'<th class="span first".*?>(.*?)<small>(.*?)</small>', page) == [
        ("Mean", "answers, nats"), ("fda", "answers, nats")
    ]  # fmt: skip
    words = page.partition('<script type="application/json"')[0]
    assert "<h1>How likely right answers are, and from how much state</h1>" in words
    assert '<h2 id="samples">Every answer</h2>' in words
    assert "<strong>Nats</strong> are" in words
    for word in ("recall", "Right and wrong", "<strong>Right", "Per cent"):
        assert word not in words
    assert "5.67 / **4.33**" in text
    assert "**4.00** / 4.50" in text
    assert "Per cent" not in text
    assert "minus the log-likelihood of the first right answer" in text
    assert "Gain: once less twice" in text


def test_a_folder_without_states_has_no_picture(tmp_path):
    writer = Writer(tmp_path / "eval", window=0)
    writer.json("models/a.json", {"name": "a"})
    writer.task("a", "fda", answers(0.5))
    assert [path.name for path in evals.write(tmp_path / "eval")] == ["index.html", "table.md"]
    assert cells_of((tmp_path / "eval/index.html").read_text("utf-8"))["a"][-1][0] != "–"


def test_tasks_with_odd_names_and_documents_with_several_questions(tmp_path):
    writer = Writer(tmp_path / "eval")
    lines = [{**line, "doc": "same"} for line in answers(0.5)]
    writer.samples("a", "my%3atask%2f2", lines)
    writer.result("a", "my:task/2", [line["right"] for line in lines], reads=None)
    task = data_of(evals.render(load(tmp_path / "eval")))["tasks"][0]
    assert (task["name"], task["documents"]) == ("my:task/2", 12)
    assert [cell["output"] for cell in block_of(task)["cells"][0]] == [line["output"] for line in lines]


def test_models_are_found_by_their_names_whatever_their_files_are_called(tmp_path):
    writer = Writer(tmp_path / "eval")
    writer.model("runs/a:b", (1, 1, 1), key="runs_a_b")
    writer.samples("runs_a_b", "fda", answers(0.5))
    writer.result("runs/a:b", "fda", [1, 0])
    (model,) = load(tmp_path / "eval").models
    assert (model.name, len(model.scores), len(model.samples)) == ("runs/a:b", 1, 1)


def test_errors_name_the_file_and_the_line(tmp_path, folder):
    with pytest.raises(RunError, match=r"is no folder of `holdall eval`"):
        load(tmp_path)
    empty = Writer(tmp_path / "empty")
    with pytest.raises(RunError, match="holds no results yet"):
        load(empty.folder)
    path = folder / "samples/based/fda.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"right": ', '"wrong": ', 1))
    with pytest.raises(RunError, match=r"line 1 of .*based/fda.jsonl"):
        load(folder)
    path.write_text(whole)
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"model": "based", "task": "fda"}\n')
    with pytest.raises(RunError, match=r"line 13 of .*results.jsonl"):
        load(folder)


def test_report_command_writes_the_page_again(folder, tmp_path, capsys):
    assert commands.report([folder], tmp_path / "out", samples=3) == 0
    assert "index.html" in capsys.readouterr().out
    page = (tmp_path / "out/index.html").read_text("utf-8")
    assert data_of(page)["tasks"][0]["shown"] == 3
    with pytest.raises(ValueError, match="one folder at a time"):
        commands.report([folder, folder], None)


def test_report_names_the_commands_that_write_what_it_reads(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()  # of `holdall train`
    (tmp_path / "run/config.json").write_text('{"steps": 1}')
    for name, said in (
        ("empty", "holds nothing"),
        ("run", "holds nothing"),
        ("absent", "there is no folder"),
    ):
        with pytest.raises(
            RunError, match=rf"{said}.*`holdall frontier`, `holdall matrix` or `holdall eval`"
        ):
            commands.report([tmp_path / name], None)


def test_figure_has_a_point_for_each_reading(folder):
    evaluation = load(folder)
    models = evals_chart.drawn(evaluation, "recall")
    figure = evals_chart.draw(evaluation, "recall", models)
    points = [line for line in figure.axes[0].lines if line.get_gid()]
    at = {(line.get_gid(), line.get_xdata()[0]) for line in points}
    assert {("attention", 12 << 20), ("attention", 24 << 20), ("based", 1300 << 10)} <= at
    assert len(points) == 6
    hollow = {line.get_gid() for line in points if line.get_markerfacecolor() == "#ffffff"}
    assert hollow == {"attention"}
    assert {text.get_gid() for text in figure.axes[0].texts} >= {"attention", "based", "mamba-2"}
    drawn = [trace for trace in evals_chart.traces(models) if trace.get("name") == "attention"]
    assert drawn[0]["x"] == [12 << 20, 24 << 20]
    assert drawn[0]["marker"]["symbol"].endswith("-open")


def test_an_arrow_leads_from_once_to_twice_where_the_two_are_apart(tmp_path):
    writer = Writer(tmp_path / "eval")
    for name, state, right in (("up", 5, (0, 8)), ("alike", 50, (4, 4)), ("grows", 500, (4, 4))):
        writer.model(name, (state, state, state * (2 if name == "grows" else 1)))
        for suffix, of_ten in zip(("", "_twice"), right, strict=True):
            lines = [{**line, "right": int(k < of_ten)} for k, line in enumerate(answers(0, documents=10))]
            writer.task(name, f"fda{suffix}", lines)
    evaluation = load(tmp_path / "eval")
    models = evals_chart.drawn(evaluation, "recall")
    index = {model.name: model.index for model in models}
    led = {trace["legendgroup"] for trace in evals_chart.traces(models) if trace["mode"] == "lines+markers"}
    assert led == {f"model {index[name]}" for name in ("up", "grows")}
    texts = evals_chart.draw(evaluation, "recall", models).axes[0].texts
    assert sum(bool(text.arrow_patch) for text in texts if not text.get_text()) == 2
    assert evals_chart.layout(evaluation, "recall", models)["yaxis"]["range"][0] < 0  # half a mark at 0


def test_models_of_equal_state_are_drawn_side_by_side(tmp_path):
    writer = Writer(tmp_path / "eval")
    for name, state in (("a", 4096), ("b", 4096), ("c", 1 << 20)):
        writer.model(name, (state,) * 3)
        writer.task(name, "fda", answers(0.5))
    evaluation = load(tmp_path / "eval")
    places = {model.name: model.places[0][0] for model in evals_chart.drawn(evaluation, "recall")}
    assert places["c"] == 1 << 20
    assert sorted([places["a"], places["b"]]) != [4096, 4096]
    assert places["a"] * places["b"] == pytest.approx(4096**2)
    assert max(places["a"], places["b"]) < 1.2 * 4096
    assert "drawn side by side" in evals.render(evaluation)


def test_names_of_many_models_are_listed_beside_the_figure(tmp_path):
    writer = Writer(tmp_path / "eval")
    for index in range(evals_chart.MOST_LABELS + 1):
        writer.model(f"m{index}", (index + 1,) * 3)
        writer.result(f"m{index}", "fda", [1, 0])
    evaluation = load(tmp_path / "eval")
    figure = evals_chart.draw(evaluation, "recall", evals_chart.drawn(evaluation, "recall"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [m.name for m in evaluation.models]
    assert not [text for text in figure.axes[0].texts if text.get_gid()]


# -------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def visit(open_file):
    def open_page(folder, context=None, **options):
        evals.write(folder, **options)
        page = open_file(folder / "index.html", **(context or {}))
        page.wait_for_selector("#document h3")
        return page

    return open_page


def listed(page) -> list[str]:
    return page.locator("#list .id").all_inner_texts()


def pick(page, side: str, text: str) -> None:
    page.locator(side).select_option(label=text)


@pytest.mark.browser
def test_filters_let_through_whom_they_name(visit, folder):
    page = visit(folder)
    pick(page, "#a", "attention, read once")
    pick(page, "#b", "based, read once")
    right = [
        [
            json.loads(line)["right"]
            for line in (folder / f"samples/{name}/fda.jsonl").read_text().splitlines()
        ]
        for name in ("attention", "based")
    ]
    kinds = {"both right": (1, 1), "only A right": (1, 0), "only B right": (0, 1), "both wrong": (0, 0)}
    boxes = {name: page.locator("#who").get_by_label(name) for name in kinds}
    for name, outcome in kinds.items():
        for other, box in boxes.items():
            box.set_checked(other == name)
        wanted = [str(i) for i, found in enumerate(zip(*right, strict=True)) if found == outcome]
        assert listed(page) == wanted
    assert any(len(set(pair)) == 2 for pair in itertools.zip_longest(*right))
    for box in boxes.values():
        box.check()
    pick(page, "#b", "nobody")
    page.locator("#who").get_by_label("right", exact=True).uncheck()
    assert listed(page) == [str(i) for i, score in enumerate(right[0]) if not score]
    page.locator("#task").select_option(label="swde")
    page.locator("#who").get_by_label("right", exact=True).check()
    page.wait_for_function("() => document.querySelector('#document h3').textContent.startsWith('swde')")
    assert page.locator("#a option:checked").inner_text() == "attention, read once"
    page.locator("#search").fill("answer7")
    assert listed(page) == ["7"]
    page.locator("#search").fill("no such text")
    assert "No question passes" in page.locator("#document").inner_text()


@pytest.mark.browser
def test_answers_in_nats_are_compared_and_neither_right_nor_wrong(visit, in_nats):
    page = visit(in_nats)
    assert page.locator("#chart").get_attribute("aria-label").startswith("Nats per right answer, fda")
    pick(page, "#a", "a, read once")
    pick(page, "#b", "b, read twice")
    labels = page.locator("#who label:visible").all_inner_texts()
    assert labels == ["alike", "A likelier", "B likelier"]
    assert "A less B −0.33 nats (lower is better; 95% interval" in page.locator("#said").inner_text()
    for name, documents in {"alike": ["0"], "A likelier": ["2"], "B likelier": ["1"]}.items():
        for other in labels:
            page.locator("#who").get_by_label(other).set_checked(other == name)
        assert listed(page) == documents
    heads = page.locator(".side h4").all_inner_texts()  # of the document that is left
    assert heads == ["A a, read once 4.00 nats", "B b, read twice 3.00 nats"]
    assert page.locator(".choices").count() == 0  # which would say the same in other words
    pick(page, "#b", "nobody")
    assert listed(page) == ["0", "1", "2"]
    assert page.locator("#who label:visible").count() == 0


@pytest.mark.browser
def test_two_models_stand_side_by_side_with_their_difference(visit, folder):
    page = visit(folder)
    pick(page, "#a", "attention, read once")
    pick(page, "#b", "mamba-2, read once")
    heads = page.locator(".side h4").all_inner_texts()
    assert [head[:-2] for head in heads] == ["A attention, read once", "B mamba-2, read once"]
    assert page.locator("#document > h4").inner_text() == "Prompt, the same for both"
    assert page.locator(".prompt mark").all_inner_texts() == ["Answer0"]
    assert "60 tokens read · tokens 1 to 60 of the document" in page.locator(".side").first.inner_text()
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    value = {line["model"]: line["value"] for line in lines if line["task"] == "fda"}
    said = page.locator("#said").inner_text()
    difference = 100 * (value["attention"] - value["mamba-2"])
    assert f"attention, read once {100 * value['attention']:.1f}%" in said
    assert f"A less B {difference:+.1f} points".replace("-", "−") in said
    low, high = (
        float(end.replace("−", "-")) for end in re.search(r"interval (\S+) to (\S+)\)", said).groups()
    )
    assert low <= difference <= high
    about = [index // 6 for index in range(12)]  # as if there were two texts
    assert page.evaluate("about => paired(about.map(text => 3 * text), about)", about) == [1.5, 0, 3]
    pick(page, "#b", "attention, read twice")
    assert page.locator(".sides h4:text('Prompt of')").all_inner_texts() == ["Prompt of A", "Prompt of B"]
    assert page.locator(".prompt").nth(1).inner_text().startswith("Information about Key.")


@pytest.mark.browser
def test_keys_step_through_the_documents_and_spare_the_search(visit, folder):
    page = visit(folder)
    at = "() => document.querySelector('#list .at .id').textContent"
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert page.evaluate(at) == "1"
    assert page.locator("#document h3").inner_text() == "fda, question 1: Answer1"
    page.locator("#search").click()
    page.keyboard.type("j")
    assert page.locator("#search").input_value() == "j"
    assert listed(page) == []
    page.keyboard.press("Escape")  # clears the search and leaves it
    page.keyboard.press("k")
    assert page.evaluate(at) == "11"
    page.locator("#list li").nth(4).click()
    assert page.evaluate(at) == "4"


@pytest.mark.browser
def test_long_prompts_are_folded_around_the_answer(visit, tmp_path):
    small(tmp_path / "long", documents=2, words=800)
    page = visit(tmp_path / "long")
    text = page.locator(".prompt").first
    assert "Answer0" in text.inner_text()
    gap = text.locator("button").first
    before, hidden = len(text.inner_text()), int(re.sub(r"\D", "", gap.inner_text()))
    label = len(gap.inner_text())
    gap.click()
    assert len(text.inner_text()) == before - label + hidden
    page.get_by_label("whole prompts").check()
    assert page.locator(".prompt button").count() == 0


@pytest.mark.browser
def test_documents_and_names_are_inert(visit, tmp_path):
    writer = Writer(tmp_path / "eval", command=ATTACK, suite=[ATTACK])
    writer.model(ATTACK, (5, 5, 5), key="bad", source=ATTACK, kind=ATTACK)
    writer.model("good", (9, 9, 9))

    def bad(line):
        return {
            **line,
            "prompt": ATTACK + line["prompt"],
            "target": [*line["target"], ATTACK],
            "output": ATTACK,
        }

    for key, name in (("bad", ATTACK), ("good", "good")):
        writer.samples(key, "fda", answers(0.5, change=bad))
        writer.result(name, "fda", [1, 0], suite=ATTACK, prompt_hash=ATTACK, version=ATTACK)
    page = visit(tmp_path / "eval")
    page.locator("#list li").nth(3).click()
    assert ATTACK in page.locator(".prompt").first.inner_text()
    assert page.locator(".output mark").first.inner_text() == ATTACK
    assert page.locator("img").count() == 0
    assert page.title() == f"Evaluation: {ATTACK}"
    text = (tmp_path / "eval/index.html").read_text("utf-8")
    assert "<img src=x" not in text


@pytest.mark.browser
def test_answers_of_choices_are_shown_with_their_log_probabilities(visit, tmp_path):
    writer = Writer(tmp_path / "eval")
    writer.model("a", (1, 1, 1))
    line = {
        "doc": "x",
        "prompt": "2 + 2 =",
        "choices": [" 4", " 5"],
        "logprobs": [-2.5, -1.25],
        "gold": 0,
        "right": 0,
    }
    writer.task("a", "arc", [line], reads=None, metric="acc")
    page = visit(tmp_path / "eval")
    assert page.locator(".choices td:last-child").all_inner_texts() == ["−2.50", "−1.25"]
    assert page.locator(".choices .picked td").first.inner_text().strip() == "5"
    assert page.locator(".choices mark").inner_text().strip() == "4"


@pytest.mark.browser
def test_a_running_evaluation_leaves_out_what_only_one_has_answered(visit, tmp_path):
    writer = Writer(tmp_path / "eval")
    writer.samples("a", "fda", answers(0.5))
    writer.samples("b", "fda", answers(0.5)[:4])
    page = visit(tmp_path / "eval")
    pick(page, "#a", "a, read once")
    pick(page, "#b", "b, read once")
    assert listed(page) == ["0", "1", "2", "3"]
    assert "8 on this page are left out" in page.locator("#said").inner_text()


@pytest.mark.browser
def test_a_point_opens_its_model_once_beside_twice(visit, folder):
    page = visit(folder)
    page.wait_for_selector("#chart .legend .traces")
    assert page.locator("#chart .legend .legendtext").all_text_contents() == page.evaluate(
        "() => models.map(model => model.name)"
    )
    place = page.evaluate(
        """() => {
        const trace = chart.data.find(trace => trace.name == 'based'), box = chart.getBoundingClientRect();
        const {xaxis: x, yaxis: y} = chart._fullLayout;
        return [box.left + x._offset + x.d2p(trace.x[0]), box.top + y._offset + y.d2p(trace.y[0])];
        }"""
    )
    page.mouse.move(*place)
    page.wait_for_selector("#chart .hoverlayer .hovertext")
    page.mouse.click(*place)
    page.wait_for_function(
        "() => document.querySelector('#a option:checked').textContent == 'based, read once'"
    )
    assert page.locator("#b option:checked").inner_text() == "based, read twice"


@pytest.mark.browser
def test_the_suite_of_the_picture_is_chosen(visit, tmp_path):
    two_suites(tmp_path / "eval")
    page = visit(tmp_path / "eval")
    page.wait_for_selector("#chart .legend .traces")
    shown = "() => [chart.layout.yaxis.title.text, find('#caption').textContent.split(' ')[0]]"
    assert page.evaluate(shown) == ["Answers that are the likeliest text, mean over 2 tasks", "Answers"]
    page.locator("#suite").select_option(label="recall")
    assert page.evaluate(shown) == ["Recall, mean over 2 tasks", "Recall"]
    page.get_by_text("Other metrics").click()
    assert "nats" in page.locator("#others").inner_text()


@pytest.mark.browser
def test_scores_are_sorted_by_any_column_with_gaps_last(visit, tmp_path):
    writer = small(tmp_path / "eval")
    writer.result("based", "kv", [1, 1, 0], reads=None, suite="kv")
    writer.result("mamba-2", "kv", [1, 0, 0], reads=None, suite="kv")
    page = visit(tmp_path / "eval")
    names = "() => [...document.querySelectorAll('#scores tbody th')].map(cell => cell.title)"
    page.locator("#scores thead tr:last-child button").last.click()
    assert page.evaluate(names)[0] == "mamba-2"
    assert page.evaluate(names)[2] == "attention"
    page.locator("#scores thead tr:last-child button").last.click()
    assert page.evaluate(names) == ["based", "mamba-2", "attention"]
    page.get_by_role("button", name="State").click()
    assert page.evaluate(names) == ["based", "mamba-2", "attention"]


@pytest.mark.browser
def test_page_fits_a_phone_and_the_dark(visit, folder):
    page = visit(folder, {"color_scheme": "dark"})
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    assert page.evaluate("() => chart.layout.font.color") == "#e6e6e3"
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function(
        "() => document.documentElement.scrollWidth == 400 && chart._fullLayout.width <= 400"
    )
