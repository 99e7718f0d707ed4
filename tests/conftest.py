"""What all tests share: one thread, repeatable examples, and quiet logs."""

import logging
import os
import signal

from pytest_holdall import repeatable

repeatable()

# pytest-xdist uses the cores already, and a process that compiles for another one has to import PyTorch first
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# torch.compile logs every step there, and pytest would print thousands of lines under a red test
logging.getLogger("torch.__trace").propagate = False

# where Ctrl-C is ignored, as in a background job of a script, processes that tests start would ignore it too
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
