"""The command `holdall train`, as typed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import holdall
from holdall import cli, files
from holdall.commands import train as shown
from holdall.text.shards import write_corpus
from holdall.text.tokenizers import Bytes
from holdall.training.language_models import PretrainConfig, Stopped

SMALL = """--pattern base-conv --pattern taylor:feature_dim=4 --width 16 --depth 2 --mlp 32 --context 32
    --batch 4 --micro-batch 2 --warmup 2 --evaluate-rows 4 --learning-rate 0.01""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text = "\n===\n".join(f"{n} times {n} is {n * n}. " * 12 for n in range(60))
    (folder / "text.txt").write_text(text)
    write_corpus([folder / "text.txt"], folder / "corpus", Bytes(), valid=0.2, separator="\n===\n")
    return folder / "corpus"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["holdall", "train", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_pattern_is_trained_and_writes_samples(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, *SMALL, "--data", corpus, "--steps", 4, "--out", out) == 0
    said = capsys.readouterr().out
    assert "base-conv taylor:feature_dim=4: 2 layers of width 16 on cpu, form parallel, fp32" in said
    assert "step 4 of 4: validation loss" in said
    assert said.count(" is ") >= shown.SAMPLES  # the prompts are of the validation text
    loaded = holdall.load(out)
    assert [layer.name for layer in loaded.config.layers] == ["base-conv", "taylor"]
    assert (loaded.config.vocab, loaded.config.mlp, loaded.step) == (264, 32, 4)
    assert PretrainConfig.read(out / "config.json").data == str(corpus)


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_warning_is_a_line_that_says_what_it_says(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*_: object, **__: object) -> None:
        warnings.warn("torch.compile fails on 'h3', which runs without it", stacklevel=2)
        raise Stopped

    monkeypatch.setattr(shown, "pretrain", warned)
    assert run(monkeypatch, *SMALL, "--data", corpus, "--steps", 4, "--out", tmp_path / "run") == 130
    said = capsys.readouterr()
    assert "\nwarning: torch.compile fails on 'h3', which runs without it\n" in said.out
    assert "warn" not in said.err


def test_with_no_arguments_it_is_the_small_based_model_on_the_embedded_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = shown.configured("based-mini", (), {}, {}, "cpu")
    assert [layer.name for layer in config.model.layers] == [
        "base-conv",
        "taylor",
        "sliding-window",
        "base-conv",
    ]
    assert (config.data, config.precision, config.compile) == ("", "fp32", False)
    assert config.steps * config.batch * config.context_len > 1e6
    on_gpu = shown.configured("based-360m", (), {}, {"batch": 12}, "cuda", 3)
    assert (on_gpu.precision, on_gpu.compile, on_gpu.micro_batch) == ("bf16", True, 4)
    assert (on_gpu.context_len, on_gpu.learning_rate, on_gpu.steps) == (2048, 8e-4, 20_000)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("based-350m", "Did you mean 'based-360m'"),
        ("--width 32", "a preset has its own"),
        ("--pattern mamba --width 16 --steps 0", "--steps = 0 must be positive"),
        ("--pattern mamba:stat=3", "mamba has no option 'stat'"),
        ("--data nowhere", "nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_line(
    words: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(monkeypatch, *words.split(), "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_ctrl_c_writes_a_checkpoint_and_the_same_command_resumes(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*SMALL, "--data", str(corpus), "--steps", "10000", "--out", str(out)]
    command = [sys.executable, "-m", "holdall.cli", "train", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    steps = 0
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while len(files.read_lines(out / "metrics.jsonl")) <= steps and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "the same command resumes from here" in said
        before, steps = steps, holdall.load(out, checkpoint="last").step
        assert steps > before
        logged_lines = [line["step"] for line in files.read_lines(out / "metrics.jsonl") if "loss" in line]
        assert logged_lines == list(range(1, steps + 1))


def test_the_code_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    exec(compile(page.split("```python\n")[1].split("```")[0], "training.md", "exec"), {})
    assert (tmp_path / "runs" / "tiny" / "model.safetensors").exists()


def test_tensorboard_gets_what_the_run_folder_gets(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    out = tmp_path / "run"
    words = [*SMALL, "--data", corpus, "--steps", 4, "--out", out, "--log", "tensorboard"]
    assert run(monkeypatch, *words) == 0
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    logged_lines = files.read_lines(out / "metrics.jsonl")
    ours = [line["loss"] for line in logged_lines if "loss" in line]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(ours)
    assert len(events.Scalars("valid_perplexity")) == 1


def test_weights_and_biases_gets_it_too(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a module of the same name, since the real one wants an account."""
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, line: dict[str, float], step: int) -> None:
            logged.append((step, line))

    class Wandb:
        @staticmethod
        def init(**options: object) -> Run:
            assert json.dumps(options["config"])
            assert options["id"] == "run"
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    words = [*SMALL, "--data", corpus, "--steps", 3, "--out", tmp_path / "run", "--log", "wandb"]
    assert run(monkeypatch, *words) == 0
    assert [step for step, _ in logged] == [1, 2, 3, 3]
    assert math.isfinite(logged[0][1]["loss"])
