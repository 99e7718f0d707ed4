"""Workers leave Ctrl-C to their parent from their first instruction."""

import concurrent.futures
import os
import signal
import time

from holdall import processes


def wait_for(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


def test_ctrl_c_reaches_the_parent_alone_even_while_a_worker_starts(capfd) -> None:
    """The signal goes to each process, as a terminal's does, before any of the worker's own code runs."""
    worker = processes.context().Process(target=time.sleep, args=(0.2,))
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        worker.start()
        os.kill(worker.pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    worker.join(60)
    assert worker.exitcode == 0
    assert caught == [signal.SIGINT]  # this one is not deaf by now
    assert capfd.readouterr().err == ""


def test_a_pool_of_such_workers_works() -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=processes.context()) as pool:
        found = pool.submit(wait_for, 0.0)
        (pid,) = pool._processes
        os.kill(pid, signal.SIGINT)
        assert found.result(60) == "done"


def test_ctrl_c_while_a_worker_starts_is_not_missed() -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        with processes._ctrl_c_later():
            os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
