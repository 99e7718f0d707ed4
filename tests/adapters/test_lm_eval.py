"""Holdall in lm-eval: scores that depend on no batch, contexts that are read once, and HFLM's scores.

Tasks are local files, so that no network is asked.
"""

from __future__ import annotations

import functools
import json
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdall import cli, mixers
from holdall.language_model import LanguageModel
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    from holdall.adapters.lm_eval import HoldallLM

WIDTH = 16
HYBRID = ("base-conv", "taylor", "sliding-window", "mamba")
END = Bytes().end


def language_model(*names: str, dtype: torch.dtype = torch.float64, **options: Any) -> LanguageModel:
    layers = tuple(mixers.entry(name).configure(width=WIDTH) for name in names)
    with seeded(0):
        model = ModelConfig(vocab=264, width=WIDTH, layers=layers, mlp=24, **options).build()
    for block in model.blocks:
        for parameter in block.parameters():
            parameter.data.mul_(2)
    model.embed.weight.data.mul_(20)
    return LanguageModel(model.to(dtype).eval(), Bytes())


def instances(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def pairs() -> list[tuple[str, str]]:
    """Contexts of many lengths, most with several continuations, and one that is empty."""
    draw = random.Random(0)
    word = lambda: "".join(draw.choices("abcdefg ", k=draw.randint(1, 9))).strip() or "x"  # noqa: E731
    contexts = [" ".join(word() for _ in range(draw.randint(1, 9))) for _ in range(9)] + [""]
    return [(context, " " + word()) for context in contexts for _ in range(draw.choice([1, 4]))]


@torch.no_grad()
def by_definition(made: LanguageModel, context: str, continuation: str) -> tuple[float, bool]:
    """All of a text read at once, alone."""
    ids = [END, *(context + continuation).encode()]
    log_prob_TV = made.model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
    asked = len(continuation.encode())
    next_T = torch.tensor(ids[-asked:])
    log_prob_TV = log_prob_TV[-asked:]
    total = float(log_prob_TV.gather(1, next_T[:, None]).sum())
    return total, bool((log_prob_TV.argmax(-1) == next_T).all())


class BegunByA(Bytes):
    """A tokenizer whose documents begin with another token than the one that ends them."""

    @property
    def begin(self) -> int:
        return ord("a")


@torch.no_grad()
def test_a_document_begins_with_its_own_token() -> None:
    made = language_model("taylor")
    other = HoldallLM(LanguageModel(made.model, BegunByA()))
    ((got, _),) = other.loglikelihood(instances(("", " word")), disable_tqdm=True)
    ids = [ord("a"), *b" word"]
    log_prob_TV = made.model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
    want = log_prob_TV.gather(1, torch.tensor(ids[1:])[:, None]).sum()
    assert abs(got - float(want)) < 1e-10
    (whole,) = other.loglikelihood_rolling(instances((" word",)), disable_tqdm=True)
    assert abs(whole - float(want)) < 1e-10


@pytest.mark.parametrize("options", [{}, {"positions": 128, "tied": False}], ids=["", "positions"])
def test_scores_depend_on_no_batch(options: dict[str, Any]) -> None:
    made, asked = language_model(*HYBRID, **options), pairs()
    want = [by_definition(made, *pair) for pair in asked]
    assert len({round(total, 6) for total, _ in want}) == len(set(asked))
    order = list(range(len(asked)))
    for batch in (1, 7, 64):
        random.Random(batch).shuffle(order)
        got = HoldallLM(made, batch_size=batch).loglikelihood(
            instances(*(asked[i] for i in order)), disable_tqdm=True
        )
        for i, (total, greedy) in zip(order, got, strict=True):
            assert abs(total - want[i][0]) < 1e-10, asked[i]
            assert greedy == want[i][1]


def test_a_continuation_that_greedy_generation_writes_is_one() -> None:
    made = language_model(*HYBRID)
    text = made.generate("abc", max_tokens=3, temperature=0)
    assert text.isascii()
    score = HoldallLM(made).loglikelihood(instances(("abc", text), ("abc", text + "x")), disable_tqdm=True)
    assert [greedy for _, greedy in score] == [True, False]


def test_a_context_is_read_once() -> None:
    made = language_model(*HYBRID)
    hidden, read = made.model.hidden, [0]

    def counted(tokens_BT: torch.Tensor, *args: Any, **how: Any) -> Any:
        read[0] += tokens_BT.numel()
        return hidden(tokens_BT, *args, **how)

    made.model.hidden = counted  # type: ignore[method-assign]
    context = "a context of some length"
    asked = [(context, " " + ending) for ending in ("aa", "bb", "cc", "dd")]
    HoldallLM(made).loglikelihood(instances(*asked), disable_tqdm=True)
    assert read[0] == 1 + len(context) + 4 * 2  # of each continuation all but the last token


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_all_texts_of_a_task_are_encoded_at_once(kind: str) -> None:
    """On all cores: one by one takes longer than a small model reads them."""
    calls: list[int] = []

    class Counted(Bytes):
        def encode_batch(self, texts: Sequence[str]) -> list[Any]:
            calls.append(len(texts))
            return super().encode_batch(texts)

    made, asked = language_model("taylor"), [(f"a context {number}", " and its end") for number in range(5)]
    lm = HoldallLM(LanguageModel(made.model, Counted()))
    if kind == "loglikelihood":
        scored = lm.loglikelihood(instances(*asked), disable_tqdm=True)
        for (total, greedy), pair in zip(scored, asked, strict=True):
            want, is_likeliest = by_definition(made, *pair)
            assert abs(total - want) < 1e-10
            assert greedy == is_likeliest
    else:
        lm.generate_until(instances(*((context, {"max_gen_toks": 1}) for context, _ in asked)), True)
    assert calls == [10 if kind == "loglikelihood" else 5]


@pytest.mark.parametrize("positions", [0, 16])
def test_whole_texts(positions: int) -> None:
    """In one pass; with learned positions, in windows whose first tokens see less."""
    made = language_model(*HYBRID, positions=positions)
    text = "a text of some length, é"
    first, second, nothing = HoldallLM(made).loglikelihood_rolling(
        instances((text,), ("short",), ("",)), disable_tqdm=True
    )
    assert second == pytest.approx(-made.score("short").nats, abs=1e-10)
    assert nothing == 0
    if not positions:
        assert first == pytest.approx(-made.score(text).nats, abs=1e-10)
        return
    ids = [END, *text.encode()]
    total, done = 0.0, 0
    while (
        done < len(ids) - 1
    ):  # each window as long as can be, and what it shares with the last is not scored
        stop = min(done + positions, len(ids) - 1)
        start = max(0, stop - positions)
        with torch.no_grad():
            log_prob_TV = made.model(torch.tensor([ids[start:stop]]))[0][0].log_softmax(-1)
        for at in range(done, stop):
            total += float(log_prob_TV[at - start, ids[at + 1]])
        done = stop
    assert first == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("name", ["prefix-linear-attention", "linformer"])
@torch.no_grad()
def test_a_prompt_that_is_seen_as_a_whole_is(name: str) -> None:
    made = language_model(name)
    asked = [("abcdef", " ab"), ("abcdef", " cde"), ("ab", " x"), ("xy", " yz")]
    got = HoldallLM(made, batch_size=3).loglikelihood(instances(*asked), disable_tqdm=True)
    for (context, continuation), (total, _) in zip(asked, got, strict=True):
        logits_BTV, states = made.model(torch.tensor([[END, *context.encode()]]))
        want = 0.0
        for token in continuation.encode():
            want += float(logits_BTV[0, -1].log_softmax(-1)[token])
            logits_BTV, states = made.model(torch.tensor([[token]]), states)
        assert total == pytest.approx(want, abs=1e-10)


def test_texts_are_generated_up_to_a_stop() -> None:
    made = language_model(*HYBRID, positions=64)
    contexts = ["abc", "a longer one", "b"]
    free = [made.generate(context, max_tokens=12, temperature=0) for context in contexts]
    stop = free[0][4]
    options = {"until": [stop], "max_gen_toks": 12, "do_sample": False}
    got = HoldallLM(made, batch_size=2).generate_until(
        instances(*((context, options) for context in contexts)), disable_tqdm=True
    )
    assert got == [text.partition(stop)[0] for text in free]
    unsaid = {"until": [], "max_gen_toks": 12}  # a task that does not say how tokens are drawn is greedy
    assert HoldallLM(made).generate_until(instances(("abc", unsaid)), disable_tqdm=True) == free[:1]
    for options, says in (
        ({"until": ["a"], "num_beams": 3}, "num_beams"),
        ({"until": ["a"], "typical_p": 0.3}, "typical_p"),
        ({"until": ["a"], "max_gen_toks": 64}, "64 positions"),
    ):
        with pytest.raises(ValueError, match=says):
            HoldallLM(made).generate_until(instances(("abc", options)), disable_tqdm=True)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with three tasks of a few lines each: choices, whole texts, and generation."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"{i} and {i}", "choices": [" two", " three", " four of them"], "label": i % 3}
        for i in range(5)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
    }
    kinds = {
        "local_choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}} is", "doc_to_target": "label",
            "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} it is",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "local_write": {
            "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "a",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 7, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, kind in kinds.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **kind}))  # JSON is YAML
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is asked of a network, and nothing is kept."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def evaluated(model: Any, folder: Path, *names: str) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0
        )
    return found


def test_scores_are_those_of_hflm(tasks: Path, offline: None, tmp_path: Path) -> None:
    """Of whole texts, those of an HFLM that is told to add no token: by default it scores the one that begins
    a text as well, though it puts it there itself."""
    pytest.importorskip("accelerate", reason="HFLM needs accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from lm_eval.models.huggingface import HFLM

        from holdall.adapters import transformers as adapter

        made = language_model(*HYBRID, dtype=torch.float32)
        adapter.export(made, tmp_path / "out")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        other = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
        theirs = evaluated(other, tasks, "local_choice", "local_write")
        other.add_bos_token = False
        texts = evaluated(other, tasks, "local_text")
    theirs["results"] |= texts["results"]
    theirs["samples"] |= texts["samples"]
    own = evaluated(HoldallLM(made, batch_size=4), tasks, *theirs["results"])
    for name, scores in theirs["results"].items():
        for metric, value in scores.items():
            if isinstance(value, float):
                assert own["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
    for name, rows in theirs["samples"].items():
        for row, got in zip(rows, own["samples"][name], strict=True):
            for one, want in zip(got["filtered_resps"], row["filtered_resps"], strict=True):
                same = want if name == "local_write" else pytest.approx(want, rel=1e-5)
                assert one == same, name
    assert len(theirs["samples"]) == 3


def test_the_command_and_the_name(
    tasks: Path, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # the library's own tasks are thousands of files
    manager = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    words = ["holdall", "eval", "--tasks", "local_choice", "--include", str(tasks), "--examples", "3"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "out"), "--device", "cpu"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert "local_choice" in capsys.readouterr().out
        named = lm_eval.simple_evaluate(
            model="holdall", model_args="pretrained=based-mini,device=cpu", tasks=["local_choice"], limit=3,
            task_manager=manager(include_path=str(tasks)), bootstrap_iters=0,
        )  # fmt: skip
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    scores = json.loads(line)
    assert scores["count"] == 3
    assert (scores["metric"], scores["suite"]) == ("acc", "")
    assert scores["value"] == named["results"]["local_choice"]["acc,none"]
