"""The registry: what Holdall knows of each mixer. The zoo, the laws and the command line read it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdall.contract.config import did_you_mean
from holdall.contract.mixer import MixerConfig
from holdall.settings import field_docs


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a mixer comes from; `arxiv` is the identifier, empty if there is none."""

    title: str
    authors: str
    year: int
    arxiv: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the registry knows of one mixer.

    Attributes:
        family: which mixers it stands beside in tables.
        state: elements of the state of one row after N tokens, as a formula in the config's letters.
        training, inference: cost of N tokens at once, and of one more token, in O-notation.
        quadratic: whether the cost of N tokens grows with their square.
        causal: whether no output sees the future.
    """

    name: str
    family: str
    summary: str
    paper: Paper
    state: str
    training: str
    inference: str
    quadratic: bool
    causal: bool
    config: type[MixerConfig]

    @property
    def file(self) -> str:
        """The file that defines the mixer: from the package's folder on, or the path of your own."""
        module = self.config.__module__
        if module.startswith("holdall."):
            return module.replace(".", "/") + ".py"
        return getattr(sys.modules.get(module), "__file__", None) or ""

    @property
    def definition(self) -> str:
        """What the file says of the mixer: its equations, their letters and their source.

        What it then says of official code, "Weights" and "Deviations", is left out.
        """
        about = inspect.getdoc(sys.modules.get(self.config.__module__)) or ""
        return re.split(r"^(?:Weights|Deviations)\b", about, maxsplit=1, flags=re.MULTILINE)[0].strip()

    @property
    def options(self) -> dict[str, Any]:
        """Each option of the mixer with its default."""
        return {f.name: f.default for f in dataclasses.fields(self.config) if f.name != "width"}

    def configure(self, **options: Any) -> MixerConfig:
        """A config of this mixer; an unknown option raises TypeError with the closest known one."""
        known = [field.name for field in dataclasses.fields(self.config)]
        for option in options:
            if option not in known:
                raise TypeError(f"{self.name} has no option '{option}'. {did_you_mean(option, known)}")
        return self.config(**options)

    def __str__(self) -> str:
        source = f"{self.paper.authors}, {self.paper.year}"
        source += f", arXiv {self.paper.arxiv}" if self.paper.arxiv else ""
        notes = (inspect.getdoc(self.config) or "").partition("\n")[2].strip("\n")
        notes = "\n" + textwrap.indent(notes, "  ") if notes else ""
        docs = field_docs(self.config)
        sizes = self.config.export_sizes
        exported = f"any number of {' and '.join(sizes)}" if sizes else "rows and tokens as they are traced"
        options = ""
        for name, default in self.options.items():
            options += f"\n    {name} = {default!r}"
            options += "".join(f"\n        {line}" for line in textwrap.wrap(docs[name], 100))
        file = f"  {self.file}\n" if self.file else ""
        definition = textwrap.indent(self.definition, "  ")
        return (
            f"{self.name}: {self.summary}\n  {self.family}; {self.paper.title} ({source})\n{file}"
            f"\n{definition}\n\n  state elements of one row after N tokens, at width D: {self.state}\n"
            f"  torch.export: {exported}\n"
            f"  N tokens at once: {self.training}; one more: {self.inference}; "
            f"{'causal' if self.causal else 'not causal'}{notes}\n  options:{options}"
        )


_registry: dict[str, Entry] = {}


def register(
    name: str,
    *,
    family: str = "other",
    paper: Paper,
    state: str,
    training: str,
    inference: str,
    quadratic: bool = False,
    causal: bool = True,
) -> Callable[[type[MixerConfig]], type[MixerConfig]]:
    """Class decorator that enters a mixer's config, and with it the mixer, into the registry.

    The first line of the config's docstring becomes the summary. Raises ValueError for a name that
    another class already has.
    """

    def enter(config: type[MixerConfig]) -> type[MixerConfig]:
        other = _registry[name].config if name in _registry else config
        if not _is_same(other, config):
            raise ValueError(
                f"mixer '{name}' is already registered, by {other.__module__}.{other.__qualname__}"
            )
        config.name = name
        _registry[name] = Entry(
            name=name,
            family=family,
            summary=(config.__doc__ or "").strip().partition("\n")[0].rstrip("."),
            paper=paper,
            state=state,
            training=training,
            inference=inference,
            quadratic=quadratic,
            causal=causal,
            config=config,
        )
        return config

    return enter


def _is_same(one: type, other: type) -> bool:
    """Whether two classes are one, whose file was read again: as the same module, or once by `import`."""
    if one.__qualname__ != other.__qualname__:
        return False
    files = [getattr(sys.modules.get(each.__module__), "__file__", None) for each in (one, other)]
    is_one_file = None not in files and len({Path(str(file)).resolve() for file in files}) == 1
    return one.__module__ == other.__module__ or is_one_file


def lookup(name: str) -> Entry:
    """The registry's entry, among the mixers whose files were imported; KeyError helps with the name."""
    if name not in _registry:
        raise KeyError(f"unknown mixer '{name}'. {did_you_mean(name, _registry)}")
    return _registry[name]


def registered() -> list[str]:
    """The names of the mixers whose files were imported, sorted."""
    return sorted(_registry)
