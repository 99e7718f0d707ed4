"""The command `holdall chat`: typed lines in, a text and its states out."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import holdall
from holdall import cli
from holdall.commands.chat import Chat, converse
from holdall.engine.request import Sampling
from holdall.engine.session import Past, read
from holdall.language_model import LanguageModel

Talk = Callable[..., Chat]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return holdall.load()


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def talk(model: LanguageModel, shown: list[str]) -> Talk:
    """Has a chat that says these lines, greedy and 12 tokens at a time unless told otherwise."""

    def talked(*lines: str, chat: Chat | None = None, **sampling: object) -> Chat:
        settings = {"temperature": 0.0, "max_tokens": 12, **sampling}
        chat = chat or Chat(model, settings, shown.append)
        converse(chat, typist(lines), prompt="")
        return chat

    return talked


def typist(lines: Sequence[str]) -> Callable[[str], str]:
    left = list(lines)

    def ask(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return ask


def read_so_far(model: LanguageModel, text: str) -> str:
    """The key of a session that has read a document's beginning."""
    tokens = model.tokenizer.encode_batch([text])[0].tolist()
    return Past().after([model.tokenizer.end, *tokens]).key


def test_what_is_typed_is_appended_as_it_stands(model: LanguageModel, talk: Talk, shown: list[str]) -> None:
    chat = talk("It is", " a truth \\", " by  now")
    first, second = "".join(shown).removesuffix("\n").split("\n")
    assert first == model.generate("It is", max_tokens=12, temperature=0)
    assert len(second) == 12
    assert chat.text.session is not None
    whole = f"It is{first} a truth \n by  now{second}"
    assert chat.text.session.past.key == read_so_far(model, whole)


def test_an_empty_line_continues(model: LanguageModel, talk: Talk, shown: list[str]) -> None:
    talk("It is", "", "")
    continued = "".join(line.removesuffix("\n") for line in "".join(shown).splitlines(keepends=True))
    assert continued == model.generate("It is", max_tokens=36, temperature=0)


def test_two_slashes_begin_a_text_with_one(model: LanguageModel, talk: Talk, shown: list[str]) -> None:
    chat = talk("//quit", "/quit", "never read")
    assert chat.text.session is not None
    written = "".join(shown).removesuffix("\n")
    assert chat.text.session.past.key == read_so_far(model, f"/quit{written}")


def test_undo_goes_back_one_line_at_a_time(talk: Talk, shown: list[str]) -> None:
    chat = talk("It is")
    first = chat.text.session
    talk(" a truth", "/undo", chat=chat)
    assert chat.text.session is first
    talk("/undo", "/undo", chat=chat)
    assert chat.text.session is None
    assert shown[-2:] == ["[back to 0 tokens]\n", "[there is nothing to undo]\n"]


def test_a_fork_leaves_the_other_text_as_it_was(talk: Talk, shown: list[str]) -> None:
    chat = talk("It is", "/fork", " a truth")
    one, two = (text.session for text in chat.texts)
    assert one is not None
    assert two is not None
    assert (one.past.count, two.past.count) == (1 + 5 + 12, 1 + 5 + 12 + 8 + 12)
    alone = talk("It is").text.session
    assert alone is not None
    pairs = zip(one.states, alone.states, strict=True)
    assert all(a.equal(b) for old, new in pairs for a, b in zip(old, new, strict=True))
    talk("/fork 1", "/undo", "/fork 2", "/fork 3", chat=chat)
    assert [text.session for text in chat.texts] == [None, two]
    said = ["text 1 of 2, after 18 tokens]\n", "[back to 0 tokens]\n", "text 2 of 2, after 38 tokens]\n"]
    assert [line.removeprefix("[this is ") for line in shown[-4:-1]] == said
    assert shown[-1] == "[there is no text 3, but 1 to 2]\n"


