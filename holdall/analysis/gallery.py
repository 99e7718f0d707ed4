"""Mixing matrices of several mixers, as a folder: matrix.json describes them, matrix.npz holds their entries.

matrix.npz has one array (S, N, N) per mixer, under its label; nothing is pickled.
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
"""Format version in every matrix.json; changes when older folders can no longer be read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MixingMatrix:
    """The matrix of one mixer for one input, and its properties."""

    label: str
    """The name to display."""
    kind: Literal["exact", "jacobian"]
    """See holdall.analysis.matrix."""
    source: str
    """The function whose matrix it is; empty for a Jacobian."""
    beside: tuple[str, ...]
    """Other functions of the mixer that couple tokens."""
    unit: Literal["head", "channel", "mixer"]
    """What has a matrix of its own: each head, each channel, or (a Jacobian) the whole mixer."""
    count: int
    """Number of heads or channels."""
    shown: tuple[int, ...]
    """Indices of the heads or channels in `values_STJ`."""
    values_STJ: np.ndarray
    """Entries of the matrices, or norms of the Jacobian's blocks."""
    causal: bool
    """Whether no output depends on a later token."""
    toeplitz: float
    """Relative distance to the nearest Toeplitz matrix; about 0 for a convolution."""
    rank: int | None
    """Rank of the lower left quarter M[N/2:, :N/2], up to rounding; the largest of all heads. For a Jacobian,
    of the whole block d y / d x: the number of state elements that matter. None if the block is too large.
    """
    full_rank: int
    """The largest possible rank of such a block."""
    rank_1: int | None
    """Lowest rank of a matrix within 1% of the block."""
    state: int
    """Elements of the mixer's whole state after N/2 tokens."""
    sparsity: float
    """Share of the entries (j <= t, if causal) that are below 1/1000 of the largest in their row."""
    error: float
    """Relative error of M v against the recorded output; 0 for a Jacobian, which is not checked."""

    @property
    def is_toeplitz(self) -> bool:
        return self.toeplitz < 1e-6

    @property
    def of(self) -> str:
        """What the matrix describes, for display."""
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
    """Matrices of several mixers for one input."""

    command: str
    """The command that made it."""
    length: int
    """Number of tokens, N."""
    width: int
    """Width of the input, unless a mixer's options give another."""
    input: str
    """Description of the input."""
    tokens: tuple[str, ...]
    """A name for each token; empty if all tokens differ."""
    matrices: tuple[MixingMatrix, ...]
    """In the order of display."""
    failures: Mapping[str, str]
    """Why a mixer has no matrix, by label."""
    environment: Mapping[str, Any]
    """Versions and hardware."""


def save(gallery: Gallery, folder: Path) -> list[Path]:
    """Write matrix.npz and matrix.json into the folder; returns their paths."""
    files.make_folder(folder)
    arrays, about = folder / "matrix.npz", folder / "matrix.json"
    files.write_arrays(arrays, {matrix.label: matrix.values_STJ for matrix in gallery.matrices})
    files.write_json(
        about, {"format": FORMAT, **_plain(gallery), "matrices": list(map(_plain, gallery.matrices))}
    )
    return [about, arrays]


def _plain(value: Gallery | MixingMatrix) -> dict[str, Any]:
    """All fields except arrays."""
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: item for name, item in fields.items() if name not in ("values_STJ", "matrices")}


AGAIN = "Make it again with `holdall matrix`."


def load(folder: Path) -> Gallery:
    """Read what `save` wrote. Raises RunError, which names the file that is missing or damaged."""
    from holdall.contract import (
        check_fields,
    )  # imported here, since it imports PyTorch, which reports do not need

    about, npz = folder / "matrix.json", folder / "matrix.npz"
    if not about.exists():
        raise RunError(f"{folder} holds no matrix.json: `holdall matrix --out {folder}` makes one")
    plain = files.read_json(about, AGAIN)
    if plain.pop("format", None) != FORMAT:
        raise RunError(f"{about} is not of the format {FORMAT}. {AGAIN}")
    arrays = files.read_arrays(npz, AGAIN)
    try:
        entries = [{**_tuples(entry), "values_STJ": arrays[entry["label"]]} for entry in plain["matrices"]]
        matrices = tuple(MixingMatrix(**check_fields(MixingMatrix, entry)) for entry in entries)
        gallery = Gallery(**check_fields(Gallery, {**_tuples(plain), "matrices": matrices}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise files.damaged(about, f"it holds no matrices ({error!r})", AGAIN) from error
    for matrix in matrices:
        shape, values_STJ = (len(matrix.shown), gallery.length, gallery.length), matrix.values_STJ
        if values_STJ.shape != shape or not np.isfinite(values_STJ).all():
            reason = f"{matrix.label!r} is {values_STJ.shape} or not finite, where {shape} is needed"
            raise files.damaged(npz, reason, AGAIN)
        in_range = all(0 <= index < matrix.count for index in matrix.shown)
        if not in_range or min(matrix.count, matrix.full_rank) < 1:
            raise files.damaged(about, f"{matrix.label!r} shows heads that it does not have", AGAIN)
    if len(gallery.tokens) not in (0, gallery.length):
        raise files.damaged(about, f"it names {len(gallery.tokens)} tokens of {gallery.length}", AGAIN)
    return gallery


def _tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
