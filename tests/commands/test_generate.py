"""The command `holdall generate`, as typed: text to stdout as it comes, and nothing else."""

import functools
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import holdall
from holdall import cli, language_model
from holdall.engine import Piece, Usage
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["holdall", "generate", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_on_a_fresh_machine_it_needs_no_arguments(tmp_path: Path) -> None:
    """In another folder, with a home that is empty; the text alone is on stdout."""
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "holdall.cli", "generate"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == holdall.load().generate()
    assert len(done.stdout) > 20
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_options_are_those_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holdall.load().save(tmp_path / "mine")
    options = ("--max-tokens", 30, "--temperature", 1.5, "--seed", 4, "--device", "cpu")
    for precision in ("fp32", "bf16"):
        for flag in ("--precision", "--dtype"):
            assert run(monkeypatch, tmp_path / "mine", "Mr. Darcy", *options, flag, precision) == 0
            model = holdall.load(tmp_path / "mine", dtype=precision)
            wanted = model.generate("Mr. Darcy", max_tokens=30, temperature=1.5, seed=4)
            assert capsys.readouterr().out == wanted
    assert run(monkeypatch, tmp_path / "mine", "--checkpoint", "best") == 2
    assert "has no checkpoint 'best', but 'model'" in capsys.readouterr().err


def test_a_prompt_from_stdin_ends_without_the_shell_s_new_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, prompt in ((b"Mr. Darcy\n", "Mr. Darcy"), ("naïve\n\n".encode(), "naïve\n"), (b"", "")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
        assert run(monkeypatch, "based-mini", "-", "--max-tokens", 20, "--device", "cpu") == 0
        assert capsys.readouterr().out == holdall.load().generate(prompt, max_tokens=20)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert run(monkeypatch, "based-mini", "-") == 2
    assert "stdin is not UTF-8" in capsys.readouterr().err


def test_text_comes_piece_by_piece_and_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def flush(self) -> None:
            seen.append(self.getvalue())

    def scripted(self: object, text: str, **_: object) -> Iterator[Piece]:
        for text in ("Lo", "ok: \x1b[2J", "\n\ttab"):
            usage = Usage(0, 0, 0)
            yield Piece(ticket=1, index=0, text=text, tokens=(), finish="", usage=usage)

    seen: list[str] = []
    monkeypatch.setattr(language_model.LanguageModel, "stream", scripted)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert run(monkeypatch) == 0
    assert seen[:3] == ["Lo", "Look: \\x1b[2J", "Look: \\x1b[2J\n\ttab"]
    assert seen[-1].endswith("\ttab\n")
    seen.clear()
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert run(monkeypatch) == 0
    assert seen[-1] == "Look: \x1b[2J\n\ttab"


@torch.no_grad()
def test_a_short_prompt_is_padded_as_the_published_models_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text of one call over all tokens, again for each of them, in which the padding's keys are zero."""
    twice = PrefixLinearAttentionConfig(width=16, heads=2, feature_dim=4, prefix=24)
    layers = (BaseConvConfig(width=16), twice, SlidingWindowConfig(width=16, heads=2, window=5))
    with seeded(3):
        model = ModelConfig(vocab=264, width=16, layers=layers).build()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    language_model.LanguageModel(model, Bytes()).save(tmp_path / "mine")
    options = ("--max-tokens", 12, "--temperature", 0, "--device", "cpu")
    written = {}
    for padding in (24 - len("Mr. Darcy"), 0):
        ids = [32] * padding + list(b"Mr. Darcy")
        model.mixers[1].forward = functools.partial(
            type(model.mixers[1]).forward, model.mixers[1], padding=padding
        )
        for _ in range(12):
            logits_V = model(torch.tensor([ids]))[0][0, -1, :257]
            ids.append(int(logits_V.argmax()))
        written[padding] = Bytes().decode(ids[padding + len("Mr. Darcy") :])
    assert run(monkeypatch, tmp_path / "mine", "Mr. Darcy", *options, "--jrt-padding", 32) == 0
    assert capsys.readouterr().out == written[15] != written[0]
    saved = tmp_path / "session.safetensors"
    first = ("--jrt-padding", 32, "--save-session", saved, "--max-tokens", 5)
    assert run(monkeypatch, tmp_path / "mine", "Mr. Darcy", *options, *first) == 0
    assert run(monkeypatch, tmp_path / "mine", *options, "--session", saved, "--max-tokens", 7) == 0
    assert capsys.readouterr().out == written[15]
    for words, says in (
        ((tmp_path / "mine", "a", "--jrt-padding", 32, "--session", saved), "--session continues one"),
        (
            (tmp_path / "mine", "a", "--jrt-padding", 264),
            "the padding token is 264, where the model's vocabulary",
        ),
        ((tmp_path / "mine", "--jrt-padding", 32), "nothing to pad: give at least one token"),
        (("based-mini", "a", "--jrt-padding", 32), "prefix linear attention; this model has none"),
    ):
        assert run(monkeypatch, *words) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("nowhere",), "there is no folder nowhere. Name a run folder of `holdall train`"),
        (("It is",), "name the run before the prompt: holdall generate based-mini 'It is'"),
        (("--max-tokens", -1), "--max-tokens = -1 must be at least 0"),
        (("--temperature", "nan"), "--temperature = nan must be at least 0 and finite"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[object, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_a_session_is_resumed_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two halves of a text, by two commands, are the text of one: draws depend on seed and position."""
    file, options = tmp_path / "session.safetensors", ("--device", "cpu", "--seed", 2)
    assert run(monkeypatch, "based-mini", "Mr. Darcy", "--max-tokens", 40, *options) == 0
    whole = capsys.readouterr().out
    half = ("--max-tokens", 20, "--save-session", file, *options)
    assert run(monkeypatch, "based-mini", "Mr. Darcy", *half) == 0
    assert run(monkeypatch, "based-mini", "", "--session", file, *half) == 0
    assert capsys.readouterr().out == whole
    assert file.stat().st_size < 200_000
    monkeypatch.setattr(language_model.LanguageModel, "fingerprint", "another")
    assert run(monkeypatch, "based-mini", "", "--session", file, "--device", "cpu") == 2
    assert "has states of model" in capsys.readouterr().err


def test_the_options_of_sampling(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--top-k", 5, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1, "--stop", "the")
    assert run(monkeypatch, "based-mini", "Mr. Darcy", *options, "--stop", "x", "--device", "cpu") == 0
    wanted = holdall.load().generate(
        "Mr. Darcy", top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, stop=("the", "x")
    )
    assert capsys.readouterr().out == wanted
    assert "the" not in wanted
    assert run(monkeypatch, "based-mini", "--top-p", 1.5) == 2
    assert "--top-p" in capsys.readouterr().err
