"""What the benchmarks write down; what they measure is measured by nobody's test."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.table import Table

import bench.__main__
from bench import collected, gpu, kernels, markdown, replay
from bench.__main__ import last
from holdall import files

RESULTS = Path(__file__).parents[1] / "results"


def test_a_table_becomes_markdown() -> None:
    table = Table()
    table.add_column("what")
    table.add_column("ms", justify="right")
    table.add_row("ours", "0.1")
    table.add_row("theirs", "0.2\n0.3")
    assert markdown(table).splitlines() == [
        "| what | ms |", "| --- | ---: |", "| ours | 0.1 |", "| theirs | 0.2; 0.3 |",
    ]  # fmt: skip


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[dict[str, Any]]]:
    """What a benchmark of such cases tells, on a card of round numbers."""

    def run(
        cases: Callable[[], Iterator[gpu.Case]], milliseconds: Callable[..., float] = lambda function: 1.0
    ) -> Iterator[dict[str, Any]]:
        monkeypatch.setitem(sys.modules, "bench.fake", SimpleNamespace(cases=cases))
        monkeypatch.setattr(gpu, "ceiling", lambda: gpu.Ceiling(bandwidth=1e3, flops=1e3))
        monkeypatch.setattr(gpu, "milliseconds", milliseconds)
        return kernels.run("fake")

    return run


def test_a_kernel_s_case_is_made_when_the_one_before_is_measured(
    measured: Callable[..., Iterator[dict[str, Any]]],
) -> None:
    happened = []

    def cases() -> Iterator[gpu.Case]:
        for name in ("one", "two"):
            happened.append(f"{name} made")
            yield gpu.Case(what=name, shape="", bytes=1.0, ways={"ours": lambda: None})

    def milliseconds(function: Callable[[], Any]) -> float:
        happened.append("measured")
        return 1.0

    limit, *results = measured(cases, milliseconds)
    assert happened == ["one made", "measured", "two made", "measured"]
    assert limit == {"bandwidth": 1e3, "flops": 1e3}
    assert [result["what"] for result in results] == ["one", "two"]


def test_what_is_measured_before_a_stop_is_kept(measured: Callable[..., Iterator[dict[str, Any]]]) -> None:
    def cases() -> Iterator[gpu.Case]:
        yield gpu.Case(what="one", shape="", bytes=1.0, ways={"ours": lambda: None})
        raise KeyboardInterrupt

    results, whole = collected(measured(cases))
    assert [result.get("what") for result in results] == [None, "one"]
    assert not whole


def test_the_tests_that_run_before_a_benchmark_are_there() -> None:
    parts = [f"kernels:{name}" for name in kernels.MODULES]
    for name in [*bench.__main__.BENCHES, *parts]:
        found = bench.__main__.gates_of(name)
        assert found
        assert all((RESULTS.parent / path).exists() for path in found), name
    assert bench.__main__.gates_of("kernels") == ["tests/kernels"]
    assert bench.__main__.gates_of("kernels:read_twice") == ["tests/kernels/test_taylor.py"]


@pytest.mark.parametrize("kept", [0, 1])
def test_a_stop_ends_all_benchmarks(
    kept: int,
    measured: Callable[..., Iterator[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that has told the card's ceiling alone has measured nothing yet, and leaves no line."""

    def cases() -> Iterator[gpu.Case]:
        for at in range(kept):
            yield gpu.Case(what=str(at), shape="", bytes=1.0, ways={"ours": lambda: None})
        raise KeyboardInterrupt

    file = tmp_path / "bench.jsonl"
    stopped = SimpleNamespace(run=lambda: measured(cases), table=kernels.table)
    after = SimpleNamespace(run=lambda: pytest.fail("a benchmark began after the stop"))
    green = SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(bench.__main__, "BENCHES", {"generator": stopped, "training": after})
    monkeypatch.setattr(bench.__main__, "subprocess", green)
    monkeypatch.setattr(sys, "argv", ["bench", "generator", "training", "--results", str(file)])
    assert bench.__main__.main() == 130
    lines = files.read_lines(file)
    assert [[result.get("what") for result in line["results"]] for line in lines] == [[None, "0"]] * kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_cannot_be_recorded_is_timed_and_leaves_nothing_behind() -> None:
    numbers = torch.rand(1000, device="cuda")
    assert gpu.milliseconds(lambda: numbers.sum().item()) > 0
    assert 0 < torch.rand(1000, device="cuda").mean() < 1
    assert gpu.milliseconds(lambda: torch.rand_like(numbers)) > 0


@pytest.mark.parametrize("name", last(RESULTS / "bench.jsonl"))
def test_the_page_shows_the_newest_run(name: str) -> None:
    assert last(RESULTS / "bench.jsonl")[name] in (RESULTS / "bench.md").read_text()


def test_the_bytes_of_steps_with_a_ring_are_those_of_the_page() -> None:
    page = (RESULTS.parent / "docs" / "replay.md").read_text(encoding="utf-8")
    assert "\n".join(replay.bytes_table()) in page


def test_of_a_ring_as_many_tokens_are_read_as_a_state_holds_on_average() -> None:
    """S, 8 KB, is read each time and written in one step of 4; the ring has 4 to 7 tokens before a step."""
    own = replay.Moved(sums=8192, token=100)
    steps = [(before, before == 7) for before in (4, 5, 6, 7)]
    each = [8192 * (1 + full) + 100 * (before + 1) for before, full in steps]
    assert own.replayed(4) == sum(each) / 4
    assert own.share(4) == own.replayed(4) / 16384
