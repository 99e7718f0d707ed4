"""What may happen to a file between two commands, for the tests of every kind of file.

It is cut, flipped, zeroed, replaced by what is no file, and, if it is JSON, changed in its values, types,
keys and depth.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from holdall.files import RunError

MUTANTS = 40
"""Of each file, besides those that are in its place without being one."""


def mutants(path: Path, seed: str, count: int = MUTANTS) -> Iterator[str]:
    """Changes `path` again and again, always from what it was; gives a word for each change."""
    whole = path.read_bytes()
    draw = random.Random(seed)
    changes: list[Callable[[], str]] = [lambda change=change: change(path, whole, draw) for change in BYTES]  # type: ignore[misc]
    lines = path.suffix == ".jsonl"
    if path.suffix in (".json", ".jsonl"):
        changes += [lambda change=change: of_json(path, whole, draw, change, lines) for change in VALUES] * 2  # type: ignore[misc]
    for change in [*PLACES, *(draw.choice(changes) for _ in range(count))]:
        said = change(path) if change in PLACES else change()  # type: ignore[call-arg,operator]
        yield f"{path.name}: {said}"
        remove(path)
        path.write_bytes(whole)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def cut(path: Path, whole: bytes, draw: random.Random) -> str:
    path.write_bytes(whole[: draw.randrange(len(whole))])
    return "cut"


def flip(path: Path, whole: bytes, draw: random.Random) -> str:
    at = draw.randrange(len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    return f"flipped at {at}"


def zero(path: Path, whole: bytes, draw: random.Random) -> str:
    first, last = sorted((draw.randrange(len(whole)), draw.randrange(len(whole) + 1)))
    path.write_bytes(whole[:first] + bytes(last - first) + whole[last:])
    return f"zeroed from {first} to {last}"


def double(path: Path, whole: bytes, draw: random.Random) -> str:
    at = draw.randrange(len(whole))
    path.write_bytes(whole + whole[at:])
    return f"doubled from {at}"


BYTES = (cut, flip, zero, double)


def to_folder(path: Path) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def to_link(path: Path) -> str:
    content = path.read_bytes()
    path.unlink()
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_bytes(content)
    path.symlink_to(elsewhere)
    return "a link"


def to_itself(path: Path) -> str:
    path.unlink()
    path.symlink_to(path)
    return "a link to itself"


def to_pipe(path: Path) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def to_nothing(path: Path) -> str:
    path.unlink()
    return "gone"


def to_empty(path: Path) -> str:
    path.write_bytes(b"")
    return "empty"


PLACES = (to_folder, to_link, to_itself, to_pipe, to_nothing, to_empty)

ODD = [
    None,
    True,
    -1,
    0,
    1,
    1 << 31,
    1 << 70,
    0.5,
    float("nan"),
    "",
    "../x",
    "\ud800",
    "\x1b[31m",
    [],
    {},
    [[]],
    {"": 0},
]


def of_json(path: Path, whole: bytes, draw: random.Random, change: Callable[..., str], lines: bool) -> str:
    rows = whole.splitlines() if lines else [whole]
    row = draw.randrange(len(rows))
    value = {"": json.loads(rows[row])}  # so that the whole is changed like its parts
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(value)
    said = change(*draw.choice(places), draw)
    rows[row] = json.dumps(value.get("", 0)).replace('"DEEP"', "[" * 50_000).encode()
    path.write_bytes(b"\n".join(rows))
    return said


def odd(value: Any, key: Any, draw: random.Random) -> str:
    value[key] = draw.choice(ODD)
    return f"{key} is {value[key]!r}"


def deep(value: Any, key: Any, draw: random.Random) -> str:
    value[key] = "DEEP"
    return f"{key} is nested"


def gone(value: Any, key: Any, draw: random.Random) -> str:
    del value[key]
    return f"{key} is gone"


def near(value: Any, key: Any, draw: random.Random) -> str:
    if isinstance(value[key], int | float):
        value[key] += draw.choice([-1, 1])
    elif isinstance(value[key], str):
        value[key] += "0"
    elif isinstance(value[key], list):
        value[key] += value[key][:1]
    elif isinstance(value[key], dict):
        value[key]["more"] = 1
    else:
        value[key] = ""
    return f"{key} is a little different"


VALUES = (odd, deep, gone, near)


def check(what: str, do: Callable[[], Any], right: Any, name: str) -> bool:
    """Whether it was refused; AssertionError unless it was refused by name, or came out right."""
    refusal = ""
    try:
        found = do()
    except RunError as error:
        refusal = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if refusal:
        assert name in refusal, f"{what}: {refusal}"
        assert refusal.isprintable(), what
    else:
        assert right is None or found == right, what
    return bool(refusal)
