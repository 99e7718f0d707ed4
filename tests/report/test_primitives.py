"""The picture of BaseConv's primitives shows the numbers that the layers have."""

from __future__ import annotations

import pytest

from holdall.report import primitives as picture
from holdall.theory.primitives import examples


@pytest.mark.parametrize("dark", [False, True])
def test_every_primitive_is_drawn_with_its_numbers(dark: bool) -> None:
    figure = picture.draw(dark=dark)
    axes = {panel.get_gid(): panel for panel in figure.axes}
    assert set(axes) == {f"{example.name}: {name}" for example in examples() for name in picture.COLUMNS}
    for example in examples():
        shown = [float(text.get_text()) for text in axes[f"{example.name}: output"].texts]
        assert shown == example.output().T.flatten().tolist()
        gate = [float(text.get_text()) for text in axes[f"{example.name}: gate P and p"].texts]
        layer = example.layer
        row = layer.gate.get(0, {})
        assert gate == [row.get(0, 0), row.get(1, 0), layer.gate_bias.get(0, 0)]
    words = {text.get_text() for text in figure.texts}
    assert {example.says for example in examples()} <= words


def test_nothing_is_drawn_outside_of_the_picture_or_over_its_neighbour() -> None:
    figure = picture.draw()
    boxes = [panel.get_position() for panel in figure.axes]
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1
    for k, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:k])
