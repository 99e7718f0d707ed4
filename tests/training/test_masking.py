"""Just Read Twice's loss: which tokens are masked, both losses written out, resumed, and on several devices.

Letters: B rows, T tokens read, N = T + 1 tokens of a row, E tokens of the prefix, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from holdall import files
from holdall.commands import train as shown
from holdall.files import RunError
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig, seeded
from holdall.recipes.presets import padded, preset
from holdall.text.shards import write_corpus
from holdall.text.tokenizers import Bytes
from holdall.training import language_models as module
from holdall.training.devices import LanguageModelLoss
from holdall.training.flops import flops_per_token
from holdall.training.language_models import PretrainConfig, Stopped, open_data, pretrain
from holdall.training.masking import Masked, Masking, check_mask_token, mask_token
from holdall.training.optimizer import decayed

E, T = 12, 24
LAYERS = (
    BaseConvConfig(width=16, expand=4),
    PrefixLinearAttentionConfig(width=16, feature_dim=4, heads=2, prefix=E),
    SlidingWindowConfig(width=16, window=5, heads=2, rotary=1.0, bias=False),
)
MODEL = ModelConfig(vocab=264, width=16, layers=LAYERS, mlp=32, mlp_kind="swiglu", norm="rms")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    names = ("Ann", "Bob", "Cleo", "Dora", "Emil")
    chapters = [" ".join(names[i] for i in draw.integers(0, 5, 120)) + "." for _ in range(30)]
    (folder / "text.txt").write_text("\n===\n".join(chapters))
    write_corpus([folder / "text.txt"], folder / "corpus", Bytes(), valid=0.2, separator="\n===\n")
    return folder / "corpus"


def config(corpus: Path, **changes: object) -> PretrainConfig:
    base = PretrainConfig(
        model=MODEL, data=str(corpus), context_len=T, batch=8, micro_batch=4, steps=40, learning_rate=0.01,
        warmup=5, evaluate_every=20, evaluate_rows=16,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def lines(folder: Path) -> list[dict[str, float]]:
    return files.read_lines(folder / "metrics.jsonl")


def of_steps(folder: Path, name: str) -> list[float]:
    return [line[name] for line in lines(folder) if name in line]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain(config(corpus), folder)
    return folder


# ------------------------------------------------------------------------------------------- what is masked


def test_masks_are_a_function_of_seed_and_row_alone() -> None:
    masking = Masking(prefix=E, share=0.3, seed=7, context_len=T)
    all_BE = masking.rows(0, 64)
    assert all_BE.shape == (64, E)
    parts = [masking.rows(first, count) for first, count in ((0, 5), (5, 1), (6, 58))]
    assert np.array_equal(np.concatenate(parts), all_BE)
    other = dataclasses.replace(masking, seed=8).rows(0, 64)
    assert 0.2 < (other != all_BE).mean() < 0.6  # 2 * 0.3 * 0.7 = 0.42 of two independent draws


def test_masks_are_those_of_every_machine_and_version() -> None:
    """Or a run would not resume: splitmix64 of seed, row and place, written out in whole numbers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def masked(row: int, place: int) -> bool:
        draw = mix(mix(mix(7 ^ 0x6A72742D6D61736B) ^ row) ^ mix(place))
        return place < E - 1 and (draw >> 11) / 2**53 < 0.3

    masked_BE = Masking(prefix=E, share=0.3, seed=7, context_len=T).rows(0, 64)
    assert masked_BE.tolist() == [[masked(row, place) for place in range(E)] for row in range(64)]
    assert masked_BE[0].nonzero()[0].tolist() == [5, 8, 10]


def test_tokens_are_masked_independently_and_the_last_one_never() -> None:
    """Within four standard deviations of a binomial; neighbours in rows and places are no more alike."""
    masking = Masking(prefix=101, share=0.15, seed=0, context_len=200)
    masked_BE = masking.rows(10**12, 400)
    assert not masked_BE[:, -1].any()
    draws = masked_BE[:, :-1]
    assert abs(draws.mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / draws.size)
    for one, other in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert abs((one & other).mean() - 0.15**2) < 4 * 0.15 / np.sqrt(one.size)
    assert draws.any(0).all()
    assert draws.any(1).all()


