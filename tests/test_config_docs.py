"""Every field of every config has its own docstring, which editors, `--help` and `holdall zoo` show."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import holdall
from holdall import mixers
from holdall.contract import Config, MixerConfig
from holdall.settings import field_docs


def subclasses(config: type[Config]) -> Iterator[type[Config]]:
    for subclass in config.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


APART = (
    "holdall.kernels.",
    "holdall.adapters.lm_eval",
    "holdall.adapters.transformers",
    "holdall.evals.served",
)
"""Which need Triton and other libraries, and have no configs."""


def configs() -> dict[str, type[Config]]:
    """Every config of the package, by module and name."""
    for module in pkgutil.walk_packages(holdall.__path__, "holdall."):
        if not module.name.startswith(APART):
            importlib.import_module(module.name)
    return {
        f"{config.__module__}.{config.__qualname__}".removeprefix("holdall."): config
        for config in subclasses(Config)
        if config.__module__.startswith("holdall.")
    }


def undocumented(config: type[Config]) -> list[str]:
    """The fields that have no docstring, or whose documentation stands in the docstring of the class."""
    docs = field_docs(config)
    about = vars(config).get("__doc__") or ""
    in_class = {
        name for name in docs if re.search(rf"^\s*(\w+, )*{name}(, \w+)*: |[;.] {name}: ", about, re.M)
    }
    return [name for name, doc in docs.items() if not doc or name in in_class]


def test_every_field_of_every_config_has_a_docstring_of_its_own() -> None:
    missing = {name: fields for name, config in configs().items() if (fields := undocumented(config))}
    assert not missing, missing


@pytest.mark.parametrize("name", mixers.names())
def test_the_zoo_shows_each_option_with_its_docstring(name: str) -> None:
    entry = mixers.entry(name)
    shown = " ".join(str(entry).split())
    docs = field_docs(entry.config)
    for option, default in entry.options.items():
        assert docs[option]
        assert f"{option} = {default!r} {docs[option]}" in shown


@dataclass(frozen=True, kw_only=True)
class Documented(MixerConfig):
    """A mixer.

    A note.
    """

    size: int = 1
    """How large,
    in tokens.
    """


@dataclass(frozen=True, kw_only=True)
class Bare(Documented):
    other: int = 2
    size: int = 3  # documented by the class that it comes from


@dataclass(frozen=True, kw_only=True)
class Paragraph(Documented):
    """All at once.

    size: how large. other: how else.
    """

    other: int = 2
    """How else."""


def test_a_field_without_a_docstring_is_found() -> None:
    assert undocumented(Documented) == []
    assert field_docs(Documented)["size"] == "How large, in tokens."
    assert undocumented(Bare) == ["other"]
    assert undocumented(Paragraph) == ["size", "other"]


def test_a_class_without_source_has_no_docs() -> None:
    made = dataclasses.make_dataclass("Made", [("size", int, 1)], bases=(Config,), frozen=True, kw_only=True)
    assert field_docs(made) == {"size": ""}


def test_an_entry_shows_the_notes_of_its_config() -> None:
    entry = dataclasses.replace(mixers.entry("attention"), config=Documented)
    assert "causal\n  A note.\n  options:\n" in str(entry)
    assert str(entry).endswith("    size = 1\n        How large, in tokens.")
