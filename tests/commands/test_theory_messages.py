"""`holdall theory message`, `index`, `disjointness` and `floors`: what a user types, sees and is refused."""

import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

import children
import pytest
import torch

from holdall import cli, environment, processes, recipes
from holdall.commands import theory_messages
from holdall.mixers.attention import AttentionConfig
from holdall.recipes import quick
from holdall.report import messages as picture
from holdall.sweeps.sweep import SweepConfig, run_sweep
from holdall.tasks.data import MQARData, MQARSegment, SetDisjointnessData
from holdall.theory.messages import Conveyed


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Types a command, and gives its exit status and what it printed."""

    def call(line: str, width: int = 200) -> tuple[int, str]:
        monkeypatch.setattr(theory_messages.console, "width", width)
        monkeypatch.setattr(sys, "argv", ["holdall", "theory", *line.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())

    return call


def test_bits_in_linear_attention_are_beside_their_prediction(typed, tmp_path: Path) -> None:
    status, said = typed(
        f"index --bits 65 --features 17 65 --format int1 --format fp32 --out {tmp_path}/index.png"
    )
    assert status == 0
    assert "bits in linear attention: 65.0 bits to say" in said
    assert "17 fp32 69.69% " in said  # Phi(sqrt(17 / 64))
    assert (tmp_path / "index.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "index.json").read_text())
    assert found["command"].startswith("holdall theory index --bits 65")
    assert found["environment"] == environment.describe("cpu", torch.get_num_threads())
    assert {len(points) for points in found["messages"].values()} == {2}
    status, said = typed("index --bits 40 --one-hot")
    assert "40 int1 100.00% 100.00% 48 40 40.0 38.7 0.8333" in said


def test_every_kind_of_model_can_be_sent(typed, tmp_path: Path) -> None:
    line = "message by-hand:attention linear-attention:feature_dim=4 linformer --width 16 --depth 1 --rows 3"
    status, said = typed(f"{line} --pairs 3 --format int8 --out {tmp_path}/messages.png")
    assert status == 0
    assert "attention by hand: 14.9 bits to say" in said
    assert "int8 100.00%" in said
    assert "linear-attention, feature_dim = 4, random weights: 14.9 bits to say" in said
    assert "linformer, random weights is left out: layer 0, linformer of width 16" in said
    found = json.loads((tmp_path / "messages.json").read_text())["messages"]
    assert all(each["conveyed_bits"] <= each["message_bits"] for points in found.values() for each in points)
    assert (tmp_path / "messages.png").stat().st_size > 10_000


def test_a_language_model_can_be_sent(typed) -> None:
    status, said = typed("message based-mini --pairs 3 --rows 2 --format int4")
    assert status == 0
    assert "based-mini: 21.1 bits to say" in said  # of bytes


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep of one small model."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    segment = MQARSegment(length=16, pairs=2, rows=64)
    task = MQARData(vocab=32, train=(segment,), test=(segment,))
    point = quick.point("attention", "attention", AttentionConfig(width=8))
    model = dataclasses.replace(point.train.model, vocab=32)
    train = dataclasses.replace(
        point.train, model=model, data=task, learning_rates=(0.01,), batch=16, epochs=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "context", children.context)
        config = SweepConfig(recipe="tiny", points=(dataclasses.replace(point, train=train),))
        run_sweep(config, folder, command="holdall frontier tiny", workers=1)
    return folder


def test_the_trained_models_of_a_sweep_are_sent_in_their_own_tokens(typed, sweep: Path) -> None:
    status, said = typed(f"message {sweep} --pairs 4 --rows 3 --format fp32")
    assert status == 0
    assert ": 15.4 bits to say" in said  # 4 of 16 values
    status, said = typed(f"message {sweep} {sweep} --pairs 2 --rows 2 --format fp32")
    assert f"d = 8 ({sweep}): " in said  # not one of them in place of the other
    status, said = typed(f"disjointness {sweep} --first 2 --second 8 --rows 4 --reads 1 --format int4")
    assert status == 0
    assert "attention, d = 8: common element" in said
    status, said = typed(f"disjointness {sweep} --vocab 40")
    assert status == 2
    assert "has 32 tokens, fewer than --vocab 40" in said
    status, said = typed(f"message {sweep} --vocab 64")
    assert status == 2
    assert "has 32 tokens, fewer than --vocab 64" in said


def test_sets_are_compared_in_turns(typed, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sets.json"
    status, said = typed(f"disjointness --first 2 --second 8 --features 0 --rows 8 --format int2 --out {out}")
    assert status == 0
    assert "by hand, one-hot features: common element of two sets, blocked" in said
    for turns in ("1 2 8 int2 1 ×", "1 8 2 int2 1 ×", "2 2 8 int2 3 ×", "2 8 2 int2 3 ×"):
        assert turns in said
    assert said.count("100.0%") == 4
    written = json.loads(out.read_text())
    assert written["command"].startswith("holdall theory disjointness --first 2")
    assert written["environment"]["device"] == "cpu"
    (lines,) = written["turns"].values()
    assert [(line["reads"], line["first"], line["second"]) for line in lines] == [
        (reads, *sizes) for reads in (1, 2) for sizes in ((2, 8), (8, 2))
    ]
    assert all(line["accuracy"] == 1 and len(line["message_bits"]) == 2 * line["reads"] - 1 for line in lines)
    assert [line["conveyed"] and line["conveyed"]["conveyed_bits"] for line in lines] == [6, 8, None, None]
    status, said = typed(
        "disjointness --distribution random --rows 2 --first 3 --second 3 --reads 1 --format fp32"
    )
    assert status == 0
    assert said.count("1 3 3 fp32 1 ×") == 1


def test_floors_are_listed_with_what_they_are_worth(typed) -> None:
    status, said = typed("floors --vocab 8192 --length 1024 --pairs 64")
    assert status == 0
    assert "recall of 64 pairs 767.3 bits of state any causal model yes" in said
    assert "recall, tokens as bits 5 layers BaseConv, no error yes" in said
    assert "0 layers BaseConv, 2 of 3 right no too few pairs" in said
    status, said = typed("floors --pairs 600")
    assert status == 2
    assert "pairs do not fit into length 1024" in said


def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d[\d,.]*%?", text)


def test_no_number_is_cut_off_in_80_columns(typed) -> None:
    for line in (
        "index --bits 17 --features 10000 --rows 1 --format int8+feedback",
        "message attention --pairs 3 --rows 1",
        "disjointness --first 2 --second 8 --rows 2 --reads 1 --format int4",
        "floors --vocab 50257 --length 100000 --pairs 20000",
    ):
        (status, said), (_, wide) = typed(line, 80), typed(line)
        assert status == 0
        assert "…" not in said, line
        if "floors" not in line:  # whose words are folded
            assert numbers_in(said) == numbers_in(wide), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_models_by_hand_run_on_the_device_asked_for(typed) -> None:
    assert typed("disjointness --first 1 --second 1 --rows 1 --format fp32")[0] == 0
    small = "--bits 5 --features 5", "--first 2 --second 2", "attention --length 16 --pairs 2 --rows 1"
    for command, sizes in zip(("index", "disjointness", "mqar"), small, strict=True):
        status, said = typed(f"{command} {sizes} --device cuda")
        assert status == 2
        assert "no CUDA device is available here; use --device cpu" in said


def test_the_recipe_that_refusals_name_trains_on_sets() -> None:
    points = recipes.sweeps(theory_messages.ON_SETS)[0].points
    assert all(isinstance(point.train.data, SetDisjointnessData) for point in points)


def test_what_was_mistyped_is_refused_by_name(typed) -> None:
    for line, why in (
        ("message attentoin", "neither a mixer nor a folder 'attentoin'. Did you mean 'attention'?"),
        ("message qqqq", "there is no folder qqqq. Name a run folder"),
        ("message attention by-hand:taylr", "Did you mean 'taylor'"),
        (
            "disjointness by-hand:attention",
            "by-hand:attention is built for pairs, not for sets. Leave it out",
        ),
        ("disjointness mamba-2:state=4", "mamba-2:state=4 is a mixer, which has not been trained. Leave it"),
        (
            "disjointness mamba-2",
            "name a folder of trained models: `holdall frontier jrt-figure2-small` writes",
        ),
        ("message by-hand:taylr", "Did you mean 'taylor'"),
        ("message attention --format int3", "unknown format 'int3'"),
        ("message attention --pairs 40", "raise vocab to 82"),
        ("index --one-hot --format int1+stochastic", "leave +stochastic out"),
        ("index --out bits.json", "bits.json is where the numbers go: name the picture another way"),
        ("message --out bits.json", "bits.json is where the numbers go: name the picture another way"),
    ):
        status, said = typed(line)
        assert status == 2, said
        assert why in said


def point(sent: int, conveyed: float) -> Conveyed:
    return Conveyed(
        format="fp32", rows=3, entropy_bits=50.0, message_bits=sent, element_bits=sent, accuracy=0.5,
        fano_bits=conveyed, probability_bits=0.0, conveyed_bits=conveyed, at_least_bits=conveyed / 2,
    )  # fmt: skip


@pytest.mark.parametrize(("models", "sent"), [(2, 9), (2, 1), (1, 1 << 22), (40, 300)])
def test_the_picture_has_each_model_below_the_diagonal_and_no_words_on_it(models: int, sent: int) -> None:
    labels = [f"Taylor by hand, f = 16, dv = {number}" for number in range(models)]
    points = [[point(sent * 32, 10 / (number + 1)), point(sent, 0)] for number in range(models)]
    figure = picture.draw(dict(zip(labels, points, strict=True)))
    (axes,) = figure.axes
    lines = {line.get_gid(): line for line in axes.lines}
    assert list(lines[f"model:{labels[0]}"].get_xdata()) == [sent, sent * 32]
    assert list(lines[f"model:{labels[-1]}"].get_ydata()) == [picture.LEAST, 10 / models]
    (impossible,) = [patch for patch in axes.collections if patch.get_gid() == "impossible"]
    low = axes.get_xlim()[0]
    assert low <= sent
    assert axes.get_ylim()[0] <= low  # so that the diagonal is there
    assert impossible.get_paths()
    assert not axes.texts
    renderer = figure.canvas.get_renderer()
    legend = axes.get_legend()
    box = legend.get_window_extent(renderer)
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert box.x1 <= figure.bbox.x1
    assert {"all there is to say", "impossible: more\nconveyed than sent"} < {
        text.get_text() for text in legend.get_texts()
    }
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [label.get_window_extent(renderer) for label in axis.get_ticklabels()]
        assert len(boxes) >= 3
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
        assert all(figure.bbox.x0 <= one.x0 and one.x1 <= figure.bbox.x1 for one in boxes)


def test_nothing_is_no_picture() -> None:
    with pytest.raises(ValueError, match="no message to draw"):
        picture.draw({})
