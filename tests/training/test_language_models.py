"""Pretraining: golden losses, resumable after any kind of end, the same on several devices as on one."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from children import kill_and_resume
from safetensors.torch import load_file

import holdall
from holdall import files
from holdall.files import RunError
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConv, BaseConvConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig, seeded
from holdall.text.shards import write_corpus
from holdall.text.tokenizers import Bytes
from holdall.training import language_models as module
from holdall.training.devices import launcher
from holdall.training.flops import flops_per_token
from holdall.training.language_models import (
    PretrainConfig,
    Pretrainer,
    Stopped,
    open_data,
    pretrain,
)
from holdall.training.optimizer import decayed

GOLDEN = Path(__file__).parent / "golden_losses.json"


def write_text(folder: Path) -> Path:
    """A small corpus that does not depend on anything: sentences with a name that comes back."""
    draw = np.random.default_rng(0)
    names, verbs = ("Ann", "Bob", "Cleo", "Dora", "Emil"), ("sees", "likes", "calls", "meets")
    chapters = [
        " ".join(f"{names[a]} {verbs[b]} {names[c]}." for a, b, c in draw.integers(0, 4, (40, 3)))
        for _ in range(30)
    ]
    (folder / "text.txt").write_text("\n===\n".join(chapters))
    write_corpus([folder / "text.txt"], folder / "corpus", Bytes(), valid=0.2, separator="\n===\n")
    return folder / "corpus"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def config(corpus: Path, **changes: object) -> PretrainConfig:
    width = 16
    layers = (
        BaseConvConfig(width=width, expand=4),
        TaylorConfig(width=width, feature_dim=4, heads=2),
        SlidingWindowConfig(width=width, window=5, heads=2, rotary=1.0, bias=False),
        MambaConfig(width=width, state=4),
    )
    base = PretrainConfig(
        model=ModelConfig(vocab=264, width=width, layers=layers, mlp=32, mlp_kind="swiglu", norm="rms"),
        data=str(corpus),
        context_len=24,
        batch=8,
        micro_batch=4,
        steps=100,
        learning_rate=0.01,
        warmup=5,
        evaluate_every=20,
        evaluate_rows=16,
    )
    return dataclasses.replace(base, **changes)


def lines(folder: Path) -> list[dict[str, object]]:
    """The metrics without what time and memory are."""
    return [
        {name: value for name, value in line.items() if name not in ("tokens_per_s", "memory")}
        for line in files.read_lines(folder / "metrics.jsonl")
    ]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def assert_same_run(a: Path, b: Path) -> None:
    assert lines(a) == lines(b)
    for name in ("model", "best", "last"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert torch.equal(tensor, other[key]), key


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config(corpus), folder)
    return folder


# ----------------------------------------------------------------------------------------------- the loop


@pytest.mark.quick
def test_a_hundred_golden_losses(whole: Path) -> None:
    """Whoever means to change them writes losses(folder) to golden_losses.json, and says why."""
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 100
    assert losses(whole) == pytest.approx(golden, rel=1e-4)


def test_the_run_folder_is_complete(whole: Path, corpus: Path) -> None:
    found = PretrainConfig.from_dict(json.loads((whole / "config.json").read_text()))
    assert found == config(corpus, data_hash=open_data(config(corpus)).content_hash)
    steps = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 101))
    assert steps[-1]["tokens"] == 100 * 8 * 24
    assert all(line["mfu"] is None and line["grad_norm"] > 0 for line in steps)
    evaluations = [line for line in lines(whole) if "valid_loss" in line]
    assert [line["step"] for line in evaluations] == [20, 40, 60, 80, 100]
    for line in evaluations:
        assert line["valid_perplexity"] == pytest.approx(math.exp(line["valid_loss"]))
    result = json.loads((whole / "result.json").read_text())
    assert result["best_valid_loss"] == min(line["valid_loss"] for line in evaluations)
    assert evaluations[-1]["valid_loss"] < 2.0 < evaluations[0]["valid_loss"] < math.log(257)
    assert {path.name for path in whole.iterdir()} >= {
        "environment.json",
        "last.safetensors",
        "best.safetensors",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_what_a_user_would_write(tied: bool, corpus: Path, tmp_path: Path) -> None:
    """All logits, PyTorch's cross-entropy, whole batches, AdamW in two groups: the same losses."""
    run = config(corpus, steps=6)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, tied=tied))
    pretrain(run, tmp_path / "run")
    data = open_data(run)
    with seeded(0):
        model = run.model.build()
    matrices = decayed(model)
    groups = [
        {
            "params": [w for n, w in model.named_parameters() if (n in matrices) is decays],
            "weight_decay": decay,
        }
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, expected in enumerate(losses(tmp_path / "run")):
        starts = module.Order(len(data.train), 24, 0).rows(step, 8)
        rows = torch.stack([torch.from_numpy(data.train[s : s + 25]) for s in starts])
        loss = F.cross_entropy(model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten())
        assert expected == pytest.approx(loss.item(), rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        optimizer.step()
        optimizer.zero_grad()


def test_the_learning_rate_rises_and_falls(corpus: Path) -> None:
    run = config(corpus, learning_rate=1.0, warmup=10, steps=110)
    assert [run.rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert run.rate(60) == pytest.approx(0.55)
    assert run.rate(110) == pytest.approx(0.1)


def test_only_matrices_the_embedding_and_the_head_decay(corpus: Path) -> None:
    model = dataclasses.replace(config(corpus).model, tied=False).build()
    names = decayed(model)
    assert {"embed.weight", "head.weight", "blocks.0.mixer.in_proj.weight"} <= names
    assert "blocks.3.mixer.dt_proj.weight" in names
    assert names <= dict(model.named_parameters()).keys()
    rest = dict(model.named_parameters()).keys() - names
    assert {
        "norm.weight",
        "blocks.0.mixer.in_proj.bias",
        "blocks.3.mixer.A_log",
        "blocks.0.mixer.weight_DW",
    } <= rest


def test_recompute_gives_the_same_bits(corpus: Path, tmp_path: Path, whole: Path) -> None:
    pretrain(config(corpus, recompute=True, steps=5), tmp_path / "run")  # within the warm-up
    assert losses(tmp_path / "run") == losses(whole)[:5]


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_is_near_and_its_masters_are_fp32(
    corpus: Path, tmp_path: Path, whole: Path, recompute: bool
) -> None:
    pretrain(config(corpus, precision="bf16", recompute=recompute, steps=10), tmp_path / "run")
    assert losses(tmp_path / "run")[:6] != losses(whole)[:6]
    assert losses(tmp_path / "run")[:6] == pytest.approx(losses(whole)[:6], rel=0.02)
    assert {t.dtype for t in load_file(tmp_path / "run" / "last.safetensors").values()} == {torch.float32}


def test_in_bf16_the_form_is_the_one_for_bf16(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BaseConvConfig, "resolved_form", lambda self, device, dtype=torch.float32: str(dtype))
    run = config(corpus, precision="bf16")
    trainer = Pretrainer(run, open_data(run), tmp_path, launcher())
    assert trainer.model.mixers[0].form == "torch.bfloat16"


HIDDEN = "ignore:The .grad attribute of a Tensor:UserWarning"
"""PyTorch's compiler causes this warning and hides it, which pytest does not notice."""


@pytest.mark.filterwarnings(HIDDEN)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_too_it_resumes_bit_exactly(corpus: Path, tmp_path: Path) -> None:
    run = config(corpus, precision="bf16", compile=True, steps=30)
    pretrain(run, tmp_path / "whole", fabric=launcher("cuda"))
    with pytest.raises(Stopped):
        pretrain(run, tmp_path / "cut", fabric=launcher("cuda"), should_stop=lambda: True)
    pretrain(run, tmp_path / "cut", fabric=launcher("cuda"))
    ours, other = ([{**line, "mfu": None} for line in lines(tmp_path / name)] for name in ("whole", "cut"))
    assert ours == other


@pytest.mark.parametrize("in_order", [True, False])
def test_sums_have_a_fixed_order_where_it_is_asked_for(
    in_order: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    @contextlib.contextmanager
    def repeatable(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield

    monkeypatch.setattr("holdall.training.language_models.repeatable", repeatable)
    pretrain(config(corpus, steps=1), tmp_path, in_order=in_order)
    assert asked == [torch.device("cpu")] * in_order
    assert json.loads((tmp_path / "environment.json").read_text())["in_order"] is in_order


@pytest.mark.compile
@pytest.mark.filterwarnings(HIDDEN)
def test_compiled_blocks_learn_the_same_and_equal_ones_are_compiled_once(
    corpus: Path, tmp_path: Path
) -> None:
    layers = 3 * (BaseConvConfig(width=16, expand=4),)
    model = dataclasses.replace(config(corpus).model, layers=layers)
    steps = {}
    for compiled in (False, True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        run = config(corpus, model=model, compile=compiled, precision="bf16")
        trainer = Pretrainer(run, open_data(run), tmp_path, launcher())
        steps[compiled] = [trainer.train_step().tolist() for _ in range(3)]
    assert steps[True] == [pytest.approx(step, rel=0.01) for step in steps[False]]
    pretrain(dataclasses.replace(run, evaluate_rows=run.micro_batch + 1), tmp_path / "evaluated")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # nothing for evaluations


@pytest.mark.compile
@pytest.mark.filterwarnings(HIDDEN)
def test_what_the_compiler_fails_on_runs_without_it_and_says_so(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with complex numbers in some releases of PyTorch for GPUs."""
    compiler = importlib.import_module("torch._inductor.compile_fx")
    compile_fx, seen = compiler.compile_fx, []

    def without_complex(graph: Any, *args: Any, **options: Any) -> Any:
        found = [node.meta.get("example_value") for node in graph.graph.nodes]
        modes = {x.shape[-1] for x in found if isinstance(x, torch.Tensor) and x.is_complex()}
        if 3 in modes:
            raise KeyError("complex64")
        seen.append(graph)
        return graph.forward if modes else compile_fx(graph, *args, **options)

    monkeypatch.setattr(compiler, "compile_fx", without_complex)
    torch.compiler.reset()
    takes, fails = H3Config(width=16, state=4), H3Config(width=16, state=6)
    layers = (fails, BaseConvConfig(width=16, expand=4), takes)
    model = dataclasses.replace(config(corpus).model, layers=layers)
    run = config(corpus, model=model, compile=True, precision="bf16", steps=2)
    with pytest.warns(UserWarning, match=r"torch.compile fails on 'h3', which runs without it: .*complex64"):
        result = pretrain(run, tmp_path / "compiled")
    assert list(result["uncompiled"]) == ["h3"]
    assert len(seen) > 2  # its MLPs and norms are compiled, and the other layers
    with pytest.warns(UserWarning, match="fails on 'h3'"):
        trainer = Pretrainer(run, open_data(run), tmp_path / "again", launcher())
    left_out = [getattr(mixer.forward, "_torchdynamo_disable", False) for mixer in trainer.model.mixers]
    assert left_out == [True, False, False]
    plain = pretrain(dataclasses.replace(run, compile=False), tmp_path / "plain")
    assert plain["uncompiled"] == {}
    assert result["valid_loss"] == pytest.approx(plain["valid_loss"], rel=0.01)


@pytest.mark.compile
def test_what_fails_without_the_compiler_too_is_raised(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **options: Any) -> None:
        raise LookupError("no weights of that name")

    monkeypatch.setattr(BaseConv, "forward", broken)
    torch.compiler.reset()
    run = config(corpus, compile=True, steps=2)
    with pytest.raises(LookupError, match="no weights of that name"):
        pretrain(run, tmp_path / "broken")


# ------------------------------------------------------------------------------------- stopped and resumed


def test_stopped_anywhere_it_resumes_bit_exactly(
    corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPORT_STEPS", 1)
    for stop_after in (3, 17, 30):
        asked = iter(range(10**6))
        with pytest.raises(Stopped):
            pretrain(
                config(corpus),
                tmp_path / "cut",
                should_stop=lambda asked=asked, last=stop_after: next(asked) == last,
            )
        assert not (tmp_path / "cut" / "result.json").exists()
    resumed = Pretrainer(config(corpus), open_data(config(corpus)), tmp_path / "cut", launcher())
    valid_losses = [
        line["valid_loss"] for line in lines(whole) if "valid_loss" in line and line["step"] <= 53
    ]
    assert (resumed.step, resumed.best, resumed.valid_loss) == (53, min(valid_losses), valid_losses[-1])
    pretrain(config(corpus), tmp_path / "cut")
    assert_same_run(whole, tmp_path / "cut")


def test_killed_at_any_moment_the_same_command_gives_the_same_losses(
    corpus: Path, tmp_path: Path, whole: Path
) -> None:
    kill_and_resume(
        pretrain, config(corpus), tmp_path / "cut", at=(15, 45, 75), checkpoint="last.safetensors"
    )
    assert_same_run(whole, tmp_path / "cut")


def test_a_corpus_may_move(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain(config(corpus, steps=25), tmp_path / "run", should_stop=lambda: True)
    moved = shutil.copytree(corpus, tmp_path / "moved")
    pretrain(config(moved, steps=25), tmp_path / "run")
    assert open_data(PretrainConfig.read(tmp_path / "run" / "config.json")).folder == moved


def test_a_finished_run_is_not_trained_again(whole: Path, corpus: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    result = pretrain(config(corpus), whole, should_stop=lambda: True)
    assert result["steps"] == 100
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("broken", "says", "good"), [(47, "step 48: loss nan", 40), (60, "step 60: validation loss nan", 40)]
)
def test_a_loss_that_is_nan_ends_it_and_leaves_the_last_good_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: int, says: str, good: int
) -> None:
    folder, rate = tmp_path / "run", PretrainConfig.rate
    monkeypatch.setattr(
        PretrainConfig, "rate", lambda self, step: math.inf if step == broken - 1 else rate(self, step)
    )
    with pytest.raises(RunError, match=rf"diverged at {says}.*last good checkpoint is .*last\.safe"):
        pretrain(config(corpus), folder)
    kept = holdall.load(folder, checkpoint="last")
    assert kept.step == good
    assert all(w.isfinite().all() for w in kept.model.parameters())
    logged = [line["loss"] for line in lines(folder) if "loss" in line]
    assert logged
    assert all(map(math.isfinite, logged))


def test_what_does_not_fit_is_one_clear_line(corpus: Path, tmp_path: Path, whole: Path) -> None:
    run = config(corpus)
    says = r"in config.json, seed: 0 there, 1 here\); choose another folder \(--out\)"
    with pytest.raises(RunError, match=says):
        pretrain(config(corpus, seed=1), whole)
    with pytest.raises(RunError, match="is not the one that this run is about"):
        pretrain(config(corpus, data_hash="0" * 64), tmp_path / "run")
    small = dataclasses.replace(run.model, vocab=100)
    with pytest.raises(RunError, match="vocab 100 is smaller than the corpus' 257"):
        pretrain(config(corpus, model=small), tmp_path / "run")
    with pytest.raises(RunError, match="fewer than one row of 1000001"):
        pretrain(config(corpus, context_len=10**6), tmp_path / "run")
    with pytest.raises(RunError, match="batch 8 is not a multiple of 1 devices times micro_batch 3"):
        pretrain(config(corpus, micro_batch=3), tmp_path / "run")
    with pytest.raises(ValueError, match=r"learning_rate = -1\.0 must be positive and finite"):
        config(corpus, learning_rate=-1.0)


@pytest.mark.parametrize("part", ["_build", "_resume", "train_step"])
def test_a_run_that_is_refused_before_its_first_step_leaves_its_folder_free(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("not this one")

    with monkeypatch.context() as patched:
        patched.setattr(Pretrainer, part, refuse)
        with pytest.raises(ValueError, match="not this one"):
            pretrain(config(corpus, steps=2), tmp_path / "run")
    assert pretrain(config(corpus, steps=2, seed=1), tmp_path / "run")["steps"] == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


def test_a_damaged_checkpoint_is_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        pretrain(config(corpus), tmp_path / "run", should_stop=lambda: True)
    path = tmp_path / "run" / "last.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"last\.safetensors is damaged"):
        pretrain(config(corpus), tmp_path / "run")


def test_several_devices_need_fabric_and_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(RunError, match=r"on 2 devices needs .*pip install lightning-fabric"):
        launcher("cpu", 2)
    assert launcher().world_size == 1


# --------------------------------------------------------------------------------------- several processes


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from holdall.training.devices import launcher
from holdall.training.language_models import PretrainConfig, Stopped, pretrain

torch.set_num_threads(1)
folder, plain, strategy = sys.argv[1:]
config, asked = PretrainConfig.from_dict(json.loads(plain)), iter(range(10**6))
try:
    pretrain(config, Path(folder), fabric=launcher("cpu", 2, strategy), should_stop=lambda: next(asked) == 4)
except Stopped:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [pytest.param("ddp", {"micro_batch": 2}, marks=pytest.mark.full), ("fsdp", {"recompute": True})],
)
def test_two_processes_learn_what_one_learns_and_one_resumes_from_their_checkpoint(
    corpus: Path, tmp_path: Path, whole: Path, strategy: str, changes: dict[str, object]
) -> None:
    script, plain = tmp_path / "run.py", json.dumps(config(corpus, **changes).to_dict())
    script.write_text(SCRIPT)  # in a file, as Fabric starts the second process by the first one's command
    cut = [sys.executable, str(script), str(tmp_path / "run"), plain, strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(cut, env=environment, check=False, timeout=120).returncode == 130
    first = losses(tmp_path / "run")
    assert len(first) == 50  # reported every ten steps and at evaluations, which all processes agree on
    assert first == pytest.approx(losses(whole)[:50], rel=1e-3)
    assert holdall.load(tmp_path / "run", checkpoint="last").step == 50
    pretrain(config(corpus, **changes), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-2)
    ours = holdall.load(tmp_path / "run").model.state_dict()
    for name, tensor in holdall.load(whole).model.state_dict().items():
        assert ours[name] == pytest.approx(tensor, abs=0.02), name


# -------------------------------------------------------------------------------------- costs, generation


@pytest.mark.parametrize("tied", [True, False])
def test_operations_are_those_of_pytorchs_counter(tied: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # the loop computes what the mask leaves and no more
    layers = 2 * (AttentionConfig(width=64, heads=2, bias=False, form="loop"),)
    model = ModelConfig(vocab=96, width=64, layers=layers, mlp=128, mlp_kind="swiglu", norm="rms", tied=tied)
    built = model.build()
    with FlopCounterMode(display=False) as counter:
        built(torch.randint(96, (2, 40)))[0].sum().backward()
    norms = 6 * 64 * 5
    assert counter.get_total_flops() / 80 == pytest.approx(flops_per_token(built, 40) - norms, rel=1e-4)
    layers = 2 * (SlidingWindowConfig(width=64, window=4, bias=False),)
    window = dataclasses.replace(model, layers=layers, positions=50).build()
    trained = window.parameter_count() - 50 * 64 - (not tied) * 96 * 64
    keys = (1 + 2 + 3 + 4 * 37) / 40
    assert flops_per_token(window, 40) == pytest.approx(6 * trained + 12 * 64 * 2 * keys)


def test_a_pretrainer_keeps_only_its_own_random_state(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    Pretrainer(config(corpus), open_data(config(corpus)), tmp_path, launcher())
    assert torch.equal(torch.random.get_rng_state(), before)
