"""The server as its clients see it: OpenAI's own client, lm-eval's requests, and clients that go away."""

import copy
import json
import math
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import holdall
from holdall.engine import Engine, EngineConfig, Request, StateStore, slow
from holdall.language_model import LanguageModel
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig
from holdall.text.tokenizers import Bytes

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs OpenAI's client")
httpx2 = pytest.importorskip("httpx2", reason="needs httpx2")

from running_server import Running, ScriptedEngine, WatchedEngine, running, wait_until  # noqa: E402

from holdall.serve.server import facts  # noqa: E402

SAID = [{"role": "user", "content": "x"}]
ENDLESS = 1 << 19
"""Tokens: more than any test waits for."""


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return holdall.load()


@pytest.fixture(scope="module")
def engine(model: LanguageModel) -> WatchedEngine:
    # fixed: otherwise the bits depend on how many rows run, and once in a while a draw does
    return WatchedEngine(model.model, model.tokenizer, EngineConfig(rows=8, queue=64, fixed=True))


@pytest.fixture(scope="module")
def server(engine: WatchedEngine, model: LanguageModel) -> Iterator[Running]:
    with running(engine, model) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai_client(server) as it:
        yield it


def openai_client(server: Running, retries: int = 0) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=retries)


def post(server: Running, path: str, body: Any, **options: Any) -> Any:
    return httpx2.post(server.url + path, json=body, timeout=60, **options)


def complete(server: Running, **body: Any) -> Any:
    """The body of an answer to a completion, which must be a success."""
    answer = post(server, "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(server: Running, **body: Any) -> str:
    return str(complete(server, **body)["choices"][0]["text"])


# ------------------------------------------------------------------------------------------ OpenAI's client


def test_the_models_are_listed(client: Any, server: Running, model: LanguageModel) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("mini", "model", "holdall")
    facts = listed.holdall
    assert facts["parameters"] == model.model.parameter_count()
    assert facts["state_bytes"] == model.model.state_bytes(1)  # nothing grows
    assert (facts["recurrent"], facts["grows"], facts["context"]) == (True, False, None)
    assert client.models.retrieve("mini").id == "mini"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-9")
    assert refused.value.body["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("mixer", "positions", "grows", "context"),
    [(MambaConfig(width=8), 0, False, None), (MambaConfig(width=8), 30, False, 30),
     (SlidingWindowConfig(width=8, window=9), 0, False, None), (AttentionConfig(width=8), 0, True, 40)],
    ids=["recurrent", "positions", "window", "attention"],
)  # fmt: skip
def test_the_facts_of_a_model(mixer: Any, positions: int, grows: bool, context: int | None) -> None:
    net = ModelConfig(vocab=264, width=8, layers=(mixer,), positions=positions).build()
    model = LanguageModel(net, Bytes())
    room = context if net.needs_room else None
    engine = Engine(net, model.tokenizer, EngineConfig(rows=1, max_context=room))
    found = facts(engine, model, room)
    assert (found["grows"], found["recurrent"], found["context"]) == (grows, not grows, context)
    assert found["state_dtype"] == "float32"


def test_a_completion_is_what_the_model_generates(client: Any, model: LanguageModel) -> None:
    done = client.completions.create(model="mini", prompt="It is a truth", max_tokens=24, temperature=0)
    (choice,) = done.choices
    assert choice.text == model.generate("It is a truth", max_tokens=24, temperature=0)
    assert choice.finish_reason == "length"
    # the end-of-document token stands before the prompt's 13 bytes
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (14, 24, 38)
    seeded = client.completions.create(model="mini", prompt="Mr.", max_tokens=24, temperature=0.8, seed=3)
    assert seeded.choices[0].text == model.generate("Mr.", max_tokens=24, temperature=0.8, seed=3)


def test_a_chat_is_a_transcript_that_the_model_continues(client: Any, model: LanguageModel) -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who is "}, {"type": "text", "text": "Ann?"}]},
    ]
    done = client.chat.completions.create(
        model="mini", messages=said, max_completion_tokens=20, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = done.choices
    prompt = "System: Be brief.\n\nUser: Who is Ann?\n\nAssistant:"
    assert choice.message.role == "assistant"
    assert choice.message.content == model.generate(prompt, max_tokens=20, temperature=0)
    assert done.usage.prompt_tokens == 1 + len(prompt)
    listed = choice.logprobs.content
    assert "".join(token.token for token in listed) == choice.message.content
    for token in listed:  # greedy: each is the likeliest
        assert token.bytes == list(token.token.encode())
        assert len(token.top_logprobs) == 2
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_a_stream_is_the_same_text_in_pieces(client: Any) -> None:
    asked = {"model": "mini", "prompt": "It is", "max_tokens": 20, "temperature": 0.7, "seed": 5}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    *texts, last = chunks
    assert len(texts) > 5
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts][-2:] == [None, "length"]
    assert last.choices == []
    assert last.usage == whole.usage


