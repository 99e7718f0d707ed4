"""What `holdall eval` takes as a model: each kind answers both kinds of question, with the same numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from holdall import mixers
from holdall.language_model import LanguageModel
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from holdall.evals.models import open_model
from holdall.evals.run import Subject
from holdall.files import RunError

WIDTH = 16
GREEDY = {"until": ["e"], "max_gen_toks": 7, "do_sample": False}
CONTEXTS = ["The cat", "It is a truth universally", "", "The cat sat "]
TOKENS = ("100", "200", "512", "1024", "2048")
"""Where states are counted, for a window of 100."""
PAIRS = [(context, f" {word}") for context in CONTEXTS for word in ("sat", "on the mat", "é")]


def made(name: str = "taylor", **options: Any) -> LanguageModel:
    layers = tuple(mixers.entry(one).configure(width=WIDTH) for one in ("base-conv", name))
    with seeded(0):
        model = ModelConfig(vocab=264, width=WIDTH, layers=layers, mlp=24, **options).build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return LanguageModel(model.eval(), Bytes())


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def scores(model: Subject, batch: int = 4) -> list[tuple[float, bool]]:
    return list(model.make(batch).loglikelihood(asked(*PAIRS), disable_tqdm=True))


def texts(model: Subject, batch: int = 4) -> list[str]:
    wanted = asked(*((context, GREEDY) for context in filter(None, CONTEXTS)))
    return list(model.make(batch).generate_until(wanted, disable_tqdm=True))


def rolling(model: Subject, batch: int = 4) -> list[float]:
    wanted = asked(("a whole text, é",), ("short",))
    return list(model.make(batch).loglikelihood_rolling(wanted, disable_tqdm=True))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made().save(tmp_path / "models" / "mine")
    return tmp_path / "models" / "mine"


def test_a_folder_of_our_own_and_what_is_known_of_it(saved: Path) -> None:
    model, want = open_model(str(saved)), made()
    about = model.about(window=100)
    assert json.loads(json.dumps(about)) == about
    assert (about["name"], about["kind"]) == ("mine", "holdall")
    assert about["source"] == str(saved)
    assert about["parameters"] == want.model.parameter_count()
    assert about["state_bytes"] == dict.fromkeys(TOKENS, want.model.state_bytes(64))
    assert about["fingerprint"] == want.fingerprint
    assert about["tokenizer"] == "bytes"
    ids = model.codec.encode("é!")
    assert ids == list("é!".encode())
    assert model.codec.decode(ids) == "é!"
    with pytest.raises(RunError, match=r"no_such"):
        open_model("no_such")


def test_states_that_grow_are_counted_as_far_as_the_model_reads(tmp_path: Path) -> None:
    want = made("attention", positions=600)
    want.save(tmp_path / "grows")
    counted = open_model(str(tmp_path / "grows")).about(window=256)["state_bytes"]
    assert counted == {
        **{str(tokens): want.model.state_bytes(tokens) for tokens in (256, 512)},
        "1024": None, "2048": None,
    }  # fmt: skip
    assert want.model.state_bytes(512) > want.model.state_bytes(256)


# ------------------------------------------------------------------------------------ another program's


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama in the layout of the transformers library, with bytes for tokens."""
    pytest.importorskip("accelerate", reason="HFLM needs accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        config = transformers.LlamaConfig(
            vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=256, eos_token_id=256,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_bytes(Bytes().to_json())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(about))
    return tmp_path / "llama"


def test_a_folder_of_transformers_is_run_by_holdall_where_it_can_be(llama: Path) -> None:
    model = open_model(str(llama))
    about = model.about(window=100)
    assert (about["name"], about["kind"], model.note) == ("llama", "foreign", "")
    assert about["state_bytes"]["1024"] > about["state_bytes"]["512"] > 0
    assert len(scores(model)) == len(PAIRS)


