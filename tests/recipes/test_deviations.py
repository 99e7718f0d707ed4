"""What the published experiments' recipes do otherwise than the experiments."""

from dataclasses import fields, replace

import pytest
import torch

from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig
from holdall.recipes import based_figure2, synthetics, zoology_figure2
from holdall.testing import laws
from holdall.training.populations import TrainConfig


@pytest.mark.claim("recipes/synthetics.py", "100 epochs", "the published learning rate", "the gated state")
def test_synthetics_train_shorter_and_with_a_second_rate() -> None:
    epochs = {sweep.part: sweep.points[0].train.epochs for sweep in synthetics.sweeps()}
    assert epochs == {
        "induction-heads": 100,
        "associative-recall": 100,
        "induction-heads-answers": 50,
        "associative-recall-answers": 50,
    }
    for sweep in synthetics.sweeps():
        assert {point.train.learning_rates for point in sweep.points} == {(0.0005, 4 * 0.0005)}
        assert {point.train.schedule for point in sweep.points} == {"step"}  # a cosine to zero
        (gated,) = [point for point in sweep.points if point.family == "gated state space"]
        assert [layer.modes for layer in gated.train.model.layers] == [64, 64]


@pytest.mark.claim("recipes/synthetics.py", "no dropout")
@pytest.mark.claim("recipes/zoology_figure2.py", "no dropout")
def test_nothing_is_dropped_in_training() -> None:
    """There is no such setting, and a model that trains puts out the same twice, and what it does in use."""
    assert not [
        field.name for kind in (ModelConfig, TrainConfig) for field in fields(kind) if "drop" in field.name
    ]
    for sweep in (synthetics.sweeps()[0], zoology_figure2.sweeps()[0]):
        config = next(point for point in sweep.points if point.family == "attention").train.model
        model = replace(config, vocab=11).build()
        ids_BT = torch.arange(10)[None]
        first, second, used = model(ids_BT)[0], model(ids_BT)[0], model.eval()(ids_BT)[0]
        laws.assert_bitwise("again", second, first)
        laws.assert_bitwise("in use", used, first)


@pytest.mark.claim("recipes/zoology_figure2.py", "a model without MLP")
@torch.no_grad()
def test_without_an_mlp_a_layer_adds_its_mixers_outputs_alone() -> None:
    points = zoology_figure2.sweeps()[0].points
    assert {point.train.model.mlp for point in points} == {0}
    model = replace(points[0].train.model, vocab=11).build().double()
    x_BTD = laws.draw(2, 10, model.config.width, dtype=torch.float64)
    block = model.blocks[0]
    y_BTD, _ = block(x_BTD, tokens_BT=torch.zeros(2, 10, dtype=torch.long))
    laws.assert_close("y", y_BTD, x_BTD + block.mixer(block.norm(x_BTD))[0])


@pytest.mark.claim("recipes/zoology_figure2.py", "Hyena's filters")
def test_hyenas_filters_are_narrow() -> None:
    """Published are the 64 of Zoology's default."""
    points = [point for recipe in (zoology_figure2, based_figure2) for point in recipe.sweeps()[0].points]
    layers = [layer for point in points if point.family == "Hyena" for layer in point.train.model.layers]
    assert {layer.hidden for layer in layers} == {16}


@pytest.mark.claim("recipes/based_figure2.py", "as in zoology_figure2")
def test_based_figure2_trains_in_bf16_with_windows_of_one_more() -> None:
    (sweep,) = based_figure2.sweeps()
    assert {point.train.precision for point in sweep.points} == {"bf16"}
    assert {point.train.model.mlp for point in sweep.points} == {0}
    layers = [layer for point in sweep.points for layer in point.train.model.layers]
    windows = [layer.window for layer in layers if isinstance(layer, SlidingWindowConfig)]
    assert windows == [9, 17, 33, 65, 129, 257, 513, 1025]
