"""Counted costs are those of code whose costs are known, and every mixer keeps what the registry promises."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from holdall import cli, files, mixers
from holdall.report import complexity as report
from holdall.theory import blocks
from holdall.theory.complexity import ATTENTIONS, LENGTHS, Cost, growth, measure, promised, slope
from holdall.theory.counting import Count

SHORT = (256, 1024, 4096)
"""Lengths that are quick to count."""


def test_products_sums_and_transforms_are_counted_as_they_are_known() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 32)
    with Count() as count:
        a @ b
    assert count.operations == 2 * 8 * 16 * 32
    assert count.depth == 1 + 4  # products, and a tree of sums over 16
    with Count() as count:
        a.sum()
    assert (count.operations, count.depth) == (128, 7)
    with Count() as count:
        torch.fft.rfft(a)
    assert count.operations == 5 * 128 * 4
    with Count() as count:
        a.t().unsqueeze(0)[0]
    assert (count.operations, count.depth, count.peak_bytes) == (0, 0, 0)


def test_depth_is_the_longest_chain_and_not_the_number_of_calls() -> None:
    x = torch.randn(64)
    with Count() as count:
        sum((x * number for number in range(1, 9)), start=torch.zeros(64))  # 8 products beside each other
    assert count.depth == 1 + 8
    with Count() as count:
        for _ in range(10):
            x = x.cos()
    assert count.depth == 10
    with Count() as count:
        out = torch.empty(4, 64)
        for row in range(4):
            out[row] = x.cos()  # rows do not wait for each other
    assert count.depth == 2
    with Count() as count:
        torch.linalg.solve_triangular(torch.eye(16), torch.randn(16, 3), upper=False)
    assert count.depth == 16


def test_memory_is_what_lives_at_once() -> None:
    x = torch.randn(1000)
    with Count() as count:
        for _ in range(10):
            y = x + 1
            y = y * 2  # two of these at most
            del y
    assert count.peak_bytes == 2 * 4000
    with Count() as count:
        kept = [x + number for number in range(5)]
    assert count.peak_bytes == 5 * 4000
    del kept
    with Count() as count:
        z = x + 1
        z.view(10, 100)[3].add_(1)  # a view holds what it is of, and has nothing of its own
    assert count.peak_bytes == 4000


@pytest.mark.parametrize(
    ("formula", "power"),
    [
        ("N²D", 2), ("ND", 1), ("D²(1 + 1/H)", 0), ("ND log N", 1), ("ND(√N + D)", 1.5), ("(W-1)D or ND", 0),
        ("min(N, L-1)D", 1), ("2NDG/H + 1", 1), ("ND(D + pn) + n³D", 1), ("eGK²+(2H+eG)K(W-1)", 0),
    ],
)  # fmt: skip
def test_a_promise_is_read_as_an_exponent(formula: str, power: float) -> None:
    assert promised(formula) == pytest.approx(power, abs=0.05)


def test_what_is_no_formula_is_refused() -> None:
    with pytest.raises(ValueError, match="no formula"):
        promised("N^2 D")


def test_growth_leaves_out_what_is_constant_and_slope_does_not() -> None:
    values = [1e6 + 3 * length**2 for length in SHORT]
    assert growth(SHORT, values) == pytest.approx(2)
    assert slope(SHORT, values) < 2
    assert growth(SHORT, [7.0] * 3) == 0
    assert math.isnan(growth(SHORT, [1, math.nan, 2]))
    with pytest.raises(ValueError, match="one factor apart"):
        growth((1, 2, 3), [1, 2, 3])


def _keeps_its_promise(name: str, lengths: tuple[int, ...]) -> None:
    entry, costs = mixers.entry(name), [measure(name, length) for length in lengths]

    def grows(field: str) -> float:
        return growth(lengths, [getattr(cost, field) for cost in costs])

    assert grows("operations") == pytest.approx(promised(entry.training), abs=0.15)
    assert grows("trained_operations") == pytest.approx(promised(entry.training), abs=0.15)
    assert grows("step_operations") == pytest.approx(promised(entry.inference), abs=0.1)
    assert grows("state") == pytest.approx(promised(entry.state), abs=0.01)


QUICK = ("attention", "delta-net", "gateloop", "hyena", "long-conv", "mamba", "retnet", "rwkv-7", "taylor")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in mixers.names()],
)
def test_every_mixer_costs_what_the_registry_promises(name: str) -> None:
    _keeps_its_promise(name, SHORT if name in QUICK else LENGTHS)


def test_attention_in_blocks_is_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 300, 8, dtype=torch.float64)
    truth = blocks.whole(q, k, v)
    assert (blocks.in_blocks(q, k, v, block=64) - truth).abs().max() < 1e-13
    assert (blocks.fused(q, k, v) - truth).abs().max() < 1e-13
    assert (truth[:, :, 0] - v[:, :, 0]).abs().max() < 1e-13


def test_blocks_take_the_memory_and_not_the_operations() -> None:
    costs = {name: [measure(name, length) for length in SHORT] for name in ATTENTIONS}
    whole, in_blocks, fused = costs.values()

    def grows(of: list[Cost], field: str) -> float:
        return growth(SHORT, [getattr(cost, field) for cost in of])

    for of in (whole, in_blocks, fused):
        assert grows(of, "operations") == pytest.approx(2, abs=0.1)
    assert grows(whole, "peak_bytes") == pytest.approx(2, abs=0.05)
    assert grows(in_blocks, "peak_bytes") == pytest.approx(1, abs=0.05)
    assert grows(fused, "peak_bytes") == pytest.approx(1, abs=0.05)
    assert whole[-1].peak_bytes > 50 * in_blocks[-1].peak_bytes
    # every block is kept for gradients: what saves memory in training is a backward pass that makes them anew
    assert grows(in_blocks, "trained_bytes") > 1.7
    assert grows(fused, "trained_bytes") == pytest.approx(1, abs=0.05)


def holdall(monkeypatch: pytest.MonkeyPatch, *words: str) -> Any:
    """The exit status of the command line."""
    monkeypatch.setattr("sys.argv", ["holdall", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_writes_resumes_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["theory", "complexity", "base-conv", "attention, whole", "--lengths", "16", "32", "64"]
    asked += ["--no-time", "--out", str(tmp_path)]
    assert holdall(monkeypatch, *asked) == 0
    lines = files.read_lines(tmp_path / "results.jsonl")
    assert [(line["name"], line["length"]) for line in lines] == [
        (name, length) for name in ("base-conv", "attention, whole") for length in (16, 32, 64)
    ]
    assert "seconds" not in lines[0]
    table = (tmp_path / "table.md").read_text()
    assert table == report.markdown(report.by_name(Cost(**line) for line in lines))
    assert "| base-conv | ND(W + D): 1 | 1.00 | 1.00 |  |" in table
    assert (tmp_path / "attention.png").stat().st_size > 10_000
    before = (tmp_path / "results.jsonl").read_bytes()
    assert holdall(monkeypatch, *asked) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before
    capsys.readouterr()
    assert holdall(monkeypatch, *asked, "--width", "16") != 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path} holds measurements with other settings (width: 32 there, 16 here); choose" in said
    assert holdall(monkeypatch, "theory", "complexity", "atention", "--out", str(tmp_path)) != 0
    assert "Did you mean 'attention'" in capsys.readouterr().err
    assert holdall(monkeypatch, *asked[:2], "--lengths", "16", "32", "50", "--out", str(tmp_path)) != 0
    assert "as many times the one before" in capsys.readouterr().err


def test_the_picture_shows_what_was_measured() -> None:
    costs = [
        Cost(name=name, length=length, peak_bytes=4.0 * length**power, seconds=1e-6 * length)
        for name, power in zip(ATTENTIONS, (2, 1, 1), strict=True)
        for length in SHORT
    ]
    figure = report.draw(report.by_name(costs))
    lines = {line.get_gid(): line for axes in figure.axes for line in axes.lines}
    assert set(lines) == {f"{field}:{name}" for field in ("peak_bytes", "seconds") for name in ATTENTIONS}
    assert list(lines["peak_bytes:attention, whole"].get_ydata()) == [4 * n**2 / 2**20 for n in SHORT]
    with pytest.raises(ValueError, match="nothing to draw"):
        report.draw({})
