"""The picture of a compiled circuit shows what its layers' weights do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import random_circuits

from holdall.report import circuits
from holdall.report.circuits import KEPT, MULTIPLIED, SHIFTED, UNUSED, WRITTEN, uses
from holdall.theory.circuits import Circuit
from holdall.theory.compile import compile_circuit, compile_formula
from holdall.theory.schedule import Schedule


def test_what_each_layer_does_to_each_channel() -> None:
    circuit = Circuit.trace(lambda x: x[0] * x[1] + x[1], 2)
    assert uses(compile_circuit(circuit)).tolist() == [
        [UNUSED, WRITTEN, WRITTEN],
        [UNUSED, SHIFTED, SHIFTED],
        [UNUSED, WRITTEN, KEPT],
        [UNUSED, MULTIPLIED, KEPT],
        [WRITTEN, UNUSED, UNUSED],
    ]
    formula = compile_formula(Circuit.trace(lambda x: x[0] * x[1], 2))
    assert uses(formula).tolist() == [
        [UNUSED, WRITTEN, WRITTEN],
        [UNUSED, SHIFTED, SHIFTED],
        [UNUSED, MULTIPLIED, UNUSED],
    ]


def test_no_more_channels_are_in_use_than_the_compiler_says() -> None:
    """Two counts of the same: from the weights, and from who writes and reads which wire."""
    for seed in range(60):
        compiled = random_circuits.compiled(seed)
        if compiled is None:
            continue
        table = uses(compiled)[:-1]  # the last layer writes outputs
        most = int((table != UNUSED).sum(axis=1).max(initial=0))
        assert most == Schedule(compiled.circuit).most_live, seed


def test_the_picture_is_the_table(tmp_path: Path) -> None:
    compiled = random_circuits.compiled(8)
    assert compiled is not None
    figure = circuits.draw(compiled, "a title")
    (axes,) = figure.axes
    (image,) = axes.get_images()
    assert (np.asarray(image.get_array()) == uses(compiled)).all()
    assert "a title" in {text.get_text() for text in figure.texts}
    assert len(figure.legends[0].get_texts()) == len(circuits.LOOKS)
    written = circuits.write(
        tmp_path / "new" / "circuit.png", compiled, "x", command="holdall theory circuit"
    )
    assert b"holdall theory circuit" in written.read_bytes()
