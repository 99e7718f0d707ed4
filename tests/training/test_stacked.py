"""Populations: stacked they train as they would alone, in both precisions, and resume where they stopped."""

import json
from pathlib import Path

import pytest
import torch
from children import kill_and_resume
from torch.func import vmap
from training.test_populations import TASK, assert_same_run, config, weights

from holdall import files
from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.performer import PerformerConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig, seeded
from holdall.ops import attention
from holdall.tasks.data import TaskData
from holdall.training import stacked
from holdall.training.populations import Stopped, TrainConfig, accuracy, train
from holdall.training.stacked import Member, Population

MIXERS: tuple[MixerConfig, ...] = (
    AttentionConfig(width=16),
    SlidingWindowConfig(width=16, window=5),
    TaylorConfig(width=16, feature_dim=4),
    PerformerConfig(width=16),  # each has drawn its own features, which are no weights
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def members(
    mixer: MixerConfig,
    dtype: torch.dtype,
    rates: tuple[float, ...] = (0.003, 0.01, 0.02),
    *,
    tied: bool = True,
) -> list[Member]:
    config = ModelConfig(vocab=32, width=16, layers=(BaseConvConfig(width=16), mixer), tied=tied)
    made = []
    for seed, rate in enumerate(rates):
        with seeded(seed):
            model = config.build().to(dtype)
        made.append(Member(rate, seed, model, torch.optim.AdamW(model.parameters(), lr=rate, fused=True)))
    return made


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.name)
@pytest.mark.parametrize(
    ("dtype", "error", "tied"),
    [(torch.float64, 1e-9, True), (torch.float64, 1e-9, False), (torch.float32, 2e-3, True)],
)
def test_stacked_members_are_trained_as_by_torch_s_own_adamw(
    mixer: MixerConfig, dtype: torch.dtype, error: float, tied: bool
) -> None:
    together, alone = (members(mixer, dtype, tied=tied) for _ in range(2))
    data = TaskData(TASK)
    everyone = Population(together, data, 16, "fp32", record=False)
    for step in range(12):
        losses_P = everyone.step(step)
        for place, member in enumerate(alone):
            batch = data.batch(member.seed, step, 16)
            logits_BQV, _ = member.model(batch.tokens_BN, at_BQ=batch.at_BQ)
            loss = torch.nn.functional.cross_entropy(logits_BQV.flatten(0, 1), batch.answer_BQ.flatten())
            member.optimizer.zero_grad()
            loss.backward()
            member.optimizer.step()
            assert losses_P[place].item() == pytest.approx(loss.item(), rel=1e-4)
    for one, other in zip(together, alone, strict=True):
        for (name, weight), own in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(weight, own, rtol=error, atol=error, msg=lambda m, n=name: f"{n}: {m}")


