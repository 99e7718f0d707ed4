"""The page at `/`: what a browser makes of it, against a server of canned answers.

The server here says what holdall/serve answers, from a text that is known, so that every number on the page
can be computed beside it. Its policy allows the page's own script and style by their hashes alone.
"""

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from importlib import resources

import pytest

fastapi = pytest.importorskip("fastapi", reason="needs fastapi: pip install '.[serve]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn: pip install '.[serve]'")

pytestmark = pytest.mark.browser

HTML = (resources.files("holdall") / "serve" / "page.html").read_text(encoding="utf-8")
FACTS = {
    "parameters": 700_000, "layers": 4, "width": 128, "state_bytes": 1 << 20, "state_dtype": "fp32",
    "recurrent": True, "grows": False, "context": None,
}  # fmt: skip
CACHE = 4 * 2 * 128 * 4
"""Bytes per token of a Transformer of this size: layers, keys and values, width, fp32."""
WORDS = ["It ", "was ", "a ", "naïve ", "🎒 ", "of ", "旅.\n", "And "]
KEY = "s3cret"


class Stub:
    """A server that writes WORDS again and again, a token each; a prompt has as many tokens as characters."""

    def __init__(self):
        self.facts, self.sessions, self.requests = FACTS, {}, []
        self.key, self.fail_after, self.error = "", None, None
        self.go, self.aborted = threading.Event(), threading.Event()
        self.hold_after = None  # words after which it waits for `go`
        self.keeps_stopped = self.counts_always = True
        self.app = fastapi.FastAPI()
        self._routes(self.app)

    def refused(self, request):
        given = request.headers.get("authorization", "")
        if self.key and given != f"Bearer {self.key}":
            return fastapi.responses.JSONResponse({"error": {"message": "Give the API key."}}, 401)
        if self.error:
            status, message = self.error
            return fastapi.responses.JSONResponse({"error": {"message": message}}, status)
        return None

    def _routes(self, app):
        @app.get("/")
        def page():
            return fastapi.responses.HTMLResponse(HTML, headers={"Content-Security-Policy": policy()})

        @app.get("/v1/models")
        def models(request: fastapi.Request):
            entry = {"id": "based-mini", "object": "model", "created": 0, "owned_by": "holdall"}
            if self.facts:
                entry["holdall"] = self.facts
            return self.refused(request) or {"object": "list", "data": [entry]}

        @app.post("/tokenize")
        async def tokenize(request: fastapi.Request):
            text = (await request.json())["prompt"]
            return {"count": len(text), "tokens": list(range(len(text)))}

        @app.get("/v1/sessions")
        def sessions(request: fastapi.Request):
            data = [{"name": name, "tokens": n, "bytes": 1 << 20} for name, n in self.sessions.items()]
            return self.refused(request) or {"data": data}

        @app.get("/v1/sessions/{name}")
        def save(name: str, request: fastapi.Request):
            content = f"state of {self.sessions[name]}".encode()
            return self.refused(request) or fastapi.Response(content, media_type="application/octet-stream")

        @app.put("/v1/sessions/{name}")
        async def upload(name: str, request: fastapi.Request):
            found = re.fullmatch(rb"state of (\d+)", await request.body())
            if not found:
                message = "the state is of the model 'abc', not of 'based-mini'"
                return fastapi.responses.JSONResponse({"error": {"message": message}}, 400)
            self.sessions[name] = int(found[1])
            return {}

        @app.delete("/v1/sessions/{name}")
        def delete(name: str, request: fastapi.Request):
            self.sessions.pop(name)
            return self.refused(request) or {}

        @app.post("/v1/completions")
        async def complete(request: fastapi.Request):
            body = await request.json()
            self.requests.append(body)
            if refusal := self.refused(request):
                return refusal
            return fastapi.responses.StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body):
        name = body.get("session")
        prompt, n = self.sessions.get(name, 0) + len(body["prompt"]), 0
        try:
            while n < body["max_tokens"]:
                if n == self.hold_after:
                    while not self.go.is_set():
                        await asyncio.sleep(0.005)
                if n == self.fail_after:
                    yield event({"error": {"message": "the engine stopped: out of memory"}})
                    return
                n += 1
                usage = {"prompt_tokens": prompt, "completion_tokens": n, "total_tokens": prompt + n}
                choice = {"index": 0, "text": WORDS[(n - 1) % len(WORDS)], "finish_reason": None}
                sent = event({"choices": [choice], "usage": usage if self.counts_always else None})
                # cut within a character of several bytes, where there is one
                cut = next((at + 1 for at, byte in enumerate(sent) if byte >= 0xC0), len(sent) // 2)
                yield sent[:cut]
                await asyncio.sleep(0.001)
                yield sent[cut:]
            yield event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
            yield event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.aborted.set()
            if not self.keeps_stopped:
                name = None
            raise
        finally:
            if name:
                self.sessions[name] = prompt + n


def event(data):
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def policy():
    """What allows one script and one style by their hashes, and nothing else."""

    def allowed(tag):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", HTML, re.S)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    parts = (f"script-src {allowed('script')}", f"style-src {allowed('style')}")
    return f"default-src 'none'; {'; '.join(parts)}; connect-src 'self'; img-src data:"


@pytest.fixture(scope="module")
def address():
    """A server that runs as long as this module's tests; what it serves is each test's own Stub."""
    current = []

    async def app(scope, receive, send):
        await current[-1].app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/", current
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def stub(address):
    made = Stub()
    address[1].append(made)
    yield made
    made.go.set()


@pytest.fixture
def visit(address, stub, browser):
    """Opens the page. Other hosts, console output and errors are complained of at the end of the test.

    A browser prints each answer of 400 and more itself: `statuses` are those that a test provokes.
    """
    troubles, contexts = [], []

    def open_page(*, statuses=(), width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()

        def heard(message):
            if not any(f"with a status of {status}" in message.text for status in statuses):
                troubles.append(f"console: {message.text}")

        def asked(request):
            if not request.url.startswith((address[0], "data:", "blob:")):
                troubles.append(f"request: {request.url}")

        page.on("console", heard)
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("request", asked)
        page.goto(address[0])
        if not stub.key:
            eventually(lambda: page.locator("#sessions li").count())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def eventually(answer, seconds=10.0):
    """Asks until the answer is true; returns it."""
    end = time.monotonic() + seconds
    while not (given := answer()) and time.monotonic() < end:
        time.sleep(0.02)
    assert given
    return given


def generate(page, prompt, tokens=20, **fields):
    page.fill("#prompt", prompt)
    for field, value in {"tokens": tokens, **fields}.items():
        page.fill(f"#{field}", str(value))
    page.click("#generate")


def ended(page):
    eventually(lambda: page.is_enabled("#generate"))
    page.wait_for_timeout(100)  # the picture follows with the next frame


def written(n):
    return "".join(WORDS[i % len(WORDS)] for i in range(n))


# ----------------------------------------------------------------------------------------------------- text


def test_text_is_shown_as_it_comes_in_whole_characters(visit, stub):
    stub.hold_after = 5
    page = visit()
    generate(page, "Once: ", 13, session="s", seed=7, temperature=0.5)
    eventually(lambda: page.text_content("#text") == "Once: " + written(5))
    assert page.is_disabled("#generate")
    eventually(lambda: page.text_content("#n-written") == "5")  # with the next frame
    stub.go.set()
    ended(page)
    assert page.text_content("#text") == "Once: " + written(13)
    assert "\ufffd" not in page.text_content("#text")
    (body,) = stub.requests
    wanted = {"model": "based-mini", "prompt": "Once: ", "max_tokens": 13, "temperature": 0.5, "seed": 7}
    assert {**body, **wanted, "session": "s", "stream": True} == body
    assert body["stream_options"]["include_usage"] is True
    assert page.text_content("#n-first").endswith(" ms")
    assert float(re.fullmatch(r"([\d,.]+) tokens/s", page.text_content("#n-speed"))[1].replace(",", "")) > 1
    heard = page.text_content("#heard")
    assert heard
    assert heard in written(13)


def test_an_empty_seed_and_session_are_not_sent(visit, stub):
    page = visit()
    generate(page, "x", 3, session="")
    ended(page)
    assert not {"seed", "session"} & stub.requests[0].keys()
    assert page.input_value("#prompt") == "x"
    page.click("#generate")
    ended(page)
    assert page.text_content("#text") == "x" + written(3)  # of its own: the first is gone


def test_stop_aborts_the_request(visit, stub):
    stub.hold_after = 4
    page = visit()
    generate(page, "x", 1000, session="s")
    eventually(lambda: page.text_content("#text") == "x" + written(4))
    page.click("#stop")
    assert stub.aborted.wait(5)
    ended(page)
    eventually(lambda: page.text_content("#progress") == "Stopped.")
    assert page.is_disabled("#stop")
    assert page.is_hidden("#error")


def test_a_stopped_text_that_was_not_kept_is_said_so(visit, stub):
    stub.hold_after, stub.keeps_stopped, stub.sessions = 4, False, {"s": 50}
    page = visit()
    page.get_by_role("button", name="Continue s").click()
    generate(page, "x", 1000)
    eventually(lambda: written(4) in page.text_content("#text"))
    page.click("#stop")
    eventually(lambda: "The session is as it was" in page.text_content("#progress"))
    assert page.locator("#text .lost").all_text_contents() == ["x", written(4)]
    eventually(lambda: line(page, "state")["tokens"] == 50)
    assert (page.text_content("#n-read"), page.text_content("#n-written")) == ("50", "0")


def test_generate_again_continues_the_session(visit, stub):
    page = visit()
    generate(page, "abc", 10, session="s")
    ended(page)
    assert page.input_value("#prompt") == ""
    page.click("#generate")
    ended(page)
    assert [body["prompt"] for body in stub.requests] == ["abc", ""]
    assert {body["session"] for body in stub.requests} == {"s"}
    assert page.text_content("#text") == "abc" + 2 * written(10)
    assert (page.text_content("#n-read"), page.text_content("#n-written")) == ("13", "10")


# -------------------------------------------------------------------------------------------------- picture


def line(page, name):
    """The bytes and tokens that a line was drawn for, and its ends in pixels."""
    found = page.locator(f"#picture [data-line={name}]")
    get = {key: float(found.get_attribute(key)) for key in ("x1", "y1", "x2", "y2")}
    for key in ("tokens", "bytes"):
        if (value := found.get_attribute(f"data-{key}")) is not None:
            get[key] = int(value)
    return get


def test_picture_has_both_lines_with_their_numbers(visit, stub):
    page = visit()
    generate(page, "p" * 40, 360, session="s")
    ended(page)
    eventually(lambda: line(page, "state")["tokens"] == 400)
    state, cache = line(page, "state"), line(page, "cache")
    assert (state["tokens"], state["bytes"]) == (400, 1 << 20)
    assert (cache["tokens"], cache["bytes"]) == (400, 400 * CACHE)
    # heights are in the ratio of the bytes, from the axis up, and the state's line is level
    axis = cache["y1"]
    assert state["y1"] == state["y2"] == line(page, "state-later")["y2"]
    assert (axis - cache["y2"]) / (axis - state["y2"]) == pytest.approx(400 * CACHE / (1 << 20))
    assert state["x2"] == cache["x2"] > state["x1"] == cache["x1"]
    later = line(page, "cache-later")
    slope = (axis - cache["y2"]) / (cache["x2"] - cache["x1"])
    assert later["x2"] > cache["x2"]
    assert (axis - later["y2"]) / (later["x2"] - cache["x1"]) == pytest.approx(slope)
    tick = page.locator("#picture text", has_text=re.compile("^1 MiB$"))
    assert float(tick.get_attribute("y")) == pytest.approx(state["y2"], abs=5)  # its middle is a bit higher
    assert (page.text_content("#n-read"), page.text_content("#n-written")) == ("40", "360")
    assert page.text_content("#n-state") == "1.00 MiB"
    assert page.text_content("#n-cache") == "1.56 MiB (1.6×)"
    assert page.text_content("#sum") == "4 × 2 × 128 × 4 B × 400 = 1.56 MiB"
    words = page.locator("#picture text").all_text_contents()
    assert {"memory", "tokens of the text", "Transformer 1.56 MiB", "state 1.00 MiB"} <= set(words)
    assert {"0", "0.5 MiB", "1 MiB", "1.5 MiB", "100", "500"} <= set(words)
    told = page.get_attribute("#picture", "aria-label")
    assert "After 400 tokens, a Transformer of this size would hold 1.56 MiB" in told
    page.select_option("#bytes", "2")
    assert line(page, "cache")["bytes"] == 400 * CACHE // 2


def test_tokens_are_estimated_until_the_server_counts_them(visit, stub):
    stub.counts_always, stub.hold_after, stub.sessions = False, 5, {"s": 100}
    page = visit()
    page.get_by_role("button", name="Continue s").click()
    generate(page, "p" * 40, 12)
    eventually(lambda: page.text_content("#n-written") == "≈ 5")
    eventually(lambda: line(page, "cache")["tokens"] == 100 + 40 + 5)
    stub.go.set()
    ended(page)
    assert (page.text_content("#n-read"), page.text_content("#n-written")) == ("140", "12")
    assert line(page, "cache")["bytes"] == 152 * CACHE


def test_the_model_is_described(visit, stub):
    page = visit()
    wanted = "based-mini · 700K parameters · 4 layers of width 128 · 1.00 MiB of state for each text"
    assert page.text_content("#model") == f"{wanted} · no limit to its length"


def test_a_state_that_grows_is_not_called_constant(visit, stub):
    stub.facts = FACTS | {"grows": True, "context": 2048}
    page = visit()
    assert page.text_content("#model").endswith("at most 2,048 tokens")
    assert "keep keys and values themselves" in page.text_content("#own")
    assert "as at the beginning" not in page.get_attribute("#picture", "aria-label")


def test_a_server_that_says_little_of_its_model_still_serves(visit, stub):
    stub.facts = None
    page = visit()
    assert page.text_content("#model") == "based-mini"
    assert page.is_hidden("#formula")
    generate(page, "x", 5, session="s")
    ended(page)
    assert page.text_content("#text") == "x" + written(5)
    eventually(lambda: line(page, "state")["bytes"] == 1 << 20)  # the session's own
    assert page.locator("[data-line=cache]").count() == 0


# ------------------------------------------------------------------------------------------------- sessions


def test_a_session_is_saved_deleted_uploaded_and_continued_by_clicks(visit, stub, tmp_path):
    page = visit()
    generate(page, "abc", 10, session="mine")
    ended(page)
    row = page.locator("#sessions li.current")
    eventually(lambda: row.count() == 1 and "13 tokens, 1.00 MiB" in row.text_content())
    with page.expect_download() as download:
        row.get_by_role("button", name="Save mine").click()
    assert download.value.suggested_filename == "mine.safetensors"
    file = tmp_path / "my text.safetensors"
    download.value.save_as(file)
    assert file.read_bytes() == b"state of 13"

    row.get_by_role("button", name="Delete mine").click()
    eventually(lambda: stub.sessions == {})
    eventually(lambda: "None yet" in page.text_content("#sessions"))
    page.click("#undo")
    eventually(lambda: stub.sessions == {"mine": 13})

    page.set_input_files("#file", file)
    eventually(lambda: stub.sessions == {"mine": 13, "my-text": 13})
    eventually(lambda: page.input_value("#session") == "my-text")
    assert "13 tokens came before" in page.text_content("#text")
    page.set_input_files("#file", file)  # never over one that is there
    eventually(lambda: stub.sessions.keys() == {"mine", "my-text", "my-text-2"})

    page.get_by_role("button", name="Continue mine").click()
    assert page.input_value("#session") == "mine"
    page.fill("#tokens", "5")
    page.click("#generate")
    ended(page)
    assert stub.requests[-1]["session"] == "mine"
    assert stub.requests[-1]["prompt"] == ""
    eventually(lambda: line(page, "state")["tokens"] == 18)


def test_another_session_is_another_text(visit, stub):
    page = visit()
    generate(page, "abc", 10, session="mine")
    ended(page)
    page.click("#fresh")
    assert page.input_value("#session") not in ("", "mine")
    assert page.text_content("#text") == ""
    assert line(page, "cache")["bytes"] == 0


# --------------------------------------------------------------------------------------------------- errors


def test_errors_are_shown_in_words(visit, stub, tmp_path):
    page = visit(statuses=(400, 409, 502))
    stub.error = 409, "the session 's' is in use"
    generate(page, "abc", 10, session="s")
    ended(page)
    assert page.text_content("#error") == "the session 's' is in use"
    assert page.input_value("#prompt") == "abc"  # nothing of it was read
    assert page.text_content("#text") == ""
    stub.error = None
    page.click("#generate")
    ended(page)
    assert page.is_hidden("#error")
    assert page.text_content("#text") == "abc" + written(10)
    file = tmp_path / "other.safetensors"
    file.write_bytes(b"nothing")
    page.set_input_files("#file", file)
    eventually(lambda: page.text_content("#error") == "the state is of the model 'abc', not of 'based-mini'")


def test_an_error_within_the_stream_leaves_the_text(visit, stub):
    stub.fail_after = 6
    page = visit()
    generate(page, "abc", 10, session="s")
    ended(page)
    assert page.text_content("#error") == "the engine stopped: out of memory"
    assert page.text_content("#text") == "abc" + written(6)


def test_markup_in_text_and_names_stays_text(visit, stub):
    name = "<img src=x onerror=alert(1)>"
    stub.sessions = {name: 3}
    page = visit()
    generate(page, name, 3, session="s")
    ended(page)
    assert page.text_content("#text") == name + written(3)
    assert page.locator("img").count() == 0
    page.get_by_role("button", name=f"Delete {name}").click()
    eventually(lambda: name not in stub.sessions)


def test_a_key_is_asked_for_only_where_it_is_needed(visit, stub):
    assert visit().is_hidden("#locked")
    stub.key = KEY
    page = visit(statuses=(401,))
    eventually(lambda: page.is_visible("#locked"))
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    eventually(lambda: "refused this API key" in page.text_content("#locked"))
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    eventually(lambda: "based-mini" in page.title())
    assert page.is_hidden("#locked")
    assert page.is_hidden("#error")
    generate(page, "x", 3)
    ended(page)
    assert page.text_content("#text") == "x" + written(3)
    page.reload()
    eventually(lambda: "based-mini" in page.title())
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]


# --------------------------------------------------------------------------------------------- for everyone


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(visit, stub, scheme):
    stub.sessions = {"a-name-" * 12: 123_456}
    page = visit(width=360, color_scheme=scheme)
    generate(page, "w" * 400, 30, session="s")
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    words = page.locator("#picture text")
    for i in range(words.count()):
        box = words.nth(i).bounding_box()
        assert box["x"] >= 0, words.nth(i).text_content()
        assert box["x"] + box["width"] <= 360, words.nth(i).text_content()


def test_every_field_has_a_label_and_the_keyboard_reaches_everything(visit, stub):
    stub.sessions = {"mine": 3}
    page = visit()
    eventually(lambda: page.locator("#sessions button").count() == 3)
    fields = page.locator("input, textarea, select")
    assert fields.evaluate_all("all => all.filter(each => !each.labels.length).map(each => each.id)") == []
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
    order = ["prompt", "temperature", "tokens", "seed", "session", "fresh", "generate", "text", "bytes"]
    order += ["Continue mine", "Save mine", "Delete mine", "file", "refresh"]
    assert reached[: len(order)] == order
