"""The laws as tests: pytest's option `--load`, and a test for every mixer in every variant.

pytest --pyargs holdall.testing.laws                        # every registered mixer
pytest --pyargs holdall.testing.laws --load my_mixer.py     # only the mixers in this file

Installing Holdall registers this plugin. It does nothing in other tests and imports nothing there, which is
why it stands outside of the package.
"""

from __future__ import annotations

import re
from pathlib import Path

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


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the laws in fp32, one variant of each mixer is in the small set: fp64 has them all."""
    laws = [item for item in items if getattr(item, "originalname", "") == "test_law" and _is_fp32(item)]
    last = {item.callspec.params["case"].config.name: item.callspec.params["case"] for item in laws}  # type: ignore[attr-defined]
    for item in laws:
        case = item.callspec.params["case"]  # type: ignore[attr-defined]
        if case is not last[case.config.name]:
            item.add_marker(pytest.mark.full)


def _is_fp32(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and "case" in callspec.params and "fp32" in callspec.id


def one_thread() -> None:
    """A second thread costs more than it saves where tensors are small, and pytest-xdist uses the cores."""
    import torch

    torch.set_num_threads(1)
