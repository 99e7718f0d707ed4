"""Mixing matrices side by side, as a folder: matrix.json says what they are, matrix.npz holds the numbers.

The arrays of matrix.npz are plain numbers, one (S, N, N) per mixer under its label; nothing is pickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from holdall import files
from holdall.files import RunError

FORMAT = "holdall-matrix-1"
"""Written into every matrix.json; changes when a folder of before can no longer be read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixingMatrix:
    """The matrix of one mixer for one input, and what can be said of it.

    Attributes:
        label: the name to show.
        kind: "exact" or "jacobian"; see holdall.analysis.matrix.
        source: the function whose matrix it is; empty for a Jacobian.
        beside: other functions of the mixer that couple tokens.
        unit: "head" if all channels of a head share a matrix, "channel" if each has its own.
        count: how many heads or channels there are.
        shown: which of them `values_STJ` holds.
        causal: no token takes anything from a later one.
        toeplitz: distance to the nearest Toeplitz matrix, relative; about 0 for a convolution.
        rank: of the lower left quarter M[N/2:, :N/2], to rounding; the largest of all heads. For a Jacobian
            that of the whole block d y / d x: how many numbers of the state matter. None if it is too large.
        full_rank: the largest rank that a block of its size can have.
        rank_1: the lowest rank of a block that is within 1% of it.
        state: elements of the mixer's whole state where that quarter begins.
        sparsity: share of the entries (of a causal matrix: of j <= t) below 1/1000 of their row's largest.
        error: of M v against the recorded output, relative; 0 for a Jacobian, which rebuilds nothing.
    """

    label: str
    kind: Literal["exact", "jacobian"]
    source: str
    beside: tuple[str, ...]
    unit: Literal["head", "channel", "mixer"]
    count: int
    shown: tuple[int, ...]
    values_STJ: np.ndarray
    causal: bool
    toeplitz: float
    rank: int | None
    full_rank: int
    rank_1: int | None
    state: int
    sparsity: float
    error: float

    @property
    def is_toeplitz(self) -> bool:
        return self.toeplitz < 1e-6

    @property
    def of(self) -> str:
        """What the matrix is of, in words."""
        if self.kind == "jacobian":
            return "Jacobian"
        if self.count == 1:
            return "exact"
        if len(self.shown) == 1:
            return f"exact, {self.unit} {self.shown[0] + 1} of {self.count}"
        return f"exact, {len(self.shown)} of {self.count} {self.unit}s"

    @property
    def rank_text(self) -> str:
        return "-" if self.rank is None else f"{self.rank} of {self.full_rank}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """Matrices of several mixers for one input.

    Attributes:
        command: what made it.
        length: tokens, N.
        width: channels of the input; a mixer may have been given another.
        input: which kind of input, in words.
        tokens: a name for each token; empty if all are unlike.
        matrices: in the order to show them.
        failures: why a mixer has no matrix, by label.
        environment: versions and hardware.
    """

    command: str
    length: int
    width: int
    input: str
    tokens: tuple[str, ...]
    matrices: tuple[MixingMatrix, ...]
    failures: Mapping[str, str]
    environment: Mapping[str, Any]


def save(gallery: Gallery, folder: Path) -> list[Path]:
    """Write matrix.npz and matrix.json into the folder; returns their paths."""
    files.make_folder(folder)
    numbers, about = folder / "matrix.npz", folder / "matrix.json"
    files.write_arrays(numbers, {each.label: each.values_STJ for each in gallery.matrices})
    files.write_json(
        about, {"format": FORMAT, **_plain(gallery), "matrices": list(map(_plain, gallery.matrices))}
    )
    return [about, numbers]


def _plain(value: Gallery | MixingMatrix) -> dict[str, Any]:
    """The fields but arrays."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: item for name, item in fields.items() if name not in ("values_STJ", "matrices")}


AGAIN = "Make it again with `holdall matrix`."


def load(folder: Path) -> Gallery:
    """Read what `save` wrote. Raises RunError, which names the file that is missing or damaged."""
    from holdall.contract import check_fields  # not above: it needs PyTorch, which pages do without

    about, arrays = folder / "matrix.json", folder / "matrix.npz"
    if not about.exists():
        raise RunError(f"{folder} holds no matrix.json: `holdall matrix --out {folder}` makes one")
    plain = files.read_json(about, AGAIN)
    if plain.pop("format", None) != FORMAT:
        raise RunError(f"{about} is not of the format {FORMAT}. {AGAIN}")
    numbers = files.read_arrays(arrays, AGAIN)
    try:
        entries = [{**_tuples(each), "values_STJ": numbers[each["label"]]} for each in plain["matrices"]]
        matrices = tuple(MixingMatrix(**check_fields(MixingMatrix, entry)) for entry in entries)
        gallery = Gallery(**check_fields(Gallery, {**_tuples(plain), "matrices": matrices}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise files.damaged(about, f"it holds no matrices ({error!r})", AGAIN) from error
    for each in matrices:
        shape = (len(each.shown), gallery.length, gallery.length)
        if each.values_STJ.shape != shape or not np.isfinite(each.values_STJ).all():
            reason = f"{each.label!r} is {each.values_STJ.shape} or not finite, where {shape} is needed"
            raise files.damaged(arrays, reason, AGAIN)
        if not all(0 <= shown < each.count for shown in each.shown) or min(each.count, each.full_rank) < 1:
            raise files.damaged(about, f"{each.label!r} shows what it does not have", AGAIN)
    if len(gallery.tokens) not in (0, gallery.length):
        raise files.damaged(about, f"it names {len(gallery.tokens)} tokens of {gallery.length}", AGAIN)
    return gallery


def _tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
