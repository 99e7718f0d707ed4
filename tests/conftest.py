"""What all tests share: one thread, repeatable examples, and mixers from files of a user's own.

pytest tests/laws.py                        # every registered mixer is held to the laws
pytest tests/laws.py --load my_mixer.py     # so is the one in this file, and it alone
"""

import logging
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

# the tests' tensors are small: handing them to a second thread costs more than it saves, and the cores are
# taken anyway by pytest-xdist
torch.set_num_threads(1)
# torch.compile logs every step there, and pytest would print thousands of lines under a red test
logging.getLogger("torch.__trace").propagate = False

# where Ctrl-C is ignored, as in a background job of a script, processes that tests start would ignore it too
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# a red run is red again tomorrow, and no file on disk decides what is tried
hypothesis.settings.register_profile(
    "holdall", derandomize=True, database=None, deadline=None, max_examples=10
)
hypothesis.settings.load_profile("holdall")

LOADED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--load",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a mixer file of your own (repeatable): tests/laws.py checks the mixers of these files only",
    )


@pytest.hookimpl(
    trylast=True
)  # after jaxtyping's own hook, which must come before the first import of holdall
def pytest_configure(config: pytest.Config) -> None:
    files = config.getoption("--load")
    if files:
        from holdall import mixers

        config.stash[LOADED] = [name for file in files for name in mixers.load(file)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `case` gets every registered mixer in every variant; see laws.py."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(metafunc.config.stash.get(LOADED, None))
        metafunc.parametrize("case", cases, ids=str)
