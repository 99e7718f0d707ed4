"""`holdall zoo NAME`: the file, the equations with their letters, and what is really carried."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from holdall import cli, commands, mixers
from holdall.commands import zoo

ROOT = Path(__file__).parents[2]
LEAKY = (ROOT / "docs" / "add-a-mixer.md").read_text().partition("```python\n")[2].partition("```")[0]
BYTES = {"float32": 4, "bfloat16": 2, "int64": 8}


pytestmark = pytest.mark.usefixtures("registry_as_before")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `holdall zoo` prints."""
    monkeypatch.setattr(commands.console, "width", 100)

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["holdall", "zoo", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        return said.out

    return call


@pytest.mark.quick
@pytest.mark.parametrize("name", mixers.names())
def test_an_entry_has_file_equations_letters_and_source(name: str) -> None:
    entry = mixers.entry(name)
    text = str(entry)
    assert f"\n  {entry.file}\n" in text
    source = (ROOT / entry.file).read_text()
    assert f'@register(\n    "{name}"' in source
    formulas = [line for line in entry.definition.splitlines() if line.startswith("    ")]
    assert formulas
    assert all(line in source and f"  {line}\n" in text for line in formulas)
    assert "\n  Letters: " in text
    assert entry.paper.arxiv in entry.definition
    assert not re.search(r"^ *(Weights|Deviations)\b", text, flags=re.MULTILINE)


@pytest.mark.quick
def test_the_tensors_of_a_state_are_listed_and_add_up(shown: Callable[..., str]) -> None:
    out = shown("rwkv-4", "--width", "128", "--context", "9")
    head, _, tensors = out.partition("state of one row after 9 tokens at width 128, bf16 activations: ")
    assert head
    total, _, tensors = tensors.partition("\n")
    listed = re.findall(r"^    \w+: ([\dx ]+), (\w+)$", tensors, flags=re.MULTILINE)
    assert len(listed) == 3
    counted = sum(math.prod(map(int, sizes.split(" x "))) * BYTES[dtype] for sizes, dtype in listed)
    assert total == "1.25 KiB"
    assert counted == 1280 == zoo._state_bytes(mixers.entry("rwkv-4"), 128, 9)


def test_a_file_of_your_own_is_named_as_you_named_it(shown: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "leaky.py"
    file.write_text(LEAKY)
    out = shown("leaky-sum", "--load", str(file), "--width", "16")
    assert f"\n  {file}\n" in out
    assert "h_t = a h_{t-1} + (1 - a) W x_t" in out
    assert "h_BD: 16, float32" in out
