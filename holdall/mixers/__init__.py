"""The zoo: one file per sequence mixer. Importing this package registers all of them.

Each file registers its mixer by decorating its config with `holdall.contract.register`. A user's own file
does the same and is imported by `load`.
"""

import importlib
import importlib.machinery
import importlib.util
import linecache
import pkgutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from holdall.contract import Entry, MixerConfig, lookup, registered
from holdall.errors import LOADED
from holdall.files import RunError

for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)


def names() -> list[str]:
    """The names of all registered mixers, sorted."""
    return registered()


def entry(name: str) -> Entry:
    """The registry's entry of a mixer. Raises KeyError with the closest name for an unknown one."""
    return lookup(name)


FAMILIES = (
    "softmax attention", "linear attention", "delta rule", "state space", "gated recurrence", "convolution",
)  # fmt: skip
"""In the order of tables; users' own families come last."""


def families() -> dict[str, list[str]]:
    """The names of all registered mixers by family."""
    by_family: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in names():
        by_family.setdefault(entry(name).family, []).append(name)
    return {family: members for family, members in by_family.items() if members}


def load(file: Path) -> list[str]:
    """Run a user's own mixer file and return the names that it registered, sorted.

    Raises as `run_file`, and ValueError if it registers nothing.
    """
    before = set(registered())
    module = run_file(file)
    # mixers that were registered before count if they are from this file, which may be loaded again
    new = [n for n in registered() if n not in before or lookup(n).config.__module__ == module.__name__]
    if not new:
        raise ValueError(f"{file} registered no mixer: decorate its config with holdall.contract.register")
    return new


def run_file(file: Path) -> ModuleType:
    """Run a user's own file of mixers, tasks or a recipe, as a module.

    It may import the files beside it, as it may when Python runs it. Raises FileNotFoundError if there is no
    such file, and RunError with the line if running it fails.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}")
    name = f"{LOADED}{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file, loader=_Source(name, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses resolve annotations there
    folder = str(file.resolve().parent)
    sys.path.append(folder)  # last: a file of the user's must not hide a package
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RunError(*failure(file, error)) from error
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    return module


class _Source(importlib.machinery.SourceFileLoader):
    """Reads the source every time, and leaves no bytecode beside a user's file.

    Bytecode is taken for that of an edited file if that has the same size and was edited within the second.
    """

    def path_stats(self, path: str) -> dict[str, float]:
        raise OSError("no bytecode")


def failure(file: Path, error: BaseException) -> tuple[str, str]:
    """The error in a user's file, and the line of the file in which it occurred: arguments of RunError."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.lineno and frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file) and error.lineno:
        lines.append(error.lineno)
    what = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
    if not lines:
        return f"{file}: {what}", ""
    linecache.checkcache(str(file))  # the file may have changed since it was last read
    return f"{file}, line {lines[-1]}: {what}", linecache.getline(str(file), lines[-1]).strip()


def configured(wanted: str, width: int, defaults: Mapping[str, Any] | None = None) -> tuple[str, MixerConfig]:
    """A label and a config from "NAME" or "NAME:option=value,option=value".

    defaults: values of options that are not given, as far as the mixer has them.
    Raises KeyError, TypeError or ValueError for an unknown mixer, an unknown option or a bad value.
    """
    name, options = options_of(wanted)
    entry = lookup(name)
    label = ", ".join([name, *(f"{option} = {value}" for option, value in options.items())])
    known = {option: value for option, value in (defaults or {}).items() if option in entry.options}
    return label, entry.configure(**{"width": width, **known, **options})


def options_of(wanted: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of "NAME" or "NAME:option=value,option=value"; ValueError for others."""
    name, _, text = wanted.partition(":")
    options = {}
    for part in filter(None, text.split(",")):
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"'{wanted}': write options as option=value, joined by commas")
        options[option] = _parsed(value)
    return name, options


def _parsed(value: str) -> Any:
    """A number, a bool or, for anything else, the string itself."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value.lower(), value)
