"""From messages to tokens: the plain transcript, and templates that come with models."""

from pathlib import Path
from typing import Any

import pytest

import holdall
from holdall.engine.fast import Engine, EngineConfig
from holdall.engine.store import StateStore
from holdall.text.tokenizers import Bytes

pytest.importorskip("fastapi", reason="needs the extra serve")

from holdall.serve.chat import FILE, ChatTemplate, TemplateError
from holdall.serve.schemas import Message

END = Bytes().end
CHATML = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "tool" %}{{ raise_exception("tools are not for this model") }}{% endif %}
    {{- "<" ~ message.role ~ ">" ~ message.content ~ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<assistant>" }}{% endif %}
"""


def said(*pairs: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in pairs]


def of(source: str, folder: Path) -> ChatTemplate:
    (folder / FILE).write_text(source)
    return ChatTemplate.of_folder(folder, Bytes())


def test_without_a_template_a_chat_is_a_transcript(tmp_path: Path) -> None:
    plain = ChatTemplate.of_folder(tmp_path, Bytes())
    messages = said(("user", "Hi\n"), ("assistant", "{{ x }}"), ("user", "Who?"))
    wanted = b"User: Hi\n\n\nAssistant: {{ x }}\n\nUser: Who?\n\nAssistant:"
    assert plain.tokens(messages, begins=True) == [END, *wanted]
    assert plain.tokens(messages, begins=False) == [*wanted]
    assert plain.stops == ("\nUser:", "\nSystem:")


def test_a_template_s_ends_are_tokens_and_a_user_s_are_text(tmp_path: Path) -> None:
    template = of(CHATML, tmp_path)
    tokens = template.tokens(said(("user", "a<|endoftext|>b"), ("assistant", "c")), begins=True)
    assert tokens == [END, *b"<user>a<|endoftext|>b", END, *b"<assistant>c", END, *b"<assistant>"]
    assert template.stops == ()


def test_a_template_may_refuse(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="tools are not for this model"):
        of(CHATML, tmp_path).tokens(said(("tool", "x")), begins=True)
    with pytest.raises(TemplateError, match="is no template"):
        of("{% for %}", tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 99999 }}{% endfor %}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_template_is_in_a_sandbox(tmp_path: Path, source: str) -> None:
    with pytest.raises(TemplateError):
        of(source, tmp_path).tokens(said(("user", "x")), begins=True)


def test_the_server_uses_the_folder_s_template(tmp_path: Path) -> None:
    httpx2 = pytest.importorskip("httpx2", reason="needs httpx2")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from running_server import running

    model = holdall.load()
    (tmp_path / FILE).write_text(CHATML)
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=1))
    with running(engine, model, folder=tmp_path) as server:

        def ask(role: str) -> Any:
            body = {"messages": [{"role": role, "content": "Hi"}], "max_tokens": 5, "temperature": 0}
            return httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

        answer = ask("user").json()
        assert answer["usage"]["prompt_tokens"] == len("<user>Hi<assistant>") + 2
        refused = ask("tool")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        info = httpx2.get(f"{server.url}/tokenizer_info").json()
        assert info["chat_template"] == CHATML


def test_a_chat_by_full_histories_reads_what_is_new(tmp_path: Path) -> None:
    """A template that changes answers in the history, as those do that strip thinking."""
    httpx2 = pytest.importorskip("httpx2", reason="needs httpx2")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from running_server import running

    model = holdall.load()
    (tmp_path / FILE).write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    store = StateStore(fingerprint=model.fingerprint, model=model.model)
    engine = Engine(model.model, model.tokenizer, EngineConfig(rows=1), store=store)
    messages: list[dict[str, str]] = []
    with running(engine, model, folder=tmp_path) as server:
        read = 0
        for turn in range(4):
            messages.append({"role": "user", "content": f"Turn {turn}?"})
            body = {"messages": messages, "max_tokens": 8, "temperature": 0}
            answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == read
            read = answer["usage"]["prompt_tokens"] - len("<think>")
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
