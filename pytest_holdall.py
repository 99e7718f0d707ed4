"""The laws as tests: pytest's option `--load`, and a test for every mixer in every variant.

pytest --pyargs holdall.testing.laws                        # every registered mixer
pytest --pyargs holdall.testing.laws --load my_mixer.py     # only the mixers in this file

Installing Holdall registers this plugin. It does nothing in other tests and imports nothing there, which is
why it stands outside of the package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

PAGE = re.compile(r"(holdall[./]testing[./])laws(?=(\.py)?($|::))")
LOADED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--load",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="Holdall: a mixer file of your own (repeatable); the laws check the mixers of these files only",
    )


@pytest.hookimpl(trylast=True)  # jaxtyping's own hook has to come before the first import of what it checks
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compile: runs torch.compile")
    config.addinivalue_line("markers", "gpu: needs a GPU; skips where there is none")
    config.addinivalue_line(
        "markers", "quick: what is worth a minute while one writes; pick it with -m quick"
    )
    config.addinivalue_line("markers", "full: takes minutes; leave it out with -m 'not full'")
    if files := config.getoption("--load"):
        from holdall import mixers

        config.stash[LOADED] = [name for file in files for name in mixers.load(file)]


def pytest_load_initial_conftests(args: list[str]) -> None:
    """The laws themselves run without pytest, and their tests are in the file beside them."""
    args[:] = [PAGE.sub(r"\1test_laws", arg) for arg in args]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A law's test asks for `case`: every registered mixer in every variant, or those of the loaded files.

    One that asks for `one_case` gets the last variant of each, which mostly has the shortest chunks.
    """
    asked = {"case", "one_case"} & set(metafunc.fixturenames)
    if metafunc.module.__name__.endswith("testing.test_laws") and asked:
        one_thread()
        cases = metafunc.module.cases(metafunc.config.stash.get(LOADED, None))
        if "one_case" in asked:
            cases = list({case.config.name: case for case in cases}.values())
        metafunc.parametrize(asked.pop(), cases, ids=str)


OF_A_RING = {
    "splits", "causal", "rows", "joined_rows", "inplace", "addresses", "capacity", "replay", "rollback",
    "state_size", "saved", "state_border",
}  # fmt: skip
"""The laws whose code a ring of tokens changes, a state that is written once in L tokens: the others ask of
a variant with one what they ask of the variant without."""


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What of the laws is in the small set.

    In fp32 one variant of each mixer, since fp64 has them all; of variants with a ring, where there are
    others, only the laws of a ring.
    """
    laws = [item for item in items if item.path.name == "test_laws.py" and "case" in _params(item)]
    plain = [item for item in laws if not _has_ring(item)]
    last = {_name(item): _params(item)["case"] for item in (*laws, *plain)}
    for item in laws:
        others = _has_ring(item) and not getattr(last[_name(item)].config, "replay", 0)
        of_another = _is_fp32(item) and _params(item)["case"] is not last[_name(item)]
        if of_another or (others and _params(item).get("law", "replay") not in OF_A_RING):
            item.add_marker(pytest.mark.full)


def _params(item: pytest.Item) -> Mapping[str, Any]:
    callspec = getattr(item, "callspec", None)
    return callspec.params if callspec is not None else {}


def _name(item: pytest.Item) -> str:
    return _params(item)["case"].config.name


def _has_ring(item: pytest.Item) -> bool:
    return bool(getattr(_params(item)["case"].config, "replay", 0))


def _is_fp32(item: pytest.Item) -> bool:
    return getattr(item, "originalname", "") == "test_law" and "fp32" in item.name


def one_thread() -> None:
    """A second thread costs more than it saves where tensors are small, and pytest-xdist uses the cores."""
    import torch

    torch.set_num_threads(1)
