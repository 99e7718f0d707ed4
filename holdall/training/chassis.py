"""What every training run has, whatever it trains: a folder that is claimed, written to and resumed.

    config.json         the complete config; with      environment.json   versions, device, commit
                        environment.json written       result.json        written last
                        after the first step           metrics.jsonl      a line per step or evaluation
    a checkpoint        all that training resumes from, in safetensors, a `RunState` in its header

Files are replaced atomically; checkpoints are written by another thread while training continues. A run that
was killed resumes from its checkpoint, and lines of metrics that are newer are cut off and written again.
"""

from __future__ import annotations

import concurrent.futures
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from holdall import checkpoints, environment, files, settings
from holdall.contract import Config
from holdall.files import RunError
from holdall.settings import NonNegativeFloat, NonNegativeInt

TRAIN_AGAIN = "Remove it, and the same command trains it again."
"""What a user can do about a damaged result or checkpoint."""


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """Training stopped on demand; the run folder holds its state."""


@dataclass(frozen=True, kw_only=True)
class RunState(Config):
    """What a checkpoint's header says of its run; each kind of training adds its own fields."""

    step: NonNegativeInt
    """Training steps done."""
    seconds: NonNegativeFloat = 0.0
    """Spent training, over all calls."""
    metrics_bytes: NonNegativeInt = 0
    """Size of metrics.jsonl at this step; what follows is written again."""


S = TypeVar("S", bound=RunState)
Tensors = Mapping[str, Tensor]


