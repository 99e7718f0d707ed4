"""The recipes of set disjointness: published sizes, what they do otherwise, and a sweep from end to end."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from holdall import recipes
from holdall.model import seeded
from holdall.recipes import jrt_figure2, jrt_figure2_small
from holdall.report import orders
from holdall.report.data import load
from holdall.sweeps import SweepConfig, run_sweep
from holdall.sweeps.result import proven_bits
from holdall.tasks.data import MQARData, SetDisjointnessData, SetSegment
from holdall.tasks.information import Asked, index_bits
from holdall.training.populations import train


def built(family: str, **changes: object):
    """A model of the published recipe and its task's data, narrow and with few tokens."""
    (sweep,) = recipes.sweeps("jrt-figure2", width=(36,))
    point = next(point for point in sweep.points if point.family == family)
    with seeded(0):
        return replace(point.train.model, vocab=300, **changes).build().double()


# ---------------------------------------------------------------------------------------------- as published


def test_sizes_rates_and_epochs_are_those_published() -> None:
    (sweep,) = recipes.sweeps("jrt-figure2", seeds=2)
    assert Counter(point.family for point in sweep.points) == {jrt_figure2.CAUSAL: 20, jrt_figure2.WHOLE: 20}
    assert {point.train.model.width for point in sweep.points} == {36, 48, 64, 96, 128}
    data = sweep.data
    assert isinstance(data, SetDisjointnessData)
    assert (data.vocab, data.answer, data.distribution, data.reads) == (2048, "element", "random", 1)
    sizes = [(s.first, s.second, s.rows) for s in data.train]
    assert sorted(sizes) == sorted(
        (*pair, 20_000)
        for pair in [(4, 16), (16, 4), (8, 32), (32, 8), (64, 16), (16, 64), (4, 128), (128, 4), (16, 256),
                     (256, 16), (4, 256), (256, 4)]
    )  # fmt: skip
    tested = {(s.first, s.second) for s in data.test}
    assert len(tested) == len(data.test) == 20
    assert {(16, 768), (768, 16), (1, 32), (32, 1)} < tested
    for point in sweep.points:
        train = point.train
        assert [layer.name for layer in train.model.layers[::2]] == ["base-conv"] * 2
        assert (train.batch, train.epochs, train.schedule, train.weight_decay) == (128, 48, "epoch", 0.1)
        assert train.learning_rates == (1e-4, 5e-4, 8e-4)
        assert train.model.layers[1].heads == 2
        if point.family == jrt_figure2.WHOLE:
            assert train.model.layers[1].prefix == data.longest == 787


def test_fewer_steps_are_as_many_as_asked_for_on_no_more_rows_than_published() -> None:
    for steps in (12, 600, 1884, 6000):
        (sweep,) = recipes.sweeps("jrt-figure2", steps=steps, width=(36,))
        (job, *_) = sweep.jobs(together=True)
        assert steps * 0.95 <= job.steps <= steps
        assert max(segment.rows for segment in sweep.data.train) <= 20_000 + 127
        assert job.point.train.schedule == "step"
    for name in ("jrt-figure2", "jrt-figure2-small"):
        with pytest.raises(ValueError, match="1 steps are fewer than one for each"):
            recipes.sweeps(name, steps=1)
        with pytest.raises(ValueError, match="depth 3 is odd"):
            recipes.sweeps(name, depth=3)


# ------------------------------------------------------------------------------------------------ deviations


@pytest.mark.claim("recipes/jrt_figure2.py", "no dropout")
@torch.no_grad()
def test_nothing_is_dropped_and_passes_are_in_bf16() -> None:
    (sweep,) = recipes.sweeps("jrt-figure2")
    assert {point.train.precision for point in sweep.points} == {"bf16"}
    model, ids_BT = built(jrt_figure2.CAUSAL), torch.arange(10)[None]
    assert torch.equal(model.train()(ids_BT)[0], model.eval()(ids_BT)[0])


@pytest.mark.claim("recipes/jrt_figure2.py", "a layer has no MLP")
@torch.no_grad()
def test_a_layer_adds_its_mixers_output_alone_and_an_mlp_only_if_asked_for() -> None:
    model = built(jrt_figure2.CAUSAL)
    x_BTD, block = torch.randn(2, 7, 36, dtype=torch.float64), model.blocks[0]
    y_BTD, _ = block(x_BTD, tokens_BT=torch.zeros(2, 7, dtype=torch.long))
    torch.testing.assert_close(y_BTD, x_BTD + block.mixer(block.norm(x_BTD))[0], rtol=1e-12, atol=1e-12)
    (sweep,) = recipes.sweeps("jrt-figure2", mlp=4)
    assert all(point.train.model.mlp == 4 * point.train.model.width for point in sweep.points)


@pytest.mark.claim("recipes/jrt_figure2.py", "causal outputs are divided")
@torch.no_grad()
def test_the_weights_of_the_past_sum_to_one() -> None:
    """Of equal tokens the output is the same however many there are; divided by the last weight alone, it
    would grow with them."""
    mixer = built(jrt_figure2.CAUSAL).blocks[1].mixer
    x_BTD = torch.randn(1, 1, 36, dtype=torch.float64).expand(1, 9, 36)
    y_BTD, _ = mixer(x_BTD)
    torch.testing.assert_close(y_BTD, y_BTD[:, :1].expand_as(y_BTD), rtol=1e-9, atol=1e-12)


