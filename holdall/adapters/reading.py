"""What is read of another program's model: the fields of its config.json, and its weights.

A family takes each field and each weight that it knows, by name. What nobody took is refused by name at the
end, so that nothing of a model is dropped in silence: it would load, and answer something else.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdall import files
from holdall.files import RunError

REQUIRED: Any = object()
"""A default that says: this field must be there."""
HARMLESS = {
    # who wrote the file
    "architectures", "auto_map", "transformers_version", "_name_or_path", "model_type", "_commit_hash",
    # in which dtype it is stored: the weights say it themselves
    "torch_dtype", "dtype",
    # how to generate and what to return, not what the model computes
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "task_specific_params", "is_encoder_decoder",
    "pretraining_tp",
    # of classifiers, and how a product is cut to save memory
    "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
    # training only
    "initializer_range", "gradient_checkpointing",
}  # fmt: skip
"""Fields that say nothing of what a model computes."""


class ForeignError(RunError):
    """A model of another program cannot be represented; the message names the field or the weight."""


class Fields:
    """The fields of a config.json, each of which is to be taken.

    A field whose value is null is as if it were not there, except to `is_null`.
    """

    def __init__(self, given: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._given = {name: value for name, value in given.items() if value is not None}
        self._null = {name for name, value in given.items() if value is None}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._given

    @property
    def names(self) -> list[str]:
        return list(self._given)

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """A field's value, as it is used by the model."""
        self._taken.add(name)
        if name not in self._given and default is REQUIRED:
            raise ForeignError(f"{self.where} has no field {name!r}, which this kind of model needs")
        return self._given.get(name, default)

    def is_null(self, name: str) -> bool:
        """Whether a field is there and says null, where that is another thing than to be left out."""
        return name in self._null

    def number(self, name: str, default: Any = REQUIRED) -> int:
        """A field that must be a whole number, not negative."""
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refused(name, value, "a whole number")
        return value

    def only(self, name: str, *allowed: Any, default: Any = REQUIRED) -> Any:
        """A field's value, which must be one of those that Holdall can represent; the first is the default's
        stand-in where none is given."""
        value = self.take(name, allowed[0] if default is REQUIRED else default)
        # in Python True equals 1, but a flag is not a number
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise self.refused(name, value, " or ".join(map(repr, allowed)))
        return value

    def ignore(self, *names: str) -> None:
        """Fields of this kind of model that say nothing of what it computes when nothing is trained."""
        self._taken.update(names)

    def part(self, name: str) -> Fields:
        """The fields of a field that is an object; empty if it is not there. To be finished on its own."""
        value = self.take(name, {})
        if not isinstance(value, dict):
            raise self.refused(name, value, "an object")
        return Fields(value, f"{name} in {self.where}")

    def refused(self, name: str, value: Any, instead: str) -> ForeignError:
        return ForeignError(f"{self.where}: {name} = {value!r} cannot be represented; it must be {instead}")

    def finish(self) -> None:
        """Refuse the fields that nobody took."""
        left = sorted(self._given.keys() - self._taken - HARMLESS)
        if left:
            named = ", ".join(f"{name} = {self._given[name]!r}" for name in left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise ForeignError(
                f"{self.where} has {named}{more}, of which Holdall does not know what it does to the model, "
                "which may compute something else without it"
            )


class Weights:
    """The tensors of a model, each of which is to be taken once; read from the file when it is taken."""

    def __init__(self, sources: Mapping[str, Any], where: str) -> None:
        """`sources`: by name a tensor, or a function that reads it."""
        self.where, self._sources = where, dict(sources)
        self.dtypes: set[torch.dtype] = set()
        """Of the tensors that were taken."""
        self.on_take: Callable[[str], object] = lambda name: None
        """Called with the name of each tensor before it is taken."""

    @property
    def names(self) -> list[str]:
        """Of those that were not taken yet."""
        return list(self._sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def look(self, name: str) -> Tensor:
        """A tensor, which is still to be taken: to read a size off it."""
        if name not in self._sources:
            raise ForeignError(f"{self.where} has no weight {name!r}, which this kind of model needs")
        source = self._sources[name]
        return source if isinstance(source, Tensor) else source()

    def take(self, name: str) -> Tensor:
        self.on_take(name)
        tensor = self.look(name)
        self.dtypes.add(tensor.dtype)
        del self._sources[name]
        return tensor

    def drop(self, *names: str) -> None:
        """Weights that say nothing which others do not say: buffers, copies. They need not be there."""
        for name in names:
            self._sources.pop(name, None)

    def change(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Have a tensor be what a function makes of it when it is read."""
        read = lambda source=self._sources[name]: source if isinstance(source, Tensor) else source()  # noqa: E731
        self._sources[name] = lambda: change(read())

    def rename(self, change: Mapping[str, str], *, prefix: str = "") -> None:
        """Call weights otherwise: every name that begins with a key begins with its value; and without the
        prefix, where it has it."""
        renamed = {}
        for name, source in self._sources.items():
            new = name.removeprefix(prefix)
            for old, now in change.items():
                if new.startswith(old):
                    new = now + new[len(old) :]
                    break
            renamed[new] = source
        self._sources = renamed

    def finish(self) -> None:
        """Refuse the weights that nobody took."""
        if left := sorted(self._sources):
            named = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise ForeignError(f"{self.where} has weights that this kind of model does not have: {named}")


def head_of(weights: Weights, name: str, embed_VD: Tensor, *, tied: bool) -> Tensor | None:
    """The head's own weight, taken; None where it is the embedding.

    A file may hold the head of a tied model a second time. If that is another tensor, one version of the
    `transformers` library reads a tied model there and the next an untied one: it is refused.
    """
    if not tied:
        return weights.take(name)
    if name not in weights:
        return None
    # often one tensor under two names, which is not compared: one without memory cannot be
    if (head_VD := weights.take(name)) is not embed_VD and not torch.equal(head_VD, embed_VD):
        raise ForeignError(
            f"{weights.where}: the config ties the head to the embedding, but {name} is another tensor: "
            "untie them in the config if it is the head, or leave it out of the file"
        )
    return None


@contextlib.contextmanager
def weights_in(folder: Path) -> Iterator[Weights]:
    """The weights of a folder as the `transformers` library writes it: safetensors, whole or in parts, or
    pytorch_model.bin, which is read by PyTorch's reader of tensors alone and so runs no code of the file."""
    with contextlib.ExitStack() as open_files:
        if (index := folder / "model.safetensors.index.json").exists():
            there = files.read_json(index).get("weight_map")
            if not isinstance(there, dict):
                raise files.damaged(index, "it has no weight_map")
            parts = sorted(set(there.values()))
        else:
            parts = ["model.safetensors"]
        if all((folder / part).exists() for part in parts):
            sources: dict[str, Any] = {}
            for part in parts:
                path = files.inside(folder, part)
                try:
                    file = open_files.enter_context(safe_open(path, framework="pt"))
                except SafetensorError as error:
                    raise files.damaged(path, error) from error
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    sources[name] = lambda file=file, name=name: file.get_tensor(name)
            yield Weights(sources, str(folder))
            return
    path = folder / "pytorch_model.bin"
    if not path.exists():
        missing = next(part for part in parts if not (folder / part).exists())
        if (folder / "pytorch_model.bin.index.json").exists():
            raise RunError(
                f"{folder} has its weights in several files of pickles, which are not read; open it by the "
                "transformers library and write it by save_pretrained, which makes safetensors"
            )
        raise RunError(f"{folder} has no {missing}, and no pytorch_model.bin. Copy the whole folder")
    try:
        # files of before PyTorch 1.6 are no archives, and cannot be mapped
        archive = zipfile.is_zipfile(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # whatever pickle says
        raise files.damaged(path, f"PyTorch cannot read it as tensors alone ({error})") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise files.damaged(path, "it holds something else than tensors by name")
    yield Weights(loaded, str(path))