def test_and_else_by_the_library(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder by both: where no context begins a document, they give the same scores."""
    from holdall.adapters import foreign

    own = open_model(str(llama))
    monkeypatch.delitem(foreign.FAMILIES, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = open_model(str(llama))
        assert other.kind == "transformers"
        assert "model_type = 'llama'" in other.note
        about = other.about(window=100)
        assert about["parameters"] == own.about(window=100)["parameters"]
        assert set(about["state_bytes"].values()) == {None}
        assert about["fingerprint"]
        plain = asked(("", " sat"), ("", " on the mat"))  # a context would begin a document in one alone
        got, want = (model.make(2).loglikelihood(plain, disable_tqdm=True) for model in (other, own))
    assert [score for score, _ in got] == pytest.approx([score for score, _ in want], abs=1e-4)
    monkeypatch.setattr("holdall.evals.models.needed", _without("accelerate"))
    with pytest.raises(RunError, match=r"model_type = 'llama'.*pip install transformers accelerate"):
        open_model(str(llama))


def _without(package: str) -> Any:
    from holdall.text import sources
    from holdall.text.files import TextError

    def needed(module: str) -> Any:
        if module == package:
            raise TextError(f"this needs the package {module}")
        return sources.needed(module)

    return needed


# ------------------------------------------------------------------------------------------ a server


@pytest.fixture
def served() -> Iterator[tuple[str, LanguageModel]]:
    """A server of a model, on a local port."""
    for module in ("fastapi", "uvicorn", "aiohttp", "tenacity"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    from running_server import running

    from holdall.engine import EngineConfig

    model = made()
    with running(model.engine(EngineConfig(rows=4)), model) as server:
        yield server.url, model


@pytest.mark.parametrize("end", ["", "/v1", "/v1/completions", "/#mini"])
def test_addresses_of_a_server(served: tuple[str, LanguageModel], end: str) -> None:
    url, want = served
    model = open_model(url + end)
    about = model.about(window=100)
    assert (about["name"], about["kind"], about["source"]) == ("mini", "server", url + end)
    assert about["parameters"] == want.model.parameter_count()
    assert set(about["state_bytes"].values()) == {want.model.state_bytes(64)}
    assert model.codec.decode(model.codec.encode("é!")) == "é!"


@pytest.mark.parametrize("batch", [1, 5])
def test_a_server_gives_the_scores_of_the_model(
    served: tuple[str, LanguageModel], batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, model = served
    model.save(tmp_path / "here")
    got, want = open_model(url), open_model(str(tmp_path / "here"))
    for (one, greedy), (other, likeliest) in zip(scores(got, batch), scores(want), strict=True):
        assert abs(one - other) < 1e-4
        assert greedy == likeliest
    assert len({round(score, 3) for score, _ in scores(want)}) == len(PAIRS)
    assert rolling(got, batch) == pytest.approx(rolling(want), abs=1e-4)
    assert texts(got, batch) == texts(want)
    assert "Requesting" not in capsys.readouterr().err  # no bar where none is wanted


def test_what_is_wrong_with_a_server_is_said(
    served: tuple[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = served
    with pytest.raises(RunError, match=r"serves no 'other', only mini"):
        open_model(f"{url}#other")
    with pytest.raises(ValueError, match="serves one model"):
        open_model(url, checkpoint="best")
    with pytest.raises(RunError, match=r"is the server up\? \(Connection refused\)$"):
        open_model("http://127.0.0.1:9")
    with pytest.raises(
        RunError, match=r"elsewhere has no /v1/models: is it a server of OpenAI's completions\?"
    ):
        open_model(f"{url}/elsewhere")
    model = open_model(url)
    from holdall.evals.served import ServedLM

    call = ServedLM.model_call

    def without_scores(self: ServedLM, *messages: Any, **options: Any) -> Any:
        answer = call(self, *messages, **options)
        return {"choices": [{**choice, "logprobs": None} for choice in answer["choices"]]}

    monkeypatch.setattr(ServedLM, "model_call", without_scores)
    with pytest.raises(RunError, match="gives no log-probabilities of a prompt"):
        scores(model)
    assert all(texts(model))
