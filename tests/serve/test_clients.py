"""What clients send, word for word: docs/serving.md says which they are and how to use them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import holdall
from holdall.engine import EngineConfig
from holdall.language_model import LanguageModel

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
httpx2 = pytest.importorskip("httpx2", reason="needs httpx2")

from running_server import Running, running  # noqa: E402

Body = dict[str, Any]
MODEL = {"model": "based-mini"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = "Who is Ann?"
SAID = [{"role": "user", "content": ASKED}]
LIMIT = {"max_tokens": 8, "temperature": 0}
USAGE = {"stream_options": {"include_usage": True}}
DEFAULTS = {
    "frequency_penalty": 0, "logprobs": None, "n": 1, "presence_penalty": 0, "seed": None, "top_p": 1,
}  # fmt: skip
"""What LangChain's OpenAI says where nothing is said."""
LANGCHAIN = {**MODEL, "max_completion_tokens": 8, "temperature": 0.0, "messages": SAID}

CHATS: dict[str, Body] = {
    "langchain ChatOpenAI.invoke": {**LANGCHAIN, "stream": False},
    "langchain ChatOpenAI.invoke, logprobs": {**LANGCHAIN, "stream": False, "logprobs": True},
    "langchain ChatOpenAI.stream": {**LANGCHAIN, "stream": True},
    "langchain ChatOpenAI.stream, usage": {**LANGCHAIN, "stream": True, **USAGE},
    "litellm.completion": {**MODEL, **LIMIT, "messages": SAID},
    "litellm.completion, stream": {**MODEL, **LIMIT, "messages": SAID, "stream": True, **USAGE},
    "llm": {**MODEL, **LIMIT, "messages": SAID, "stream": True, **USAGE},
    "llm --no-stream": {**MODEL, **LIMIT, "messages": SAID, "stream": False},
}
TEXTS: dict[str, Body] = {
    "langchain OpenAI.invoke": {**MODEL, **LIMIT, **DEFAULTS, "prompt": [ASKED]},
    "langchain OpenAI.generate": {**MODEL, **LIMIT, **DEFAULTS, "prompt": [ASKED, "It is", "He"] * 6},
    "langchain OpenAI.stream": {**MODEL, **LIMIT, **DEFAULTS, "prompt": ASKED, "stream": True},
    "langchain OpenAI, best_of": {**MODEL, **LIMIT, **DEFAULTS, "prompt": [ASKED], "best_of": 2, "n": 2},
    "litellm.text_completion": {**MODEL, **LIMIT, "prompt": ASKED},
    "llm, completion: true": {**MODEL, **LIMIT, "prompt": ASKED, "stream": True, **USAGE},
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return holdall.load()


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Running]:
    with running(model.engine(EngineConfig(rows=20)), model, name="based-mini") as it:
        yield it


@pytest.fixture(scope="module")
def written(model: LanguageModel) -> Callable[[str], str]:
    """How the model continues a text, by itself."""
    return functools.cache(lambda prompt: model.generate(prompt, **LIMIT))


def answer(server: Running, path: str, body: Body) -> tuple[list[str], Body | None]:
    """The texts of an answer, whole or from a stream, and its usage."""
    got = httpx2.post(server.url + path, json=body, timeout=60)
    assert got.status_code == 200, got.text
    if not body.get("stream"):
        choices = got.json()["choices"]
        return [c["message"]["content"] if path == CHAT else c["text"] for c in choices], got.json()["usage"]
    *events, done = got.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(part["delta"]["content"] if path == CHAT else part["text"] for part in parts)
    return [text], chunks[-1].get("usage")


@pytest.mark.parametrize("body", CHATS.values(), ids=CHATS)
def test_chats(server: Running, written: Callable[[str], str], body: Body) -> None:
    prompt = f"User: {ASKED}\n\nAssistant:"
    texts, usage = answer(server, CHAT, body)
    assert texts == [written(prompt)]
    assert (usage is None) == (body.get("stream", False) and "stream_options" not in body)
    assert usage is None or usage["total_tokens"] == 1 + len(prompt) + 8


@pytest.mark.parametrize("body", TEXTS.values(), ids=TEXTS)
def test_texts(server: Running, written: Callable[[str], str], body: Body) -> None:
    prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
    texts, usage = answer(server, TEXT, body)
    assert texts == [written(prompt) for prompt in prompts for _ in range(body.get("n", 1))]
    assert (usage is None) == (body.get("stream", False) and "stream_options" not in body)


def test_a_conversation_of_llm_s_goes_on(server: Running, written: Callable[[str], str]) -> None:
    """`llm -c` sends what it was answered, white space and all."""
    first = answer(server, CHAT, CHATS["llm"])[0][0]
    said = [*SAID, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    texts, _ = answer(server, CHAT, {**CHATS["llm"], "messages": said})
    space = "" if first[:1].isspace() else " "
    history = f"User: {ASKED}\n\nAssistant:{space}{first}\n\nUser: And then?\n\nAssistant:"
    assert texts == [written(history)]


def test_a_request_for_json_is_refused_by_its_field(server: Running) -> None:
    """LangChain's with_structured_output."""
    schema = {"name": "x", "strict": False, "schema": {"type": "object", "properties": {}}}
    wants = {"response_format": {"type": "json_schema", "json_schema": schema}}
    got = httpx2.post(server.url + CHAT, json={**LANGCHAIN, "stream": False, **wants})
    assert (got.status_code, got.json()["error"]["param"]) == (400, "response_format")