def test_a_member_does_not_see_who_is_beside_it() -> None:
    data = TaskData(TASK)
    ends = []
    for rates in ((0.003, 0.01), (0.003, 1e30)):  # a neighbour that trains well, and one that diverges
        pair = members(MIXERS[0], torch.float64, rates)
        everyone = Population(pair, data, 16, "fp32", record=False)
        for step in range(8):
            everyone.step(step)
        ends.append([weight.detach().clone() for weight in pair[0].model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_one_that_leaves_continues_from_its_own_weights_and_moments() -> None:
    data = TaskData(TASK)
    three, alone = members(MIXERS[2], torch.float64), members(MIXERS[2], torch.float64)[1:2]
    both = Population(alone, data, 16, "fp32", record=False)
    everyone = Population(three, data, 16, "fp32", record=False)
    for step in range(10):
        if step == 5:
            left = [weight.detach().clone() for weight in three[0].model.parameters()]
            everyone = Population(three[1:], data, 16, "fp32", record=False)
        everyone.step(step)
        both.step(step)
    for one, other in zip(three[1].model.parameters(), alone[0].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for before, now in zip(left, three[0].model.parameters(), strict=True):
        assert torch.equal(before, now)


@pytest.mark.parametrize("tied", [True, False])
def test_all_are_tested_at_once_as_each_alone(tied: bool) -> None:
    data, trained = TaskData(TASK), members(MIXERS[0], torch.float32, tied=tied)
    everyone = Population(trained, data, 16, "fp32", record=False)
    for step in range(30):
        everyone.step(step)
    for tokens in (100, 10**6):  # many small parts, the last of them smaller, or all rows at once
        found = everyone.accuracies(tokens)
        for member, scores in zip(trained, found, strict=True):
            alone = [accuracy(member.model, rows, "fp32", 1 << 15) for rows in data.test]
            assert scores == pytest.approx(alone)
    assert any(score > 0.1 for scores in found for score in scores)


def test_bf16_learns_and_is_another_run_than_fp32(tmp_path: Path) -> None:
    def run(name: str, **changes: object) -> list[dict]:
        return train(config(learning_rates=(0.01, 0.02), **changes), tmp_path / name, together=True)

    exact, rough = run("fp32"), run("bf16", precision="bf16")
    assert [r["steps"] for r in rough] == [r["steps"] for r in exact]
    for one, other in zip(exact, rough, strict=True):
        assert abs(one["accuracy"] - other["accuracy"]) < 0.25
    assert not torch.equal(
        weights(tmp_path / "fp32")["embed.weight"], weights(tmp_path / "bf16")["embed.weight"]
    )
    with pytest.raises(files.RunError, match="another config"):
        run("fp32", precision="bf16")


@pytest.mark.parametrize("mask", ["none", "shared", "per row", "per member"])
def test_attention_takes_members_as_rows(mask: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    visible = {
        "none": None,
        "shared": lower,
        "per row": (lower & (torch.rand(2, 1, 5, 5) > 0.3)) | torch.eye(5, dtype=torch.bool),
        "per member": (lower & (torch.rand(3, 2, 1, 5, 5) > 0.3)) | torch.eye(5, dtype=torch.bool),
    }[mask]
    dims = (0, 0, 0, 0 if mask == "per member" else None)
    y = vmap(lambda q, k, v, seen: attention._attend(q, k, v, seen, 0.3), in_dims=dims)(q, k, v, visible)
    each = [
        attention._attend(q[i], k[i], v[i], visible[i] if mask == "per member" else visible, 0.3)
        for i in range(3)
    ]
    torch.testing.assert_close(y, torch.stack(each))
    up = torch.randn_like(y)
    for one, other in zip(
        torch.autograd.grad(y, (q, k, v), up),
        torch.autograd.grad(torch.stack(each), (q, k, v), up),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_rows_are_counted(tmp_path: Path) -> None:
    data = TaskData(TASK)
    seen = 0
    for step in range(40):
        assert data.rows_before(step, 16) == seen
        seen += len(data.batch(0, step, 16).tokens_BN)
    (result,) = train(config(), tmp_path / "run")
    assert result["rows"] == 3 * 160
    assert result["forms"] == ["parallel", "parallel"]


def test_weights_need_not_be_kept(tmp_path: Path) -> None:
    (result,) = train(config(), tmp_path / "run", keep_weights=False)
    assert result["weights"] is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".lock", "config.json", "environment.json", "metrics.jsonl", "result.json",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ resuming, side by side


def population_config(**changes: object) -> TrainConfig:
    return config(learning_rates=(0.003, 0.01), seeds=(0, 1), **changes)


def test_a_population_stopped_anywhere_resumes_bit_exactly(tmp_path: Path) -> None:
    train(population_config(), tmp_path / "whole", together=True)
    for stop_after in (1, 3, 9, 15):
        steps = iter(range(10**6))
        with pytest.raises(Stopped):
            train(
                population_config(),
                tmp_path / "cut",
                together=True,
                should_stop=lambda steps=steps, last=stop_after: next(steps) == last,
            )
    train(population_config(), tmp_path / "cut", together=True)
    for member in range(4):
        assert_same_run(tmp_path / "whole", tmp_path / "cut", member)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_population_killed_at_any_moment_gives_the_same_result(tmp_path: Path, device: str) -> None:
    run = population_config(epochs=16)
    train(run, tmp_path / "whole", device=device, together=True)
    how = {"checkpoint": "checkpoint.safetensors", "device": device, "together": True}
    kill_and_resume(train, run, tmp_path / "cut", at=(2, 6, 11), **how)
    for member in range(4):
        assert_same_run(tmp_path / "whole", tmp_path / "cut", member)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recorded_step_is_the_step(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = population_config(precision=precision)
    train(run, tmp_path / "recorded", device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(stacked.Recording, "__call__", lambda recording: recording.function())
        train(run, tmp_path / "eager", device="cuda")
    for member in range(4):
        assert_same_run(tmp_path / "recorded", tmp_path / "eager", member)


@needs_gpu
def test_on_a_gpu_members_end_near_where_the_cpu_ends(tmp_path: Path) -> None:
    run = population_config(epochs=2)
    on_gpu = train(run, tmp_path / "gpu", device="cuda")
    on_cpu = train(run, tmp_path / "cpu")
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.1)
    assert "gpu" in json.loads((tmp_path / "gpu" / "environment.json").read_text())


def test_questions_need_not_be_in_order() -> None:
    model = members(MIXERS[0], torch.float64)[0].model
    tokens_BN, at_BQ = torch.randint(0, 32, (3, 12)), torch.tensor([[7, 2, 9]] * 3)
    up_BQD = torch.randn(3, 3, 16, dtype=torch.float64)
    grads = []
    for picked in (model.hidden(tokens_BN, at_BQ=at_BQ)[0], model.hidden(tokens_BN)[0][:, [7, 2, 9]]):
        grads.append(torch.autograd.grad(picked, list(model.parameters()), up_BQD, allow_unused=True))
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
