"""Tensors in files: the one place that writes and reads safetensors. Holdall never loads a pickle.

A file holds exactly the tensors that its reader expects, or it is refused by name: no tensor is broadcast or
cast, none may be missing or left over, and each must match the checksum in the file's header.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdall import files

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls our dtypes."""
FLOATS = {NAMES[dtype] for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


SUMS = "crc32"
"""The key of the tensors' checksums in a file's header; files of other programs have none."""
CONFIG, FINGERPRINT = "model", "fingerprint"
"""The keys of the config of the model that the weights are of, as JSON, and of what identifies it."""
WEIGHTS = "model."
"""How the names of a model's weights begin in a file that has other tensors beside them."""


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors, contiguous and on the CPU, and what is to be said about them; atomically.

    Where `about` has a model's config, the header gets the model's fingerprint too.
    """
    sums = checksums(tensors)
    header = {**about, SUMS: json.dumps(sums)}
    if CONFIG in about:
        header[FINGERPRINT] = fingerprint(about[CONFIG], sums)
    with files.replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, header)
        except SafetensorError as error:  # its word for a full disk
            raise OSError(None, str(error)) from error


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The CRC-32 of each tensor's bytes."""
    return {name: _sum(tensor) for name, tensor in tensors.items()}


def fingerprint(config: str, sums: Mapping[str, int]) -> str:
    """What identifies a trained model: a SHA-256 of its config, as JSON, and its weights' checksums by name.

    Of names that begin with `model.`, if there are any, the others are of other tensors and do not count: a
    run's last checkpoint has the fingerprint of the same weights alone.
    """
    prefix = weights_prefix(sums)
    weights = {name.removeprefix(prefix): sums[name] for name in sums if name.startswith(prefix)}
    text = json.dumps([json.loads(config), weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_prefix(names: Iterable[str]) -> str:
    """What the names of a model's weights begin with in a file; empty if it holds nothing else."""
    return WEIGHTS if any(name.startswith(WEIGHTS) for name in names) else ""


class TensorFile:
    """An open file of tensors; a tensor is read only when asked for.

    Attributes:
        about: the metadata that its writer gave.
        names: the names of its tensors.
    """

    def __init__(self, path: Path, file: Any, way_out: str) -> None:
        self.path, self._file, self.way_out = path, file, way_out
        self.about: dict[str, str] = file.metadata() or {}
        self.names: list[str] = list(file.keys())
        self._sums = files.parse_json(self.about.pop(SUMS, "{}"), f"the header of {path}", way_out)

    def fingerprint(self, config: str) -> str:
        """Of the model in this file.

        config: of the model, as JSON, for a file of an earlier version whose header has none.

        Raises RunError if the header says one that is not of its config and checksums.
        """
        sums = self._sums or checksums({name: self.tensor(name) for name in self.names})
        computed = fingerprint(self.about.get(CONFIG, config), sums)
        if self.about.get(FINGERPRINT, computed) != computed:
            raise self.damaged("its fingerprint is not that of its config and checksums")
        return computed

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises RunError if no tensor has this name, or its checksum is wrong."""
        if name not in self.names:
            raise self.damaged(f"it has no tensor {name!r}")
        tensor: Tensor = self._file.get_tensor(name)
        if self._sums and self._sums.get(name) != _sum(tensor):
            raise self.damaged(f"{name} does not match its checksum")
        return tensor

    def fill(
        self,
        targets: Mapping[str, Tensor],
        *,
        prefix: str = "",
        put: Callable[[Tensor, Tensor], object] = lambda target, value: target.copy_(value),
        any_float: bool = False,
    ) -> None:
        """Copy the tensors whose names begin with `prefix` into those of the same names without it.

        any_float: take values of one floating-point dtype for targets of another, as `put` casts them.

        Raises RunError, before anything is copied, unless names, shapes and dtypes are the same; and if one
        of the tensors has changed since it was written.
        """
        there = {name.removeprefix(prefix) for name in self.names if name.startswith(prefix)}
        if missing := sorted(targets.keys() - there):
            raise self.damaged(f"it has no tensor {prefix + missing[0]!r}")
        if left := sorted(there - targets.keys()):
            raise self.damaged(f"it has a tensor {prefix + left[0]!r}, which the model does not have")
        for name, target in targets.items():
            found = self._file.get_slice(prefix + name)
            has = tuple(found.get_shape()), found.get_dtype()
            wants = tuple(target.shape), NAMES[target.dtype]
            cast = any_float and {has[1], wants[1]} <= FLOATS
            if has != wants and not (cast and has[0] == wants[0]):
                raise self.damaged(
                    f"{prefix + name} is {_kind(*has)}, where {_kind(*wants)} is needed: the file is "
                    "of another model"
                )
        for name, target in targets.items():
            put(target, self.tensor(prefix + name))

    def damaged(self, reason: object) -> files.RunError:
        """The error about this file."""
        return files.damaged(self.path, reason, self.way_out)


@contextlib.contextmanager
def opened(path: Path, way_out: str = "") -> Iterator[TensorFile]:
    """Open a file of tensors. Raises RunError, with file and remedy, if it is damaged or no such file."""
    files.open_file(path, way_out).close()  # refuses a pipe or a folder
    try:
        with _safe_open(path) as file:
            yield TensorFile(path, file, way_out)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        files.open_file(path, way_out).close()  # is missing, if another process removed it in between
        raise files.damaged(path, error, way_out) from error


def _safe_open(path: Path) -> Any:
    """`safe_open`, whose error is an OSError also where PyTorch, which maps the file, has its own."""
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _sum(tensor: Tensor) -> int:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return zlib.crc32(real.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type] # a buffer


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype} of shape {shape}"
