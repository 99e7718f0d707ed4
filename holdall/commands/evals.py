"""The command `holdall eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdall import files
from holdall.commands import console
from holdall.commands.loading import Loading
from holdall.text.sources import needed


def evaluate(
    run: str,
    tasks: tuple[str, ...],
    examples: int | None,
    fewshot: int | None,
    batch: int,
    include: Path | None,
    out: Path | None,
    loading: Loading,
) -> int:
    """Score a language model on tasks of lm-eval and print their table; returns the exit status.

    Args:
        include: a folder of tasks of your own, as YAML.
        out: the file for all results, as JSON.
    """
    if not tasks:
        raise ValueError("name at least one task: --tasks hellaswag (`lm_eval ls tasks` lists them)")
    needed("lm_eval")
    loading.load_mixers()
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from holdall.adapters.lm_eval import HoldallLM

    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=HoldallLM(loading.model(run), batch_size=batch), tasks=list(tasks), limit=examples,
        num_fewshot=fewshot, task_manager=TaskManager(include_path=None if include is None else str(include)),
        log_samples=False,
    )  # fmt: skip
    console.print(make_table(results), soft_wrap=True)
    if out is not None:
        files.write_json(
            out, {name: results[name] for name in ("results", "versions", "n-shot", "n-samples")}
        )
        console.print(f"  {out}", soft_wrap=True)
    return 0