def test_a_chat_s_stream_says_the_role_first(client: Any) -> None:
    asked = {"model": "mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "seed": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert "".join(c.choices[0].delta.content for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_three_texts_are_three_seeds(client: Any, server: Running) -> None:
    asked = {"model": "mini", "prompt": ["It is", "She was"], "max_tokens": 16, "seed": 7}
    done = client.completions.create(**asked, n=3)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3, 4, 5]
    texts = [choice.text for choice in done.choices]
    assert len(set(texts)) == 6
    assert texts == [choice.text for choice in client.completions.create(**asked, n=3).choices]
    alone = [
        text_of(server, prompt=prompt, max_tokens=16, seed=seed)
        for prompt in asked["prompt"]
        for seed in (7, 8, 9)
    ]
    assert texts == alone
    assert done.usage.prompt_tokens == 6 + 8  # each prompt counts once
    streamed = dict.fromkeys(range(6), "")
    for chunk in client.completions.create(**asked, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == texts


def test_a_stop_string_is_not_part_of_the_text(client: Any) -> None:
    asked = {"model": "mini", "prompt": "It is a truth", "max_tokens": 60, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[7:10]
    before = whole[: whole.index(stop)]
    done = client.completions.create(**asked, stop=["@@", stop]).choices[0]
    assert (done.text, done.finish_reason) == (before, "stop")
    streamed = [c.choices[0].text for c in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(streamed) == before


def test_without_a_seed_texts_differ(server: Running) -> None:
    assert len({text_of(server, prompt="A", max_tokens=40) for _ in range(4)}) == 4


@pytest.mark.full
def test_neighbours_change_nothing(server: Running) -> None:
    """Each of 16 texts that are written at once is what it is alone."""
    asked = [{"prompt": "She" * (i + 1), "max_tokens": 24, "seed": i} for i in range(16)]
    alone = [text_of(server, **body) for body in asked]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda body: text_of(server, **body), asked)) == alone


# ------------------------------------------------------------------------------------------ lm-eval


def test_scores_are_the_model_s(server: Running, model: LanguageModel) -> None:
    """The requests that lm-eval's local-completions makes, and how it reads the answers."""
    end = model.tokenizer.end
    info = httpx2.get(f"{server.url}/tokenizer_info").json()
    token = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert post(server, "/tokenize", token).json()["tokens"] == [end]
    texts = ["It is a truth universally", "Café — naïve", "x"]
    rows = []
    for text in texts:
        ids = post(server, "/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
        assert post(server, "/detokenize", {"tokens": ids}).json() == {"prompt": text}
        rows.append([end, *ids])
    asked = {
        "model": "mini", "prompt": rows, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
        "echo": True,
    }  # fmt: skip
    done = complete(server, **asked)
    assert [choice["index"] for choice in done["choices"]] == [0, 1, 2]
    for row, text, choice in zip(rows, texts, done["choices"], strict=True):
        listed = choice["logprobs"]
        assert {len(values) for values in listed.values()} == {len(row) + 1}
        assert listed["token_logprobs"][0] is listed["top_logprobs"][0] is None
        own = listed["token_logprobs"][1:-1]
        assert own == pytest.approx(model.score(text).log_prob_T.tolist(), abs=1e-4)
        assert choice["text"].startswith(f"{info['eos_token']}{text}")
        places = listed["text_offset"]
        assert places[:2] == [0, len(info["eos_token"])]
        assert places == sorted(places)
        # the new token is greedy, and its float is the largest one
        assert listed["token_logprobs"][-1] == max(listed["top_logprobs"][-1].values())
        for logprob, top in zip(own, listed["top_logprobs"][1:-1], strict=True):
            assert logprob <= max(top.values())
    # max_tokens = 0 only scores
    scored = complete(server, **{**asked, "max_tokens": 0})["choices"]
    for with_token, without in zip(done["choices"], scored, strict=True):
        assert without["logprobs"]["token_logprobs"] == with_token["logprobs"]["token_logprobs"][:-1]


@pytest.mark.parametrize("context", ["It is a truth", ""])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_continuation_s_score_is_the_model_s(
    server: Running, model: LanguageModel, context: str, as_text: bool
) -> None:
    """lm-eval's requests by ids do not begin a document where there is a context; those by text all do."""
    end, text = model.tokenizer.end, f"{context} universally"
    row = [*text.encode()] if context else [end, *text.encode()]
    prompt: Any = post(server, "/detokenize", {"tokens": row}).json()["prompt"] if as_text else row
    asked = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    listed = complete(server, model="mini", prompt=[prompt], **asked)["choices"][0]["logprobs"]
    got = listed["token_logprobs"][len(context.encode()) or 1 : -1]
    assert len(got) == len(" universally")
    read = [end, *text.encode()] if as_text else row
    _, tokens = slow.read_prompt(model.model, Request(prompt=tuple(read), prompt_logprobs=0))
    assert got == pytest.approx([token.logprob for token in tokens[-len(got) :]], abs=1e-4)


def test_a_greedy_continuation_is_called_greedy(server: Running, model: LanguageModel) -> None:
    context = [model.tokenizer.end, *b"It is a truth"]
    written = complete(server, prompt=context, max_tokens=12, temperature=0, logprobs=0)["choices"][0]
    row = [*context, *written["text"].encode()]
    scored = complete(server, prompt=[row], max_tokens=1, temperature=0, logprobs=1, echo=True)
    listed = scored["choices"][0]["logprobs"]
    pairs = zip(listed["token_logprobs"], listed["top_logprobs"], strict=True)
    assert all(own == max(top.values()) for own, top in list(pairs)[len(context) : -1])
    row[-3] = ord("~")
    scored = complete(server, prompt=[row], max_tokens=1, temperature=0, logprobs=1, echo=True)
    listed = scored["choices"][0]["logprobs"]
    assert listed["token_logprobs"][-4] < max(listed["top_logprobs"][-4].values())
    # what was written has the floats that reading it gives, but for the order of sums
    assert written["logprobs"]["token_logprobs"][:9] == pytest.approx(
        listed["token_logprobs"][len(context) : len(context) + 9], abs=1e-4
    )


def test_the_echo_of_a_text_is_scored_from_its_first_token(server: Running, model: LanguageModel) -> None:
    """Before a text stands the end-of-document token, which is not part of it."""
    choice = complete(server, prompt="Ann sees", max_tokens=0, logprobs=3, echo=True)["choices"][0]
    assert choice["text"] == "Ann sees"
    assert choice["logprobs"]["tokens"] == list("Ann sees")
    assert choice["logprobs"]["text_offset"] == list(range(8))
    wanted = model.score("Ann sees").log_prob_T.tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] <= [4] * 8
    for own, token, top in zip(wanted, "Ann sees", choice["logprobs"]["top_logprobs"], strict=True):
        assert top[token] == pytest.approx(own, abs=1e-4)
        assert math.isclose(sum(map(math.exp, top.values())), 1, abs_tol=1)


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": [[1], "a"]}, "prompt", "valid"),
        ({"prompt": [264]}, "prompt", "token 264"),
        ({"prompt": [-1]}, "prompt", "greater"),
        ({"prompt": "a\ud800"}, "prompt", "surrogate"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater"),
        ({"prompt": "a", "max_tokens": 1 << 30}, "max_tokens", "the most is"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "greater"),
        ({"prompt": "a", "temperature": True}, "temperature", "number"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater"),
        ({"prompt": "a", "repetition_penalty": 5e-324}, "repetition_penalty", "greater"),
        ({"prompt": "a", "n": 0}, "n", "greater"),
        ({"prompt": ["a"] * 300, "n": 2}, "prompt", "at most"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "less"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ({"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias", "257 is no token"),
        ({"prompt": "a", "stop_token_ids": [300]}, "stop_token_ids", "300 is no token"),
        ({"prompt": "a", "stop": [1]}, "stop", "string"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"prompt": "a", "session": "../x"}, "session", "name"),
        ({"prompt": "a", "session": "x", "n": 2}, "n", "one text"),
        ({"prompt": ["a", "b"], "session": "x"}, "prompt", "one prompt"),
    ],
)  # fmt: skip
def test_a_bad_request_is_named(server: Running, body: Any, param: str, says: str) -> None:
    as_json = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    answer = httpx2.post(f"{server.url}/v1/completions", **as_json)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"]
    assert server.server.sessions.list() == []  # nothing is left of a session that never began
    assert "x" not in server.server.sessions._entries


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\udc00"}]}, "messages"),
        ({"messages": SAID, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": SAID, "tools": [{}]}, "tools"),
        ({"messages": SAID, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": SAID, "max_completion_tokens": 1 << 30}, "max_completion_tokens"),
    ],
)  # fmt: skip
def test_a_bad_chat_is_named(server: Running, body: Any, param: str) -> None:
    as_json = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", **as_json)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_openai_s_client_sees_the_field(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="mini", prompt="a", temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="other", prompt="a")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "application/json", 400),
        (b'"prompt"', "application/json", 400),
        (b"null", "application/json", 400),
        (b"\xff\xfe\x00", "application/json", 400),
        (b"", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "", 415),
    ],
)
def test_a_body_that_is_no_json(server: Running, content: bytes, kind: str, status: int) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = httpx2.post(f"{server.url}/v1/completions", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_clients_send_beside_is_ignored(server: Running) -> None:
    others = {
        "user": "me",
        "store": True,
        "metadata": {"a": 1},
        "best_of": 1,
        "suffix": None,
        "service_tier": "x",
    }
    assert len(text_of(server, prompt="It", max_tokens=3, top_k=-1, stop=None, **others)) == 3


def test_keys_and_sizes(model: LanguageModel) -> None:
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=1))
    with running(engine, model, api_key="sésame", body=2000, prompt_tokens=100) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert httpx2.get(f"{server.url}/metrics").status_code == 200
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sésame".encode()}):
            answer = httpx2.get(f"{server.url}/v1/models", headers=given)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert post(server, "/v1/completions", {"prompt": "a"}, headers=given).status_code == 401
        key = {"Authorization": "Bearer sésame".encode()}
        assert httpx2.get(f"{server.url}/v1/models", headers=key).status_code == 200
        assert post(server, "/v1/completions", {"prompt": "a" * 3000}, headers=key).status_code == 413
        chunks = {"content": iter([b'{"prompt": "', b"a" * 3000, b'"}'])}  # of no known length
        json_key = {**key, "Content-Type": "application/json"}
        assert httpx2.post(f"{server.url}/v1/completions", **chunks, headers=json_key).status_code == 413
        answer = post(server, "/v1/completions", {"prompt": "a" * 100}, headers=key)
        assert answer.json()["error"]["message"] == "prompt has 101 tokens, and the most is 100"


# ------------------------------------------------------------------------------------------ load


def test_a_full_queue_is_503_and_the_client_comes_again(model: LanguageModel) -> None:
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=1, queue=1))
    body = {"prompt": "a", "max_tokens": ENDLESS, "temperature": 0, "ignore_eos": True}
    freed = threading.Event()
    with running(engine, model) as server, ThreadPoolExecutor(3) as pool:
        loop = server.server.loop
        for waiting in (0, 1):
            pool.submit(_abandon, server, body, until=freed.is_set)
            wait_until(lambda waiting=waiting: loop.stats[:3] == (1, 0, waiting))
        answer = post(server, "/v1/completions", {"prompt": "a"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["error"]["code"] == "queue_full"
        # several prompts are taken together or not at all
        assert post(server, "/v1/completions", {"prompt": ["a", "b"]}).status_code == 503
        with openai_client(server, retries=5) as client:
            later = pool.submit(client.completions.create, model="mini", prompt="a", max_tokens=2)
            wait_until(lambda: _metric(server, "admission_rejections_total") >= 3)
            freed.set()
            assert later.result(timeout=60).usage.completion_tokens == 2


def _metric(server: Running, name: str, more: str = "") -> float:
    lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"vllm:{name}{{") and more in line]
    return float(line.rpartition(" ")[2])