def test_a_saved_text_continues_bit_exactly(talk: Talk, tmp_path: Path, shown: list[str]) -> None:
    drawn = {"temperature": 1.0, "seed": 5}
    unbroken = talk("It is", " so", **drawn).text.session
    file = tmp_path / "state.safetensors"
    talk("It is", f"/save {file}", **drawn)
    shown.clear()
    resumed = talk("other", f"/load {file}", " so", "/undo", "/undo", **drawn)
    assert "loaded 18 tokens in 115 KiB of state" in "".join(shown)
    assert resumed.text.session is not None
    assert resumed.text.session.past.count == 1 + 5 + 12  # what /load replaced is back
    again = talk(f"/load {file}", " so", **drawn).text.session
    assert unbroken is not None
    assert again is not None
    assert again.past == unbroken.past
    assert again.logits_V.equal(unbroken.logits_V)


def test_a_file_of_another_kind_is_never_written_over(talk: Talk, tmp_path: Path, shown: list[str]) -> None:
    precious, mine = tmp_path / "precious", tmp_path / "mine"
    precious.write_text("mine")
    talk("/save", "/save x", "It is", f"/save {precious}", f"/save {mine}", "", f"/save {mine}")
    assert precious.read_text() == "mine"
    notes = [line for line in shown if line.startswith("[")]
    assert notes[0] == "[the text is empty: type something first]\n"
    assert notes[2] == f"[{precious} is there already: choose another name, or remove it first]\n"
    assert [line.split(" in ")[0] for line in notes[3:]] == ["[saved 18 tokens", "[saved 30 tokens"]


