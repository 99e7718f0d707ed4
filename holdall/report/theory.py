"""Recall by hand as a page that steps through it: one HTML file that opens offline.

What it shows is computed by holdall/theory/walks.py. A key is shown as a letter, a value as a number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from holdall.report import shell
from holdall.report.matrix import DARK, LIGHT
from holdall.tasks.mqar import Batch
from holdall.theory.by_hand import Report
from holdall.theory.walks import TRIALS, VOCAB, Walk, costs, row, walks_of

LENGTHS, LARGE_VOCAB = (64, 256, 1024), 8192
"""Rows and vocabulary for which the page says what each construction would cost."""


def save(path: Path) -> None:
    """Write the page to `path`: about 300 KB."""
    path.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page as text."""
    rows = row()
    walks = walks_of(rows)
    large = {length: costs(LARGE_VOCAB, length) for length in LENGTHS}
    return shell.render(
        "theory.html",
        data={
            "tokens": [_token(token) for token in rows.tokens[0].tolist()],
            "questions": _questions(rows),
            "walks": [_walk(walk) for walk in walks],
            "light": LIGHT,
            "dark": DARK,
        },
        titles=[walk.title for walk in walks],
        length=rows.tokens.shape[1],
        vocab=VOCAB,
        trials=TRIALS,
        most=len(walks[-1].report_S),
        lengths=[f"{length:,}" for length in LENGTHS],
        large_vocab=f"{LARGE_VOCAB:,}",
        costs=[
            {
                "title": title,
                "sizes": [
                    (f"{cost.width:,}", f"{cost.state_elements:,}")
                    for length in LENGTHS
                    for cost in large[length]
                    if cost.title == title
                ],
            }
            for title in [cost.title for cost in large[LENGTHS[0]]]
        ],
    )


def _token(token: int) -> dict[str, Any]:
    """A token as the page shows it: keys are letters, values numbers, token 0 a dot."""
    half = VOCAB // 2
    if token == 0:
        return {"text": "·", "kind": "filler"}
    if token < half:
        return {"text": chr(ord("A") + token - 1), "kind": "key"}
    return {"text": str(token - half + 1), "kind": "value"}


def _questions(rows: Batch) -> list[dict[str, int]]:
    columns = (rows.positions[0], 2 * rows.places[0] + 1, rows.tags.distance[0])
    return [
        {"at": at, "value": value, "distance": distance}
        for at, value, distance in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _walk(walk: Walk) -> dict[str, Any]:
    right_SK, accuracy_S = walk.right_SK, walk.accuracy_S
    return {
        "title": walk.title,
        "groups": walk.groups,
        "activations": [_plain(layer_DT) for layer_DT in walk.activations_LDT],
        "steps": [
            {
                "title": step.title,
                "says": step.says,
                "layer": step.layer,
                "grid": None if step.grid_TJ is None else _plain(step.grid_TJ),
                "gridSays": step.grid_says,
                "table": step.table,
                "linked": step.linked,
                "answered": step.answered,
            }
            for step in walk.steps
        ],
        "counts": [_counts(report) for report in (walk.report_S or (walk.report,))],
        "widthSays": walk.width_says,
        "answers": [_token(token)["text"] for token in walk.answers_K.tolist()],
        "table": None if walk.table_TLF is None else [_plain(table_LF) for table_LF in walk.table_TLF],
        "right": None if right_SK is None else right_SK.tolist(),
        "accuracy": None if accuracy_S is None else [round(share, 4) for share in accuracy_S.tolist()],
    }


def _counts(report: Report) -> dict[str, int]:
    return {
        "width": report.width,
        "layers": report.layers,
        "state": report.state_elements,
        "used": report.used_state,
        "nonZeros": report.non_zeros,
    }


def _plain(matrix: Tensor) -> list[list[float | int]]:
    """A matrix as short JSON numbers: three digits behind the point, and none where there is nothing."""
    rounded = [[round(value, 3) for value in line] for line in matrix.tolist()]
    return [[int(value) if value == int(value) else value for value in line] for line in rounded]