def _abandon(server: Running, body: Any, *, until: Any = None) -> None:
    """Ask for a completion and close the connection: at the first bytes of the answer, or at a time."""
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if until is None:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            wait_until(until)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.full)])
def test_a_client_that_goes_away_frees_its_row(server: Running, engine: WatchedEngine, count: int) -> None:
    """Within two steps, streaming or not, reading or waiting; and nothing is left of it."""
    loop, before = server.server.loop, len(engine.late)
    aborted = _metric(server, "request_success_total", 'finished_reason="abort"')
    threads = threading.active_count()

    def one(i: int) -> None:
        body = {"prompt": "a" * (1 + i % 700), "max_tokens": ENDLESS, "ignore_eos": True, "n": 1 + i % 3}
        if i % 2:
            _abandon(server, {**body, "stream": True})
        else:
            seen = loop.stats.steps
            _abandon(server, body, until=lambda: loop.stats.steps > seen)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(count)))
    wait_until(lambda: len(engine.late) - before == count)
    assert max(engine.late) <= 2
    wait_until(lambda: loop.stats[:3] == (0, 0, 0))  # nothing runs, is read or waits
    assert not engine.busy
    assert loop._streams == server.server.metrics._texts == server.server.metrics._last == {}
    texts = sum(1 + i % 3 for i in range(count))
    assert _metric(server, "request_success_total", 'finished_reason="abort"') - aborted == texts
    assert threading.active_count() <= threads + 32  # the event loop's pool has so many at most
    assert text_of(server, prompt="It", max_tokens=2) != ""


