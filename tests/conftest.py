"""What all tests share: one thread, repeatable examples, quiet logs, and a browser."""

import logging
import os
import shutil
import signal

import hypothesis
import pytest

from pytest_holdall import one_thread

one_thread()
# a failure is reproduced by the next run, and no file on disk decides which examples are tried
hypothesis.settings.register_profile(
    "holdall", derandomize=True, database=None, deadline=None, max_examples=10
)
hypothesis.settings.load_profile("holdall")

# pytest-xdist uses the cores already, and a process that compiles for another one has to import PyTorch first
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# torch.compile logs every step there, and pytest would print thousands of lines under a red test
logging.getLogger("torch.__trace").propagate = False

# where Ctrl-C is ignored, as in a background job of a script, processes that tests start would ignore it too
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[dev]'")
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs a Chromium: install one or name it in the environment variable CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