@pytest.mark.claim("recipes/jrt_figure2.py", "models that read the whole input have keys")
@torch.no_grad()
def test_models_that_read_all_first_see_the_second_set_from_the_first_by_keys_of_its_own() -> None:
    seen = {}
    for family in (jrt_figure2.CAUSAL, jrt_figure2.WHOLE):
        model = built(family)
        one = torch.arange(4, 24)[None]
        other = one.clone()
        other[0, -4:] += 100
        hidden = [model.hidden(ids_BT)[0][0, :10] for ids_BT in (one, other)]
        seen[family] = not torch.equal(*hidden)
    assert seen == {jrt_figure2.CAUSAL: False, jrt_figure2.WHOLE: True}
    mixer = built(jrt_figure2.WHOLE).blocks[1].mixer
    x_BTD = torch.randn(1, 9, 36, dtype=torch.float64)
    before, _ = mixer(x_BTD)
    mixer.prefix_kv.weight.mul_(-1)
    assert not torch.equal(mixer(x_BTD)[0], before)


@pytest.mark.claim("recipes/jrt_figure2.py", "convolutions are causal")
@torch.no_grad()
def test_the_convolution_sees_nothing_later() -> None:
    conv = built(jrt_figure2.WHOLE).blocks[0].mixer
    x_BTD = torch.randn(1, 9, 36, dtype=torch.float64)
    other_BTD = x_BTD.clone()
    other_BTD[:, 5:] += 1
    assert torch.equal(conv(x_BTD)[0][:, :5], conv(other_BTD)[0][:, :5])


# ----------------------------------------------------------------------------------------- a sweep, and flags


def test_a_tiny_sweep_trains_both_kinds_and_draws_both_orders(tmp_path: Path) -> None:
    (sweep,) = recipes.sweeps("jrt-figure2-small", steps=6, rates=(0.01,))
    kinds = {point.family: point for point in sweep.points}
    sweep = SweepConfig(recipe=sweep.recipe, points=tuple(kinds.values()))
    for job in sweep.jobs(together=False):
        train(job.point.train, tmp_path / "runs" / job.folder)
    lines = run_sweep(sweep, tmp_path, workers=1, minutes=0)  # collects them
    firsts = {str(segment.first) for segment in sweep.data.test}
    assert [set(line["accuracy_by_difficulty"]) for line in lines] == [firsts] * 2
    # the counter of tokens read, an int64 in each of two layers, is all that tells their states apart
    causal, whole = (line["state_bytes"] for line in lines)
    assert whole == causal + 2 * 8
    config = json.loads((tmp_path / "config.json").read_text())
    for part, segment in zip(config["test"], sweep.data.test, strict=True):
        asked = sweep.data.asked(segment)
        assert (part["questions"], part["values"], part["distinct"]) == (*asked[:2], False)
    (read,) = load([tmp_path])
    assert read.questions == [sweep.data.asked(segment) for segment in sweep.data.test]
    assert orders.has_orders(read)
    drawn = {line.get_gid() for axes in orders.draw(read).axes for line in axes.lines}
    assert {f"family:{jrt_figure2.CAUSAL}", f"family:{jrt_figure2.WHOLE}", "floor"} <= drawn


def test_bits_are_proven_by_the_easiest_of_the_segments_that_share_an_accuracy() -> None:
    task = SetDisjointnessData(
        vocab=256,
        train=(SetSegment.of(4, 16, 8),),
        test=(SetSegment.of(4, 8, 8), SetSegment.of(4, 16, 8), SetSegment.of(16, 4, 8)),
    )
    assert [task.asked(segment) for segment in task.test] == [
        Asked(4, 8, False), Asked(4, 16, False), Asked(16, 4, False)
    ]  # fmt: skip
    assert proven_bits(task, {"4": 0.9, "16": 0.3}) == index_bits(4, 8, 0.9)
    assert proven_bits(task, {"4": 0.9, "16": 0.9}) == index_bits(16, 4, 0.9)
    assert proven_bits(task, {}) == 0


def test_passes_are_a_flag_of_recipes_that_have_something_to_read_again() -> None:
    (quick,) = recipes.sweeps("quick", passes=3)
    (once,) = recipes.sweeps("quick")
    assert isinstance(quick.data, MQARData)
    assert quick.data.passes == 3
    assert [quick.data.row_length(s) - once.data.row_length(s) for s in quick.data.test] == [16, 32, 64]
    for name, module in (("jrt-figure2", jrt_figure2), ("jrt-figure2-small", jrt_figure2_small)):
        (sweep,) = recipes.sweeps(name, passes=2)
        assert sweep.data.reads == 2
        whole = [p.train.model.layers[-1] for p in sweep.points if p.family == jrt_figure2.WHOLE]
        assert {layer.prefix for layer in whole} == {2 * module.data().longest}
    with pytest.raises(ValueError, match="no pairs to read in 2 passes"):
        recipes.sweeps("quick", task="induction-heads", passes=2)
    with pytest.raises(ValueError, match="has no --passes"):
        recipes.sweeps("zoo", passes=2)
