"""bf16 means one thing in sweeps, training, scoring and generation: equal dtypes and equal results."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.performer import PerformerConfig
from holdall.mixers.s4 import S4Config
from holdall.model import Model, ModelConfig, seeded
from holdall.precision import block_copies, compute_in, dtype_of, run_block
from holdall.tasks.data import MQARData, MQARSegment, Questions, TaskData
from holdall.training import stacked
from holdall.training.devices import LanguageModelLoss
from holdall.training.stacked import Member, Population

WIDE, NARROW = torch.float32, torch.bfloat16
LAYERS: tuple[MixerConfig, ...] = (
    BaseConvConfig(width=16),
    MambaConfig(width=16, state=4),
    AttentionConfig(width=16, rotary=1.0),
    S4Config(width=16),  # complex weights
    PerformerConfig(width=16),  # a buffer
)
SEGMENT = MQARSegment(length=24, pairs=3, rows=8)
TASK = TaskData(MQARData(vocab=32, filler="zero", train=(SEGMENT,), test=(SEGMENT,)))


def model(norm: str = "layer", positions: int = 0, seed: int = 0) -> Model:
    with seeded(seed):
        return ModelConfig(vocab=32, width=16, layers=LAYERS, mlp=32, norm=norm, positions=positions).build()


def watched(model: Model) -> dict[str, set[torch.dtype]]:
    """The dtypes that a model's parts see and give from now on, and those of recurrent states."""
    seen: dict[str, set[torch.dtype]] = {}

    def see(name: str, *tensors: Tensor) -> None:
        seen.setdefault(name, set()).update(tensor.dtype for tensor in tensors)

    def block_hook(block: torch.nn.Module, args: tuple, out: tuple) -> None:
        see("residual stream", args[0], out[0])
        see("block weights", *(w for w in block.parameters() if w.is_floating_point()))

    def mixer_hook(mixer: torch.nn.Module, args: tuple, out: tuple) -> None:
        see("activations", args[0], out[0])
        if isinstance(mixer.config, MambaConfig) and out[1] is not None:
            see("recurrent state", out[1].h_BEN)

    for block in model.blocks:
        block.register_forward_hook(block_hook)
        block.mixer.register_forward_hook(mixer_hook)
    model.embed.register_forward_hook(lambda embed, args, out: see("embedding", embed.weight, out))
    model.norm.register_forward_hook(lambda norm, args, out: see("last norm", norm.weight, args[0], out))
    return seen


def as_training(model: Model, tokens_BT: Tensor) -> Tensor:
    return model.hidden(tokens_BT, run=LanguageModelLoss(model, NARROW, recompute=False)._run)[0]


def as_a_sweep(model: Model, tokens_BT: Tensor) -> Tensor:
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    everywhere_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
    hidden = torch.func.functional_call(
        stacked._Hidden(model),
        {f"model.{name}": w for name, w in block_copies(weights, NARROW).items()},
        (tokens_BT, everywhere_BT),
    )
    return hidden[0]


def as_scoring(model: Model, tokens_BT: Tensor) -> Tensor:
    return model.hidden(tokens_BT)[0]


def as_generation(model: Model, tokens_BT: Tensor) -> Tensor:
    """Token by token, with states."""
    states, parts = None, []
    for token_B1 in tokens_BT.split(1, dim=1):
        h_B1D, states = model.hidden(token_B1, states, inplace=True)
        parts.append(h_B1D)
    return torch.cat(parts, dim=1)


WAYS: tuple[Callable[[Model, Tensor], Tensor], ...] = (as_training, as_a_sweep, as_scoring, as_generation)


