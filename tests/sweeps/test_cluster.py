"""A sweep on a Ray cluster, which is started here: the results of one process, though one of Ray's is killed.

The sweep runs in a process of its own, since Ray has warnings of its own and leaves threads behind.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdall import files
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.recipes import quick
from holdall.sweeps import SweepConfig, cluster, run_sweep
from holdall.tasks.data import MQARData, MQARSegment

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: holdall[cluster]")
SCRIPT = """
import json, sys
from pathlib import Path
from holdall.sweeps import SweepConfig, run_sweep
sweep = SweepConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
run_sweep(sweep, Path(sys.argv[2]), workers=2, on="ray")
"""
TASK = MQARData(
    vocab=32,
    filler="zero",
    train=(MQARSegment(length=16, pairs=2, rows=64),),
    test=(MQARSegment(length=16, pairs=2, rows=20),),
)


def small(epochs: int) -> SweepConfig:
    points = []
    for label, mixer in (("attention", AttentionConfig(width=8)), ("window", SlidingWindowConfig(width=8))):
        point = quick.point(label, label, mixer)
        model = dataclasses.replace(point.train.model, vocab=32)
        train = dataclasses.replace(
            point.train, model=model, data=TASK, batch=16, epochs=epochs, evaluate_every=5
        )
        points.append(dataclasses.replace(point, train=train))
    return SweepConfig(recipe="small", points=tuple(points))


def workers_of(parent: int) -> list[int]:
    """Ray's processes that train, below one process."""
    above, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            names[int(path.name)] = (path / "cmdline").read_bytes()
            above[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended since

    def below(pid: int) -> bool:
        return pid == parent or (pid in above and above[pid] > 1 and below(above[pid]))

    return [pid for pid, name in names.items() if name.startswith(b"ray::_work") and below(pid)]


@needs_ray
@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's processes in /proc")
def test_a_sweep_on_two_workers_of_ray_of_which_one_is_killed(tmp_path: Path) -> None:
    sweep, out = small(epochs=60), tmp_path / "out"
    script, config = tmp_path / "sweep.py", tmp_path / "sweep.json"
    script.write_text(SCRIPT)
    config.write_text(json.dumps(sweep.to_dict()))
    environment = {**os.environ, "RAY_memory_monitor_refresh_ms": "0"}
    process = subprocess.Popen([sys.executable, str(script), str(config), str(out)], env=environment)
    try:
        until, killed = time.monotonic() + 120, 0
        while process.poll() is None and time.monotonic() < until:
            unfinished = len(list(out.glob("runs/*/metrics.jsonl"))) > len(
                list(out.glob("runs/*/result.json"))
            )
            if not killed and unfinished and (pids := workers_of(process.pid)):
                os.kill(pids[0], signal.SIGKILL)
                killed = pids[0]
            time.sleep(0.02)
        assert process.wait(60) == 0
        assert killed
    finally:
        process.kill()
    alone = run_sweep(sweep, tmp_path / "alone", workers=2)
    assert without_time(files.read_lines(out / "results.jsonl")) == without_time(alone)
    for line in alone:
        kept, wanted = (
            load_file(folder / line["run"] / line["weights"]) for folder in (out, tmp_path / "alone")
        )
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def without_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_without_ray_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(files.RunError, match="this needs the package ray: pip install ray"):
        run_sweep(small(1), tmp_path / "out", on="ray")
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(files.RunError, match="pip install ray"):
        cluster.at_once("cpu")