class RunFolder:
    """The folder of one run. As a context manager it waits, at the end, for files still being written.

    Args:
        path: the folder.
        config: what the run is.
        checkpoint: name of the file that the run resumes from.
        about: what the header of each file of tensors says beside the state, JSON values by name.
        environment: what environment.json says beside versions, device and commit.
        beside: further files of the run, by name, written with config.json where they are not there yet.
        writes: whether this process writes; of several processes that train one model, one does.
        may_move: fields of the config that may change between calls, such as the path of the training data.
        updated: brings a checkpoint's state, as JSON values of any version, into the form of this one.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        checkpoint: str,
        *,
        about: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        beside: Mapping[str, bytes] | None = None,
        writes: bool = True,
        may_move: Sequence[str] = (),
        updated: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state,
    ) -> None:
        self.path, self.config, self.writes, self.may_move = path, config, writes, may_move
        self.updated = updated
        self.about, self.environment = dict(about or {}), dict(environment or {})
        self.beside = dict(beside or {})
        self.checkpoint = path / checkpoint
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.saved_at = time.monotonic()
        """When the last checkpoint was begun, or this call."""
        self._claimed = False
        self._writer = Background()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.close()

    # ------------------------------------------------------------------------------------ what the run is

    def holds_run(self) -> bool:
        """Whether the folder holds this run already. Raises RunError if it holds another."""
        return self._held() is not None

    def claim(self, device: torch.device) -> None:
        """Write what this run is, unless the folder says so already.

        To be called after each step, of which the first counts: a run that is refused before it, for want of
        memory say, leaves its folder free for the corrected command.

        Raises RunError if the folder holds another run.
        """
        if self._claimed or not self.writes:
            return
        held, wanted = self._held(), self.config.to_dict()
        for name, content in self.beside.items():
            if not (self.path / name).exists():
                files.write_atomically(self.path / name, content)
        if held is None:
            where = environment.describe(str(device), torch.get_num_threads())
            files.write_json(self.path / "environment.json", {**where, **self.environment})
        if held is None or any(held.get(name) != wanted[name] for name in self.may_move):
            files.write_json(self.path / "config.json", wanted)
        self._claimed = True

    def _held(self) -> dict[str, Any] | None:
        """The config that the folder holds, None if it holds none. RunError if it is another run's."""
        path = self.path / "config.json"
        if not path.exists():
            return None
        held: dict[str, Any] = files.read_json(
            path, "Restore it from a copy, or choose another folder (--out)."
        )
        if "format" in held:
            raise RunError(f"{self.path} holds a saved model, not a run; choose another folder (--out)")
        wanted = self.config.to_dict()
        moved = {name: wanted[name] for name in self.may_move}
        if difference := settings.differ({**self._completed(held), **moved}, wanted):
            raise RunError(
                f"{self.path} holds a run with another config (in {path.name}, {difference}); choose another "
                "folder (--out)"
            )
        return held

    def _completed(self, held: dict[str, Any]) -> dict[str, Any]:
        """A config with the defaults of fields newer than its file; unchanged if it is no such config."""
        try:
            return type(self.config).checked(held, self.path).to_dict()
        except RunError:
            return held

    # ------------------------------------------------------------------------------------ what it leaves

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self.writes:
            files.append_line(self.metrics, line)

    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl, all of it on the disk; 0 in a process that does not write."""
        return files.size_on_disk(self.metrics) if self.writes else 0

    def save(self, state: RunState, tensors: Tensors | Callable[[], Tensors]) -> None:
        """Begin to write the checkpoint, as `write_later`."""
        self.write_later(self.checkpoint.name, state, tensors)
        self.saved_at = time.monotonic()

    def write_later(self, name: str, state: RunState, tensors: Tensors | Callable[[], Tensors]) -> None:
        """Have another thread replace a file of tensors, after those that it was given before.

        Args:
            name: of the file.
            state: for its header.
            tensors: contiguous copies on the CPU; or a function that returns them, which that thread calls.

        Raises what went wrong with the file before.
        """
        if self.writes:
            about = {"step": state.step, "state": state.to_dict(), **self.about}
            header = {name: json.dumps(value) for name, value in about.items()}
            self._writer.start(_write, self.path / name, tensors, header)

    def wait(self) -> None:
        """Until all files are written. Raises what went wrong with them."""
        self._writer.wait()

    # ---------------------------------------------------------------------------------------- resuming

    def resume(
        self, kind: type[S], steps: int, fill: Callable[[checkpoints.TensorFile, S], object]
    ) -> S | None:
        """Return to the last checkpoint, and metrics.jsonl with it; None, and no metrics, if there is none.

        Args:
            kind: of state that the checkpoint's header holds.
            steps: of the whole run.
            fill: copies the tensors of the open file to where training needs them.

        Raises RunError if the checkpoint is damaged or of another run.
        """
        if not self.checkpoint.exists():
            if self.writes:
                self.metrics.unlink(missing_ok=True)
            return None
        with checkpoints.opened(self.checkpoint, "Remove it to start this run again.") as file:
            state = read_state(file, kind, self.updated)
            if state.step > steps:
                raise file.damaged(f"it is of step {state.step:,} of {steps:,}")
            fill(file, state)
        if self.writes and (lost := files.shorten(self.metrics, state.metrics_bytes)):
            warnings.warn(
                f"{self.metrics} lacks {lost:,} bytes that were there at step {state.step:,}", stacklevel=2
            )
        return state


def read_state(
    file: checkpoints.TensorFile,
    kind: type[S],
    updated: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state,
) -> S:
    """The state in a checkpoint's header. Raises RunError if there is none, or a damaged one."""
    if "state" not in file.about:
        raise file.damaged("its header does not say which step it is of")
    where = f"the header of {file.path}"
    return kind.checked(
        updated(files.parse_json(file.about["state"], where, file.way_out)), where, file.way_out
    )


def _write(path: Path, tensors: Tensors | Callable[[], Tensors], header: dict[str, str]) -> None:
    checkpoints.write(path, tensors() if callable(tensors) else tensors, header)


class Background:
    """Another thread that does one job at a time, such as writing a file, while training continues."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._job: concurrent.futures.Future[None] | None = None

    def start(self, function: Callable[..., None], *args: Any) -> None:
        """Start a job once the one before is done. Raises what went wrong with that."""
        self.wait()
        self._job = self._thread.submit(function, *args)

    def wait(self) -> None:
        """Until the job is done. Raises what went wrong with it."""
        if self._job is not None:
            job, self._job = self._job, None
            job.result()

    def close(self) -> None:
        self._thread.shutdown()
