"""Named sessions over HTTP: resumed, saved, moved, refused; and what a restart leaves."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors import safe_open

import holdall
from holdall import checkpoints
from holdall.engine.fast import Engine, EngineConfig
from holdall.language_model import LanguageModel
from holdall.model import seeded

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
httpx2 = pytest.importorskip("httpx2", reason="needs httpx2")

from running_server import Running, running, wait_until  # noqa: E402


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return holdall.load()


def engine_of(model: LanguageModel) -> Engine:
    return Engine(model.model, model.tokenizer, EngineConfig(rows=4))


@pytest.fixture(scope="module")
def server(model: LanguageModel) -> Iterator[Running]:
    with running(engine_of(model), model) as it:
        yield it


def post(server: Running, **body: Any) -> Any:
    return httpx2.post(f"{server.url}/v1/completions", json={"temperature": 0, **body}, timeout=60)


def write(server: Running, **body: Any) -> str:
    answer = post(server, **body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def names(server: Running) -> list[str]:
    return [listed["name"] for listed in httpx2.get(f"{server.url}/v1/sessions").json()["data"]]


def test_a_session_goes_on_where_it_stopped(server: Running, model: LanguageModel) -> None:
    whole = model.generate("It is a truth", max_tokens=60, temperature=0)
    first = write(server, prompt="It is a truth", max_tokens=20, session="s")
    second = post(server, prompt="", max_tokens=15, session="s").json()
    streamed = post(server, prompt=[], max_tokens=1, session="s")
    assert streamed.status_code == 400  # a list of no prompts
    third = write(server, prompt=whole[35:40], max_tokens=20, session="s")
    assert first + second["choices"][0]["text"] + whole[35:40] + third == whole
    # what was read before is not read again, and nothing stands before the prompt
    assert second["usage"]["prompt_tokens"] == 14 + 20
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 34}
    (listed,) = httpx2.get(f"{server.url}/v1/sessions").json()["data"]
    assert (listed["name"], listed["tokens"]) == ("s", 14 + 60)
    assert listed["bytes"] == model.model.state_bytes(1) + 4 * model.config.vocab
    assert httpx2.delete(f"{server.url}/v1/sessions/s").json() == {"name": "s", "deleted": True}
    assert names(server) == []
    assert write(server, prompt="It is a truth", max_tokens=20, session="s") == first
    httpx2.delete(f"{server.url}/v1/sessions/s")


def test_a_stream_and_a_chat_leave_sessions_too(server: Running, model: LanguageModel) -> None:
    post(server, prompt="Mr. Darcy", max_tokens=8, session="a.b", stream=True)
    wait_until(lambda: names(server) == ["a.b"])
    said = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 8,
        "temperature": 0,
        "session": "c",
    }
    url = f"{server.url}/v1/chat/completions"
    first = httpx2.post(url, json=said).json()
    assert first["usage"]["prompt_tokens"] == 1 + len("User: Hi\n\nAssistant:")
    second = httpx2.post(url, json=said).json()
    assert second["usage"]["prompt_tokens"] == 2 * len("User: Hi\n\nAssistant:") + 1 + 8
    assert names(server) == ["a.b", "c"]
    for name in ("a.b", "c"):
        httpx2.delete(f"{server.url}/v1/sessions/{name}")


def test_a_file_moves_a_session_to_another_server(server: Running, model: LanguageModel) -> None:
    write(server, prompt="It is a truth", max_tokens=30, session="old")
    file = httpx2.get(f"{server.url}/v1/sessions/old")
    assert "old.safetensors" in file.headers["Content-Disposition"]
    wanted = write(server, prompt=" and", max_tokens=30, session="old")
    with running(engine_of(holdall.load()), holdall.load()) as other:
        put = httpx2.put(f"{other.url}/v1/sessions/new", content=file.content)
        assert put.json() == {"name": "new", "tokens": 44, "bytes": put.json()["bytes"]}
        assert write(other, prompt=" and", max_tokens=30, session="new") == wanted
    httpx2.delete(f"{server.url}/v1/sessions/old")


def test_a_restart_finds_the_sessions(model: LanguageModel, tmp_path: Path) -> None:
    whole = model.generate("She was", max_tokens=60, temperature=0)
    (tmp_path / "not one.txt").write_text("x")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    options: dict[str, Any] = {"sessions": str(tmp_path)}
    with running(engine_of(model), model, **options) as server:
        assert write(server, prompt="She was", max_tokens=20, session="s") == whole[:20]
        # a session that was not asked for since is in its file only, if memory is too small
        server.server.sessions.memory = 1
        write(server, prompt="x", max_tokens=1, session="other")
        wait_until(lambda: server.server.sessions._entries["s"].session is None)
        assert write(server, prompt="", max_tokens=20, session="s") == whole[20:40]
    assert (tmp_path / "broken.safetensors").read_bytes() == b"x" * 100
    with running(engine_of(model), model, **options) as server:
        listed = httpx2.get(f"{server.url}/v1/sessions").json()["data"]
        assert [(one["name"], one["tokens"]) for one in listed] == [("other", 3), ("s", 48)]
        assert httpx2.get(f"{server.url}/v1/sessions/s").content == (tmp_path / "s.safetensors").read_bytes()
        assert write(server, prompt="", max_tokens=20, session="s") == whole[40:]
        httpx2.delete(f"{server.url}/v1/sessions/other")
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "broken.safetensors",
        "s.safetensors",
    ]


def test_without_a_folder_a_new_session_needs_memory(model: LanguageModel) -> None:
    with running(engine_of(model), model, session_memory=1) as server:
        write(server, prompt="a", max_tokens=1, session="one")
        refused = post(server, prompt="a", max_tokens=1, session="two")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "sessions_full")
        write(server, prompt="a", max_tokens=1, session="one")
        httpx2.delete(f"{server.url}/v1/sessions/one")
        write(server, prompt="a", max_tokens=1, session="two")


def test_a_session_has_one_request_at_a_time(server: Running) -> None:
    url = f"{server.url}/v1/sessions/busy"
    body = {"prompt": "a", "max_tokens": 1 << 19, "ignore_eos": True, "session": "busy", "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()  # which closes the stream when nobody has it
        next(lines)
        for answer in (
            post(server, prompt="b", session="busy"),
            httpx2.get(url),
            httpx2.delete(url),
            httpx2.put(url, content=file_of(server)),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "session_in_use")
        assert post(server, prompt="b", max_tokens=1).status_code == 200
    wait_until(lambda: post(server, prompt="b", session="busy", max_tokens=1).status_code == 200)
    httpx2.delete(url)


def test_a_session_goes_on_where_its_client_stopped_it(server: Running, model: LanguageModel) -> None:
    body = {
        "prompt": "It is a truth",
        "max_tokens": 1 << 19,
        "temperature": 0,
        "session": "cut",
        "stream": True,
    }
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        for _ in range(9):
            next(lines)
    wait_until(lambda: names(server) == ["cut"])
    (listed,) = httpx2.get(f"{server.url}/v1/sessions").json()["data"]
    written = listed["tokens"] - 14
    assert written >= 4
    whole = model.generate("It is a truth", max_tokens=written + 10, temperature=0)
    assert write(server, prompt="", max_tokens=10, session="cut") == whole[written : written + 10]
    httpx2.delete(f"{server.url}/v1/sessions/cut")


def file_of(server: Running) -> bytes:
    write(server, prompt="It is", max_tokens=1, session="file")
    content = httpx2.get(f"{server.url}/v1/sessions/file").content
    httpx2.delete(f"{server.url}/v1/sessions/file")
    return bytes(content)


@pytest.mark.parametrize(
    "name", [".", "..", ".hidden", "a b", "a" * 101, "a%00b", "-x", "naïve", "%0A", "a%5Cb"]
)
def test_a_name_is_one_safe_path_component(server: Running, name: str) -> None:
    content = file_of(server)  # there is nothing else to refuse
    for method in ("GET", "PUT", "DELETE"):
        url = f"{server.url}/v1/sessions/{name.replace('.', '%2E')}"
        answer = httpx2.request(method, url, content=content if method == "PUT" else None)
        error = answer.json()["error"]  # 404 is of the router, which sees a path of other parts
        assert (answer.status_code, error["code"]) in ((400, "bad_session_name"), (404, None)), answer.text
    plain = unquote(name)
    answer = post(server, prompt="a", session=plain)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_session_name")
    assert names(server) == []


def test_another_model_s_file_is_refused_by_both_names(server: Running, model: LanguageModel) -> None:
    with seeded(5):
        stranger = LanguageModel(model.config.build(), model.tokenizer)
    with running(engine_of(stranger), stranger) as other:
        theirs = file_of(other)
    answer = httpx2.put(f"{server.url}/v1/sessions/x", content=theirs)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "bad_session_file")
    assert model.fingerprint in error["message"]
    assert stranger.fingerprint in error["message"]
    assert "/" not in error["message"]  # nothing of the server's folders


def forged(content: bytes, path: Path, **changes: Any) -> bytes:
    """A session's file with other tensors, or another past or header."""
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        about, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    past = json.loads(about["past"])
    about.pop("crc32")
    for name, value in changes.items():
        if name in past:
            about["past"] = json.dumps({**json.loads(about["past"]), name: value})
        elif name == "beside.logits_V" or isinstance(value, torch.Tensor):
            tensors[name] = value
        elif value is None:
            del about[name]
        else:
            about[name] = value
    checkpoints.write(path, tensors, about)  # with checksums of its own
    return path.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"count": -1},
        {"count": 1 << 40},
        {"count": "many"},
        {"tail": [1]},
        {"tail": [1e300] * 7},
        {"recent": [100_000]},
        {"recent": []},
        {"grid": "00" * 16},
        {"grid": "zz"},
        {"past": "[]"},
        {"past": "{"},
        {"past": None},
        {"model_fingerprint": None},
        {"format": "holdall-state-9"},
        {"beside.logits_V": torch.zeros(5)},
        {"beside.logits_V": torch.zeros(264, dtype=torch.float16)},
        {"0.X.y": torch.zeros(1)},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_forged_file_is_refused(server: Running, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The engine goes on for everybody else."""
    content = file_of(server)
    fine = httpx2.put(f"{server.url}/v1/sessions/f", content=forged(content, tmp_path / "fine"))
    assert fine.status_code == 200
    httpx2.delete(f"{server.url}/v1/sessions/f")
    answer = httpx2.put(
        f"{server.url}/v1/sessions/f", content=forged(content, tmp_path / "forged", **changes)
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_session_file"), answer.text
    assert names(server) == []
    assert write(server, prompt="a", max_tokens=1) != ""


def test_states_of_another_number_of_rows_are_refused(server: Running, tmp_path: Path) -> None:
    path = tmp_path / "two"
    path.write_bytes(file_of(server))
    with safe_open(path, "pt") as file:
        about, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about.pop("crc32")
    two = {name: t if name.startswith("beside.") else torch.cat((t, t)) for name, t in tensors.items()}
    checkpoints.write(path, two, about)
    answer = httpx2.put(f"{server.url}/v1/sessions/f", content=path.read_bytes())
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_session_file")
    path.write_bytes(file_of(server)[:-50])
    assert httpx2.put(f"{server.url}/v1/sessions/f", content=path.read_bytes()).status_code == 400


def test_states_that_are_not_finite_end_one_request(server: Running, tmp_path: Path) -> None:
    nan = forged(file_of(server), tmp_path / "nan", **{"beside.logits_V": torch.full((264,), float("nan"))})
    assert httpx2.put(f"{server.url}/v1/sessions/nan", content=nan).status_code == 200
    answer = post(server, prompt="", session="nan")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_finite")
    assert write(server, prompt="a", max_tokens=1) != ""
    httpx2.delete(f"{server.url}/v1/sessions/nan")


def test_what_runs_at_the_end_is_told_and_sessions_are_written(model: LanguageModel, tmp_path: Path) -> None:
    body = {"prompt": "a", "max_tokens": 1 << 19, "ignore_eos": True}
    options: dict[str, Any] = {"grace": 0, "sessions": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool, running(engine_of(model), model, **options) as server:
        write(server, prompt="a", max_tokens=3, session="s")
        whole = pool.submit(post, server, **body)
        stream = pool.submit(post, server, **body, stream=True)
        wait_until(lambda: server.server.loop.stats.running == 2)
    answer = whole.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
    *_, last, done = stream.result().text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert done == "data: [DONE]"
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
    assert not server.server.loop.alive


def test_what_runs_at_the_end_has_time(model: LanguageModel) -> None:
    with ThreadPoolExecutor(1) as pool, running(engine_of(model), model, grace=60) as server:
        short = pool.submit(post, server, prompt="a", max_tokens=200)
        wait_until(lambda: server.server.loop.stats.running == 1)
    assert short.result().json()["usage"]["completion_tokens"] == 200