def prepared(way: Callable[[Model, Tensor], Tensor], of: Model) -> Model:
    """A copy of the model; for scoring and generation, which only read it, with its blocks in bf16."""
    return compute_in(NARROW, copy.deepcopy(of)) if way in (as_scoring, as_generation) else copy.deepcopy(of)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_is_in_which_dtype(way: Callable[[Model, Tensor], Tensor], norm: str) -> None:
    ours, tokens_BT = prepared(way, model(norm, positions=40)), torch.randint(32, (2, 20))
    seen = watched(ours)
    with torch.no_grad():
        assert way(ours, tokens_BT).dtype == WIDE
    states = {"recurrent state": {WIDE}} if way is not as_a_sweep else {}  # which asks for none
    assert seen == {
        "embedding": {WIDE},
        "residual stream": {WIDE},
        "block weights": {NARROW},
        "activations": {NARROW},
        "last norm": {WIDE},
        **states,
    }


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_all_ways_give_the_same(norm: str) -> None:
    ours, tokens_BT = model(norm), torch.randint(32, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = ours.hidden(tokens_BT)[0]
        training, sweep, scoring, generation = (way(prepared(way, ours), tokens_BT) for way in WAYS)
    assert torch.equal(training, sweep)
    assert torch.equal(training, scoring)
    off = (exact - training).abs().max()
    assert off > 1e-3  # it is bf16
    assert (generation - training).abs().max() < 2 * off  # other sums of as many digits


def test_weights_gradients_and_losses_are_fp32() -> None:
    batch = TASK.batch(0, 0, 4)
    for loss_of in (
        lambda ours: LanguageModelLoss(ours, NARROW, False)(batch.tokens_BN),
        lambda ours: LanguageModelLoss(ours, NARROW, True)(batch.tokens_BN),
        lambda ours: stacked.loss(ours, dict(ours.named_parameters()), batch, "bf16"),
    ):
        ours = model()
        loss = loss_of(ours)
        loss.backward()
        assert loss.dtype == WIDE
        kinds = {
            (w.dtype, w.grad.dtype) for w in ours.parameters() if not w.is_complex() and w.grad is not None
        }
        assert kinds == {(WIDE, WIDE)}


def test_a_population_in_bf16_trains_as_its_members_alone() -> None:
    def member(seed: int) -> Member:
        own = model(seed=seed)
        return Member(0.01, seed, own, torch.optim.AdamW(own.parameters(), lr=0.01, fused=True))

    pair, alone = [member(0), member(1)], [member(0), member(1)]
    everyone = Population(pair, TASK, 4, "bf16", record=False)
    for step in range(3):
        losses_P = everyone.step(step)
        for place, own in enumerate(alone):
            batch = TASK.batch(own.seed, step, 4)
            loss = stacked.loss(own.model, dict(own.model.named_parameters()), batch, "bf16")
            loss.backward()
            own.optimizer.step()
            own.optimizer.zero_grad()
            assert losses_P[place].item() == pytest.approx(loss.item(), rel=2e-2)
    for one in pair:
        assert {w.dtype for w in one.model.parameters()} == {w.dtype for w in alone[0].model.parameters()}
        moments = [value for state in one.optimizer.state.values() for value in state.values()]
        assert {moment.dtype for moment in moments if not moment.is_complex()} == {WIDE}


def test_both_losses_are_one_function() -> None:
    """A sweep's loss on questions at all positions is a language model's loss of the same rows."""
    ours, rows_BN = model(), torch.randint(32, (3, 17))
    at_BQ = torch.arange(16).expand(3, 16)
    for precision in ("fp32", "bf16"):
        one = LanguageModelLoss(ours, dtype_of(precision), False)(rows_BN)
        questions = Questions(rows_BN[:, :-1], at_BQ, rows_BN[:, 1:])
        other = stacked.loss(ours, dict(ours.named_parameters()), questions, precision)
        assert torch.equal(one, other)


def test_copies_of_weights_hand_their_gradients_back() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 7).T)
            self.left_out = torch.nn.Parameter(torch.randn(3))
            self.narrow = torch.nn.Parameter(torch.randn(5).bfloat16())
            self.register_buffer("places", torch.arange(5))
            self.register_buffer("scale", torch.full((5,), 1 / 3))

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            assert {u.dtype for u in (self.weight, self.left_out, self.narrow)} == {torch.bfloat16}
            return (r.bfloat16() @ self.weight)[:, self.places] * self.scale + self.narrow

    with seeded(0):
        block, r = Odd(), torch.randn(4, 7)
    found = []
    for ours in (True, False):
        block.zero_grad()
        if ours:
            y = run_block(block, torch.bfloat16, r)
        else:
            weight, scale = block.weight.to(torch.bfloat16), block.scale.to(torch.bfloat16)
            y = (r.bfloat16() @ weight) * scale + block.narrow
        y.float().square().sum().backward()
        found.append((y.detach(), block.weight.grad, block.narrow.grad))
        assert block.left_out.grad is None
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