@pytest.mark.parametrize("world", [1, 2])
def test_passes_are_the_rows_of_a_step_in_parts(world: int) -> None:
    masking = Masking(prefix=E, share=0.3, seed=1, context_len=T)
    whole_BE = masking.rows(3 * 8, 8)
    shares, places = 0.0, []
    for rank in range(world):
        count = 8 // world
        for number, masked in enumerate(masking.passes(3, 8, rank * count, count, 2)):
            shares += masked.weight
            first = rank * count + 2 * number
            places += [(first + place // T, place % T) for place in masked.index_M.tolist()]
    assert places == list(zip(*map(list, whole_BE.nonzero()), strict=True))
    assert shares == pytest.approx(4)  # one for each pass


@pytest.mark.parametrize(("share", "prefix"), [(1e-9, E), (0.5, 1)])
def test_a_step_may_have_no_masked_token(share: float, prefix: int) -> None:
    passes = Masking(prefix=prefix, share=share, seed=1, context_len=T).passes(0, 8, 0, 8, 4)
    assert [(len(masked.index_M), masked.weight) for masked in passes] == [(0, 0.0)] * 2


def test_the_mask_token_is_the_last_row_of_the_padded_vocabulary() -> None:
    assert mask_token(preset("jrt-360m", 50257)) == mask_token(preset("jrt-1b", 50257)) == 50263
    assert [padded(vocab, LAYERS) for vocab in (255, 256, 257)] == [256, 264, 264]
    assert [padded(vocab, LAYERS[:1]) for vocab in (255, 256, 257)] == [256, 256, 264]
    for vocab in (256, 257, 4096):
        check_mask_token(preset("jrt-15m", vocab), vocab)


def test_a_model_without_a_row_for_the_mask_token_is_refused(corpus: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(MODEL, vocab=257)
    with pytest.raises(
        RunError, match=r"beyond the tokenizer's 257 tokens.*its vocab is 257: pad it, to 264"
    ):
        pretrain(config(corpus, model=short), tmp_path / "run")
    pretrain(config(corpus, model=short, mlm_weight=0.0, steps=1), tmp_path / "run")


# ------------------------------------------------------------------------------------------------- the loss


def written_out(
    model: torch.nn.Module, rows_BN: torch.Tensor, masked_BE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of the losses of next and of masked tokens, from all logits, position by position."""
    tokens_BT = rows_BN[:, :-1].clone()
    for row, place in masked_BE.nonzero().tolist():
        tokens_BT[row, place] = model.config.vocab - 1
    log_p_BTV = model(tokens_BT)[0].log_softmax(-1)
    ntp = [
        -log_p_BTV[row, t, rows_BN[row, t + 1]]
        for row, t in itertools.product(range(len(rows_BN)), range(E - 1, tokens_BT.shape[1]))
    ]
    mlm = [-log_p_BTV[row, t, rows_BN[row, t]] for row, t in masked_BE.nonzero().tolist()]
    return torch.stack(ntp).mean(), torch.stack(mlm).mean()


@pytest.mark.quick
def test_both_losses_and_their_gradients_are_as_written_out() -> None:
    """In fp64; among the masked tokens is token 0, which the published code drops."""
    with seeded(0):
        model = MODEL.build().double()
    rows_BN = torch.randint(257, (3, T + 1), generator=torch.Generator().manual_seed(0))
    masked_BE = torch.zeros(3, E, dtype=torch.bool)
    for row, place in ((0, 0), (0, 5), (2, E - 2)):
        masked_BE[row, place] = True
    rows_BN[0, 5] = 0
    row_M, place_M = masked_BE.nonzero().unbind(1)
    masked = Masked(row_M * T + place_M, 2.0)
    losses = LanguageModelLoss(model, None, recompute=False)(rows_BN, masked)
    ntp, mlm = written_out(model, rows_BN, masked_BE)
    torch.testing.assert_close(losses, torch.stack((ntp, 2 * mlm)), rtol=1e-12, atol=0)
    ours = torch.autograd.grad(losses[0] + 0.25 * losses[1], list(model.parameters()))
    theirs = torch.autograd.grad(ntp + 0.25 * 2 * mlm, list(model.parameters()))
    for (name, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13, msg=name)


def test_a_masked_token_is_a_target_and_nothing_else() -> None:
    with seeded(0):
        model = MODEL.build()
    loss = LanguageModelLoss(model, None, recompute=False)
    rows_BN = torch.randint(257, (2, T + 1), generator=torch.Generator().manual_seed(0))
    masked = Masked(torch.tensor([3, T + 7]), 1.0)
    ntp, mlm = loss(rows_BN, masked)
    rows_BN[0, 3] = (rows_BN[0, 3] + 1) % 257
    other_ntp, other_mlm = loss(rows_BN, masked)
    assert torch.equal(ntp, other_ntp)
    assert not torch.equal(mlm, other_mlm)
    assert not torch.equal(loss(rows_BN), ntp)  # what is masked is missed
    assert loss(rows_BN, Masked(torch.tensor([], dtype=torch.long), 0.0)).tolist() == [
        loss(rows_BN).item(),
        0,
    ]


def test_a_step_is_what_a_user_would_write(corpus: Path, tmp_path: Path) -> None:
    """All logits of the whole batch at once: passes of two rows, which have unequal shares, add up to it."""
    run = config(corpus, steps=5, micro_batch=2, mlm_weight=0.5, mlm_share=0.4)
    pretrain(run, tmp_path / "run")
    data = open_data(run)
    with seeded(0):
        model = MODEL.build()
    matrices = decayed(model)
    groups = [
        {"params": [w for n, w in model.named_parameters() if (n in matrices) is decays],
         "weight_decay": 0.1 if decays else 0.0}
        for decays in (True, False)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    masking = Masking(prefix=E, share=0.4, seed=0, context_len=T)
    for step, line in enumerate(line for line in lines(tmp_path / "run") if "loss" in line):
        starts = module.Order(len(data.train), T, 0).rows(step, 8)
        rows_BN = torch.stack([torch.from_numpy(data.train[s : s + T + 1]).long() for s in starts])
        ntp, mlm = written_out(model, rows_BN, torch.from_numpy(masking.rows(8 * step, 8)))
        loss = ntp + 0.5 * mlm
        found = [line[name] for name in ("loss", "ntp_loss", "mlm_loss")]
        assert found == pytest.approx([loss.item(), ntp.item(), mlm.item()], rel=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def test_the_validation_loss_is_that_of_the_tokens_after_the_prefix(corpus: Path, whole: Path) -> None:
    """Nothing is masked in it; both losses fall."""
    valid = open_data(config(corpus)).valid
    model = MODEL.build()
    model.load_state_dict(load_file(whole / "model.safetensors"))
    rows_BN = torch.stack([torch.from_numpy(valid[w * T : w * T + T + 1]).long() for w in range(16)])
    want = F.cross_entropy(model(rows_BN[:, :-1])[0][:, E - 1 :].flatten(0, 1), rows_BN[:, E:].flatten())
    assert of_steps(whole, "valid_loss")[-1] == pytest.approx(want.item(), rel=1e-5)
    assert of_steps(whole, "ntp_loss")[-1] < 0.8 * of_steps(whole, "ntp_loss")[0]
    assert of_steps(whole, "mlm_loss")[-1] < 0.8 * of_steps(whole, "mlm_loss")[0]


@pytest.mark.parametrize("off", [{"mlm_weight": 0.0}, {"mlm_share": 0.0}])
def test_without_masks_the_loss_is_of_next_tokens_alone(
    off: dict[str, float], corpus: Path, tmp_path: Path
) -> None:
    pretrain(config(corpus, steps=2, **off), tmp_path / "run")
    first = lines(tmp_path / "run")[0]
    assert "ntp_loss" not in first
    with seeded(0):
        loss = LanguageModelLoss(MODEL.build(), None, recompute=False)
    data = open_data(config(corpus))
    starts = module.Order(len(data.train), T, 0).rows(0, 8)
    rows_BN = torch.stack([torch.from_numpy(data.train[s : s + T + 1]).long() for s in starts])
    assert first["loss"] == pytest.approx(loss(rows_BN).item(), rel=1e-5)


def test_a_model_without_a_prefix_has_no_masks(corpus: Path, tmp_path: Path) -> None:
    causal = dataclasses.replace(MODEL, layers=(LAYERS[0], LAYERS[2]), vocab=257)
    run = config(corpus, model=causal, steps=1)
    assert run.masking is None
    pretrain(run, tmp_path / "run")
    assert "ntp_loss" not in lines(tmp_path / "run")[0]


def test_operations_are_those_of_pytorchs_counter(corpus: Path) -> None:
    """The head's at what is predicted alone, and of the prefix' maps those on the prefix."""
    from torch.utils.flop_counter import FlopCounterMode

    run = config(corpus)
    assert run.predictions == T - E + 1 + 0.15 * (E - 1)
    assert config(corpus, mlm_weight=0.0).predictions == T - E + 1
    assert dataclasses.replace(run, model=dataclasses.replace(MODEL, layers=LAYERS[:1])).predictions == T
    layers = (PrefixLinearAttentionConfig(width=32, heads=2, feature_dim=4, prefix=8),)
    model = ModelConfig(vocab=96, width=32, layers=layers, mlp=64, mlp_kind="swiglu", norm="rms").build()
    model.mixers[0].forward = (
        lambda x, state=None, **_: (  # the maps alone: the rest is not counted
            model.mixers[0].out_proj(model.mixers[0].qkv(x)[..., :32])
            + F.pad(model.mixers[0].prefix_kv(x[:, :8])[..., :32], (0, 0, 0, 12)),
            None,
        )
    )
    with FlopCounterMode(display=False) as counter:
        h_BTD = model.hidden(torch.randint(96, (2, 20)), want_states=False)[0]
        (h_BTD[:, 7:] @ model.head_weight.T).sum().backward()
    norms = 6 * 32 * 3
    assert counter.get_total_flops() / 40 == pytest.approx(flops_per_token(model, 20, 13) - norms, rel=1e-4)


def test_the_header_says_what_is_masked(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (weight, said) in enumerate(((0.25, True), (0.0, False))):
        changes = {
            "data": str(corpus), "context_len": 16, "batch": 2, "micro_batch": 2, "steps": 1,
            "evaluate_rows": 2, "mlm_weight": weight,
        }  # fmt: skip
        shape = {"width": 16, "depth": 2, "mlp": None}
        pattern = ["prefix-linear-attention:prefix=8,heads=2", "base-conv"]
        out = tmp_path / f"run-{number}"
        shown.train("based-mini", out, pattern, shape, changes, "cpu", 1, 1, "auto", (), (), True)
        printed = " ".join(capsys.readouterr().out.split())
        assert ("15% of a prefix of 8 are masked, with a loss of weight 0.25" in printed) == said


# ------------------------------------------------------------------------------- resumed, and in other ways


def test_stopped_anywhere_it_resumes_bit_exactly(
    corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REPORT_STEPS", 1)
    for stop_after in (3, 8):
        asked = iter(range(10**6))
        with pytest.raises(Stopped):
            pretrain(
                config(corpus),
                tmp_path / "cut",
                should_stop=lambda asked=asked, last=stop_after: next(asked) == last,
            )
    pretrain(config(corpus), tmp_path / "cut")
    for name in ("loss", "ntp_loss", "mlm_loss", "grad_norm", "valid_loss"):
        assert of_steps(tmp_path / "cut", name) == of_steps(whole, name)
    for name in ("model", "last"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path / "cut", whole))
        assert all(torch.equal(one[key], other[key]) for key in one | other)


@pytest.mark.parametrize("how", [{"recompute": True}, {"precision": "bf16"}])
def test_it_trains_in_other_ways(how: dict[str, object], corpus: Path, tmp_path: Path, whole: Path) -> None:
    pretrain(config(corpus, **how), tmp_path / "run")
    rel = 0.0 if "recompute" in how else 0.05
    assert of_steps(tmp_path / "run", "loss") == pytest.approx(of_steps(whole, "loss"), rel=rel)


@pytest.mark.compile
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch hides it itself
def test_compiled_it_learns_the_same(corpus: Path, tmp_path: Path, whole: Path) -> None:
    torch.compiler.reset()
    result = pretrain(config(corpus, compile=True, steps=3), tmp_path / "run")
    assert result["uncompiled"] == {}
    assert of_steps(tmp_path / "run", "loss")[:1] == pytest.approx(of_steps(whole, "loss")[:1], rel=1e-4)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from holdall.training.devices import launcher
from holdall.training.language_models import PretrainConfig, pretrain

torch.set_num_threads(1)
folder, plain, strategy = sys.argv[1:]
pretrain(PretrainConfig.from_dict(json.loads(plain)), Path(folder), fabric=launcher("cpu", 2, strategy))
"""


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(
    strategy: str, corpus: Path, tmp_path: Path, whole: Path
) -> None:
    script, plain = tmp_path / "run.py", json.dumps(config(corpus, micro_batch=2).to_dict())
    script.write_text(SCRIPT)  # in a file, as Fabric starts the second process by the first one's command
    run = [sys.executable, str(script), str(tmp_path / "run"), plain, strategy]
    subprocess.run(run, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    for name in ("loss", "ntp_loss", "mlm_loss"):
        assert of_steps(tmp_path / "run", name) == pytest.approx(of_steps(whole, name), rel=1e-3)