def test_a_state_of_another_model_is_refused(model: LanguageModel, talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    talk("It is", f"/save {file}")
    said: list[str] = []
    other = LanguageModel(model.config.build(), model.tokenizer)
    chat = Chat(other, {}, said.append)
    converse(chat, typist([f"/load {file}", "/load", "/bla"]), prompt="")
    assert chat.text.session is None
    assert "another model" in said[0] or model.fingerprint in said[0]
    assert said[1] == "[name a file: /load FILE]\n"
    assert said[2].startswith("[there is no command /bla; /help lists them")


def test_state_is_counted_beside_a_transformer_s(model: LanguageModel, talk: Talk, shown: list[str]) -> None:
    talk("It is", "/state", max_tokens=94)
    tokens, held = 1 + 5 + 94, model.model.state_bytes(100)
    cache = 4 * 2 * 128 * 4 * tokens
    said = shown[-1]
    assert said.startswith(f"[100 tokens in {held / 1024:.0f} KiB of state. ")
    assert f"would hold {cache / 1024:.0f} KiB by now, {cache / held:.2g} times as much" in said
    assert "4 layers x 2 x 128 wide x 4 B x 100 tokens" in said


def test_a_stop_is_read_but_not_shown(model: LanguageModel, talk: Talk, shown: list[str]) -> None:
    text = model.generate("It is", max_tokens=200, temperature=0)
    stop = text[20:24]
    chat = talk("It is", max_tokens=200, stop=(stop,))
    end = text.index(stop)
    assert "".join(shown) == text[:end] + "\n"
    assert chat.text.session is not None
    assert chat.text.session.past.key == read_so_far(model, f"It is{text[:end]}{stop}")


def test_ctrl_c_keeps_what_was_written(
    model: LanguageModel, talk: Talk, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, after = LanguageModel.stream, 3

    def interrupted(*args, **options):
        for i, piece in enumerate(whole(*args, **options)):
            if i == after:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(LanguageModel, "stream", interrupted)
    chat = talk("It is")
    written = "".join(shown)
    assert written == model.generate("It is", max_tokens=3, temperature=0) + "\n"
    assert chat.text.session is not None
    assert chat.text.session.past.key == read_so_far(model, "It is" + written.removesuffix("\n"))
    before, after = chat.text.session, 0
    talk(" so", chat=chat)
    assert chat.text.session is before
    assert "stopped before the model wrote anything" in shown[-1]


def test_the_end_of_a_document_is_said_and_another_begins(
    model: LanguageModel, talk: Talk, shown: list[str]
) -> None:
    chat = talk("It is", logit_bias=((model.tokenizer.end, 1e9),))
    assert "the model ended the document" in shown[-1]
    assert chat.text.session is not None
    end = model.tokenizer.end
    assert chat.text.session.past == Past().after([end, *b"It is", end])


def test_a_text_steers_no_terminal(model: LanguageModel, talk: Talk, shown: list[str]) -> None:
    talk("It is", max_tokens=3, logit_bias=((27, 1e9),))
    assert "".join(shown) == r"\x1b" * 3 + "\n"


def test_a_bug_is_not_taken_for_a_mistake(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args, **options):
        yield 1 + "1"  # type: ignore[operator]

    monkeypatch.setattr(LanguageModel, "stream", broken)
    with pytest.raises(TypeError):
        talk("It is")


# ------------------------------------------------------------------------------------------- as a command


def run(monkeypatch: pytest.MonkeyPatch, typed: str, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["holdall", "chat", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_session_resumes_where_it_ended(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "mine.safetensors"
    options = ("--session", file, "--temperature", 0, "--max-tokens", 12, "--device", "cpu")
    assert run(monkeypatch, "It is\n", *options) == 0
    first = model.generate("It is", max_tokens=12, temperature=0)
    said = capsys.readouterr().out
    assert said.startswith(first + "\n[saved 18 tokens")
    assert run(monkeypatch, "\n/quit\n", *options) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"[loaded 18 tokens in 115 KiB of state from {file}; the text ends with ")
    assert repr(first[-8:]) in said
    assert model.generate("It is", max_tokens=24, temperature=0).removeprefix(first) + "\n" in said
    assert "saved 30 tokens" in said


def test_every_option_says_how_tokens_are_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    whole = LanguageModel.stream

    def noted(self, text, *, session, keep, **options):
        asked.append(Sampling(**options))
        return whole(self, text, session=session, keep=keep, **options)

    monkeypatch.setattr(LanguageModel, "stream", noted)
    options = {"max-tokens": 3, "temperature": 0.5, "top-k": 9, "top-p": 0.9, "min-p": 0.1, "seed": 7}
    options["stop"] = r"You:\n"
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert run(monkeypatch, "It is\n", *words, "--stop", "x") == 0
    stop = ("You:\n", "x")
    drawn = {"max_tokens": 3, "temperature": 0.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1, "seed": 7}
    assert asked == [Sampling(**drawn, stop=stop)]
    asked.clear()
    assert run(monkeypatch, "It is\n", "--max-tokens", 3) == 0
    assert asked == [Sampling(max_tokens=3, temperature=0.8)]


def test_mistakes_are_one_line_and_leave_the_session_s_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "damaged"
    file.write_bytes(b"no state")
    for words in (("--session", file), ("--session", tmp_path / "no" / "file"), ("--max-tokens", 0)):
        assert run(monkeypatch, "It is\n", *words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert file.read_bytes() == b"no state"


def test_a_session_is_saved_though_the_chat_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, whole, calls = tmp_path / "mine", LanguageModel.stream, []

    def second_fails(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("a bug")
        return whole(*args, **options)

    monkeypatch.setattr(LanguageModel, "stream", second_fails)
    assert run(monkeypatch, "It is\n so\n", "--session", file, "--max-tokens", 3) == 1
    monkeypatch.setattr(LanguageModel, "stream", whole)
    assert run(monkeypatch, "", "--session", file) == 0
    assert "loaded 9 tokens" in capsys.readouterr().out


def test_reading_again_is_what_the_model_read(model: LanguageModel, talk: Talk) -> None:
    """The state after an exchange is that of the text, up to rounding."""
    chat = talk("It is")
    text = "It is" + model.generate("It is", max_tokens=12, temperature=0)
    ids = [model.tokenizer.end, *model.tokenizer.encode_batch([text])[0].tolist()]
    assert chat.text.session is not None
    assert (read(model.model, ids).logits_V - chat.text.session.logits_V).abs().max() < 1e-4
