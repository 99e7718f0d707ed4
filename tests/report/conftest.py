"""Synthetic sweep folders, whose numbers are made up and whose form is that of `holdall frontier`; and pages
opened without a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def result(label: str, state_bytes: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    """One line of results.jsonl."""
    by_pairs = None if accuracy is None else {"4": min(1.0, accuracy + 0.05), "16": max(0.0, accuracy - 0.05)}
    line = {
        "label": label,
        "mixer": "taylor",
        "family": label.partition(",")[0],
        "options": {"feature_dim": 16},
        "width": 64,
        "layers": ["base-conv", "taylor"],
        "form": "parallel",
        "parameters": 560_000,
        "state_bytes": state_bytes,
        "context_len": 64,
        "accuracy": accuracy,
        "accuracy_by_difficulty": by_pairs,
        "learning_rate": 0.003,
        "seed": 0,
        "steps": 400,
        "seconds": 11.25,
        "recall_bits": None if accuracy is None else 76.5 * accuracy,
        "recall_efficiency": None if accuracy is None else 76.5 * accuracy / (8 * state_bytes or 1),
        **more,
    }
    line.setdefault("run", f"{label}-w{line['width']}-lr{line['learning_rate']}-s{line['seed']}")
    return line


def small_sweep() -> list[dict[str, Any]]:
    """Ten models of six families as a sweep finds them, each at two learning rates."""
    models = [
        ("attention", 33_024, 1.0),
        ("window, w = 4", 2_560, 0.13),
        ("window, w = 8", 4_608, 0.26),
        ("window, w = 16", 8_704, 0.47),
        ("Taylor, f = 4", 4_412, 0.74),
        ("Taylor, f = 16", 40_292, 0.99),
        ("ELU+1", 4_672, 0.31),
        ("BaseConv", 1_024, 0.1),
        ("Mamba, N = 4", 4_096, 0.41),
        ("Mamba, N = 16", 10_240, 0.8),
    ]
    rates = ((0.003, 1.0), (0.01, 0.9))
    return [result(m, size, a * share, learning_rate=lr) for m, size, a in models for lr, share in rates]


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep folder: make_sweep(name, lines, tail=text after the last line, **config)."""

    def make(name: str, lines: list[dict[str, Any]], tail: str = "", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        test = [{"vocab": 512, "length": 64, "pairs": pairs, "rows": 1000} for pairs in (4, 16)]
        command = f"holdall frontier quick --out runs/{name}"
        complete = {"recipe": "quick", "command": command, "context_len": 64, "test": test, **config}
        (folder / "config.json").write_text(json.dumps(complete))
        (folder / "environment.json").write_text(json.dumps({"holdall": "0.1.0", "device": "cpu, 2 threads"}))
        text = "".join(json.dumps(line) + "\n" for line in lines) + tail
        (folder / "results.jsonl").write_text(text, encoding="utf-8")
        return folder

    return make


@pytest.fixture
def sweep(make_sweep: Callable[..., Path]) -> Path:
    return make_sweep("sweep", small_sweep())


@pytest.fixture
def line() -> Callable[..., dict[str, Any]]:
    return result


@pytest.fixture
def open_file(browser):
    """Opens a page; what it asked of a network, printed or threw is complained of at the end of the test."""
    troubles, contexts = [], []

    def guard(route):
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            troubles.append(f"request: {route.request.url}")
            route.abort()

    def open_page(path: Path, **options: Any):
        context = browser.new_context(viewport={"width": 1280, "height": 1000}, **options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        context.route("**/*", guard)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