def test_metrics_count_what_was_done(model: LanguageModel) -> None:
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=4))
    with running(engine, model) as server:
        complete(server, prompt="It is", max_tokens=10, n=2, ignore_eos=True)
        complete(server, prompt=[1, 2, 3], max_tokens=0)
        lines = httpx2.get(f"{server.url}/metrics").text
        for name, wanted in {
            "prompt_tokens_total": 9, "generation_tokens_total": 20, "num_requests_running": 0,
            "num_requests_waiting": 0, "kv_cache_usage_perc": 0, "time_to_first_token_seconds_count": 2,
            "inter_token_latency_seconds_count": 18, "e2e_request_latency_seconds_count": 3,
            "request_time_per_output_token_seconds_count": 2, "prefix_cache_queries_total": 9,
        }.items():  # fmt: skip
            assert _metric(server, name) == wanted, lines
        assert _metric(server, "request_success_total", 'finished_reason="length"') == 3
        assert f'holdall:state_bytes{{model_name="mini"}} {engine.stats().state_bytes:.1f}' in lines


def test_drafts_change_no_answer_and_are_counted(model: LanguageModel) -> None:
    answers, able = [], model.with_replay(9)
    wide = copy.deepcopy(able.model).double()  # no two tokens tie to within rounding
    for drafts in (0, 4):
        with running(Engine(wide, able.tokenizer, EngineConfig(rows=4, drafts=drafts)), able) as server:
            asked = {"prompt": "One and one and one and", "max_tokens": 40, "ignore_eos": True, "logprobs": 1}
            found = [complete(server, temperature=heat, seed=1, n=2, **asked) for heat in (0.0, 0.7)]
            answers.append([(c["text"], c["logprobs"]["tokens"]) for each in found for c in each["choices"]])
            guessed, right = (
                _metric(server, f"spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
            )
            assert guessed > right > 0 if drafts else guessed == right == 0
            assert _metric(server, "generation_tokens_total") == 160
    assert answers[0] == answers[1]


# ------------------------------------------------------------------------------------------ the engine's end


def test_whole_characters_come_through_the_stream(model: LanguageModel) -> None:
    says = "日本語 🙂👩‍👩‍👧 café"
    end = model.tokenizer.end
    scripted = ScriptedEngine(model.tokenizer, [*says.encode(), end])
    with running(scripted, model) as server, openai_client(server) as client:
        asked = {"model": "mini", "messages": [{"role": "user", "content": "🙂"}]}
        pieces = [
            chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == says
        assert not any("\ufffd" in piece for piece in pieces)
        assert client.chat.completions.create(**asked).choices[0].message.content == says
    broken = b"a\xf0\x9f\x99b\xff"
    with running(ScriptedEngine(model.tokenizer, [*broken, end]), model) as server:
        whole = text_of(server, prompt="a")
        assert whole == broken.decode(errors="replace")
        body = {"prompt": "a", "stream": True}
        lines = post(server, "/v1/completions", body).text.split("\n\n")
        texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
        assert "".join(texts) == whole


def test_an_engine_that_fails_ends_all_requests_and_says_so(
    model: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    scripted = ScriptedEngine(model.tokenizer, [97] * 1000, fails_at=40)
    with running(scripted, model) as server:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        asked = {"prompt": "a", "max_tokens": 900}
        with ThreadPoolExecutor(2) as pool:
            streams = pool.submit(post, server, "/v1/completions", {**asked, "stream": True})
            whole = post(server, "/v1/completions", {**asked, "session": "s"})
        error = whole.json()["error"]
        assert (whole.status_code, error["code"], error["type"]) == (500, "engine_failed", "server_error")
        assert "a wire is loose" in error["message"]
        streamed = streams.result()
        if streamed.status_code == 200:  # it began before the failure
            *_, last, done = streamed.text.strip().split("\n\n")
            assert "a wire is loose" in json.loads(last.removeprefix("data: "))["error"]["message"]
            assert done == "data: [DONE]"
        health = httpx2.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "a wire is loose" in health.json()["error"]["message"]
        assert post(server, "/v1/completions", asked).status_code == 500
        assert not server.server.sessions._entries  # the session that never began
    assert "The engine failed" in caplog.text
    assert "a wire is loose" in caplog.text


def test_openai_s_client_raises_what_comes_midway(model: LanguageModel) -> None:
    scripted = ScriptedEngine(model.tokenizer, [97] * 1000, fails_at=20)
    with running(scripted, model) as server, openai_client(server) as client:
        stream = client.completions.create(model="mini", prompt="a", max_tokens=900, stream=True)
        with pytest.raises(openai.APIError, match="a wire is loose"):
            list(stream)


def test_the_page_is_served(server: Running) -> None:
    page = Path(holdall.__file__).parent / "serve" / "page.html"
    answer = httpx2.get(server.url)
    if page.exists():
        assert answer.text == page.read_text("utf-8")
        assert answer.headers["Content-Type"].startswith("text/html")
    else:
        assert answer.json()["api"] == "/openapi.json"
    assert httpx2.get(f"{server.url}/version").json() == {"version": holdall.__version__}
    assert httpx2.get(f"{server.url}/nothing").json()["error"]["type"] == "invalid_request_error"


# ------------------------------------------------------------------------------------------------ the store


@pytest.mark.parametrize("strips", [False, True], ids=["whole", "stripped"])
def test_a_chat_by_whole_histories_reads_what_is_new(model: LanguageModel, strips: bool) -> None:
    """Clients send all turns again, perhaps without the beginning of an answer."""
    store = StateStore(fingerprint=model.fingerprint, model=model.model)
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=2), store=store)
    with running(engine, model) as server, openai_client(server) as client:
        said, before, cached = list[Any](), 0, 0
        for turn in range(10):
            said.append({"role": "user", "content": f"And then, {turn}?"})
            done = client.chat.completions.create(model="mini", messages=said, max_tokens=20, seed=turn)
            usage, answer = done.usage, done.choices[0].message.content
            cached += usage.prompt_tokens_details.cached_tokens
            if turn:
                assert usage.prompt_tokens_details.cached_tokens >= before
            # an answer is found again if it comes back as it was, with the space that it began with
            found = not strips and answer[:1].isspace() and "\ufffd" not in answer
            before = usage.prompt_tokens + usage.completion_tokens * found
            said.append({"role": "assistant", "content": answer[5 * strips :]})
        assert _metric(server, "prompt_tokens_cached_total") == cached > 0
