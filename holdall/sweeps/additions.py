"""Mixers that are added to any sweep: trained and tested exactly as the sweep's own models are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from holdall import mixers
from holdall.contract import MixerConfig
from holdall.sweeps.config import Point, SweepConfig
from holdall.training.populations import TrainConfig


class Frame(NamedTuple):
    """A training without its mixer: what the models of a sweep have in common at one width."""

    layers: tuple[MixerConfig | None, ...]
    """None where the mixer stood: in the last layer, and in every other that has the same one."""
    model: tuple[Any, ...]
    """The other fields of the model's config."""
    train: tuple[Any, ...]
    """The other fields of the training's config."""


def with_added(sweep: SweepConfig, wanted: Sequence[str]) -> SweepConfig:
    """The sweep and a point for each mixer at each of the sweep's widths.

    A mixer takes the place of the last layer, and of every other layer that has the same mixer as the last,
    in the layers that most points share, and in the model and training that most of these share at that
    width: their task, steps and learning rates. The options `max_length`, `layer` and `layers`, where a mixer
    has them and they are not given, are those of the task's longest row and of the layer's place.

    Args:
        wanted: registered mixers, each as NAME or NAME:option=value,option=value.

    Raises KeyError, TypeError or ValueError for an unknown mixer, an unknown option or a bad value.
    """
    points = list(sweep.points)
    for text in wanted:
        for width in dict.fromkeys(point.train.model.width for point in sweep.points):
            point = _point(text, most_shared(sweep, width))
            if not any(other.label == point.label and other.train == point.train for other in points):
                points.append(point)
    return dataclasses.replace(sweep, points=tuple(points))


def most_shared(sweep: SweepConfig, width: int) -> TrainConfig:
    """The training of a point of this width whose layers and frame most points have."""
    ((shared, _),) = Counter(_names(point.train) for point in sweep.points).most_common(1)
    there = [point.train for point in sweep.points if point.train.model.width == width]
    trains = [train for train in there if _names(train) == shared] or there
    ((same, _),) = Counter(map(frame, trains)).most_common(1)
    return next(train for train in trains if frame(train) == same)


def _names(train: TrainConfig) -> tuple[str, ...]:
    """The mixers of a frame's layers, whatever their width."""
    return tuple(layer.name if layer else "" for layer in frame(train).layers)


def frame(train: TrainConfig) -> Frame:
    """What is left of a training once the mixer is taken out."""
    model = train.model
    layers = tuple(None if layer.name == model.layers[-1].name else layer for layer in model.layers)
    return Frame(layers, _others(model, "layers"), _others(train, "model"))


def _others(config: Any, left_out: str) -> tuple[Any, ...]:
    return tuple(
        getattr(config, field.name) for field in dataclasses.fields(config) if field.name != left_out
    )


def _point(text: str, train: TrainConfig) -> Point:
    """The point of a mixer in the frame of this training."""
    model, layers, label = train.model, [], ""
    for place, layer in enumerate(frame(train).layers):
        if layer is None:
            depth = {"max_length": train.data.longest, "layer": place, "layers": len(model.layers)}
            label, layer = mixers.configured(text, model.width, depth)
        layers.append(layer)
    model = dataclasses.replace(model, layers=tuple(layers))
    return Point(label=label, family=layers[-1].name, train=dataclasses.replace(train, model=model))
