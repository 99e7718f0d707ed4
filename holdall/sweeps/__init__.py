"""Sweeps: many small models on one task, and where each lands on the recall-memory frontier.

    windows = [SlidingWindowConfig(width=64, window=w) for w in (8, 16)]
    points = tuple(quick.point(f"window {mixer.window}", "sliding window", mixer) for mixer in windows)
    folder = Path("runs/windows")
    lines = run_sweep(SweepConfig(recipe="windows", points=points), folder)
    report.write([folder], folder)

`with_added(sweep, ["taylor:feature_dim=8"])` is a sweep with more mixers, trained as its own models are, and
`run_sweep(..., published=True)` shows the finished runs that come with Holdall instead of training them.

The folder of a sweep holds

    config.json     the whole sweep, its test segments and the command that made it
    environment.json
    results.jsonl   one line per model and learning rate, in the sweep's order, as models finish
    runs/           one run folder per population
    frontier.png, frontier.html, table.md    made from the above alone (holdall.report)

Stopped in any way, the same call resumes it, and more seeds can be added later. On a CPU each learning rate
is a run of its own with one thread, as many at once as there are cores: small models gain nothing from a
second thread. On GPUs the learning rates of a seed are one run, one at once on each, while another process
compiles the kernels of the next.

Only `runs` decides what is finished. So a sweep can be made in pieces, by time or by family, on several
machines: put the pieces' `runs` into one folder, and the next call there, which needs no time to train
anything, gathers all of them into results.jsonl.
"""

from holdall.sweeps.additions import with_added
from holdall.sweeps.config import Job, Point, SweepConfig, in_order
from holdall.sweeps.folder import OutOfTime, planned
from holdall.sweeps.plan import PlannedModel, plan
from holdall.sweeps.pool import at_once
from holdall.sweeps.remaining import Remaining, in_words
from holdall.sweeps.suite import SuiteConfig, run_suite
from holdall.sweeps.sweep import Watcher, run_sweep

__all__ = [
    "Job", "OutOfTime", "PlannedModel", "Point", "Remaining", "SuiteConfig", "SweepConfig", "Watcher",
    "at_once", "in_order", "in_words", "plan", "planned", "run_suite", "run_sweep", "with_added",
]  # fmt: skip
