"""RWKV-7's value residual: what a model's first layer shares with later ones, wherever models run.

Letters: B row, T time, N = T + 1, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from engine_checks import TOKENIZER, assert_same, definition, requests, texts
from torch import Tensor
from training.test_populations import TASK

from holdall.analysis.matrix import jacobian, matrices_of_model
from holdall.contract import StateError
from holdall.engine.fast import Engine, EngineConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.mixers.rwkv_channel_mix import RWKVChannelMixConfig
from holdall.model import Model, ModelConfig, seeded
from holdall.tasks.data import TaskData
from holdall.testing import laws
from holdall.training.compiled import compile_blocks
from holdall.training.devices import LanguageModelLoss
from holdall.training.stacked import Member, Population

WIDTH, VOCAB = 16, 300
RANKS = {"decay_rank": 3, "a_rank": 4, "gate_rank": 5}


def config(*ranks: int, vocab: int = VOCAB) -> ModelConfig:
    """Time mixings of these value ranks, each with a channel mixing behind it."""
    layers = []
    for layer, rank in enumerate(ranks):
        place = {"width": WIDTH, "layer": layer, "layers": len(ranks)}
        layers += [
            RWKV7Config(value_rank=rank, chunk=4, **RANKS, **place),
            RWKVChannelMixConfig(gate=False, **place),
        ]
    return ModelConfig(vocab=vocab, width=WIDTH, layers=tuple(layers), tied=False)


def build(*ranks: int, vocab: int = VOCAB, seed: int = 0) -> Model:
    """Whose weights are all unlike: initial zeros would hide wrong terms."""
    with seeded(seed):
        model = config(*ranks, vocab=vocab).build().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def tokens(rows: int = 2, length: int = 30) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> Model:
    return build(0, 3, 3)


def reads_own_values(model: Model) -> Model:
    """As if no layer shared anything."""
    model.shared_from = {}
    return model


# ------------------------------------------------------------------------------------------------ a model


def test_later_layers_read_of_the_first_of_their_class(model: Model) -> None:
    assert model.shared_from == {2: 0, 4: 0}
    assert build(3, 0, 3).shared_from == {4: 0}
    assert build(0, 0).shared_from == {}
    hybrid = dataclasses.replace(model.config, layers=(AttentionConfig(width=WIDTH), *model.config.layers))
    assert hybrid.build().shared_from == {3: 1, 5: 1}


@torch.no_grad()
def test_values_are_mixed_with_those_of_the_first_layer(model: Model) -> None:
    """By the equations, from what the layers read."""
    read: dict[int, Tensor] = {}
    for depth in (0, 2):
        hook = lambda mixer, args, depth=depth: read.update({depth: args[0]})  # noqa: E731
        model.mixers[depth].register_forward_pre_hook(hook)
    calls = []
    model.mixers[2].register_forward_hook(lambda *_: calls.append(_[2][0]))
    model(tokens())
    first, later = model.mixers[0], model.mixers[2]

    def value_input(mixer: object, x_BTD: Tensor) -> Tensor:
        before_BTD = F.pad(x_BTD, (0, 0, 1, -1))
        return x_BTD + mixer.mix_ZD[3] * (before_BTD - x_BTD)

    v_first = value_input(first, read[0]) @ first.value.weight.T
    x_v = value_input(later, read[2])
    v = x_v @ later.value.weight.T
    v = v + (v_first - v) * torch.sigmoid(later.v0 + x_v @ later.v1 @ later.v2)
    # a layer without a value residual, whose values are these
    alone = RWKV7Config(width=WIDTH, layer=1, layers=3, chunk=4, **RANKS).build().double()
    alone.load_state_dict(
        {name: w for name, w in later.state_dict().items() if name[:2] not in ("v0", "v1", "v2")}
    )
    alone.value.register_forward_hook(lambda *_: v)
    laws.assert_close("y", calls[0], alone(read[2])[0])


@torch.no_grad()
@pytest.mark.parametrize("ranks", [(0, 3, 3), (3, 3)])
@pytest.mark.parametrize("sizes", [[1, 7, 21, 1], [1] * 30])
def test_any_split_gives_the_whole(ranks: tuple[int, ...], sizes: list[int]) -> None:
    model = build(*ranks)
    whole_BTV, _ = model(tokens())
    states, parts = None, []
    for piece_BT in tokens().split(sizes, dim=1):
        logits_BTV, states = model(piece_BT, states)
        parts.append(logits_BTV)
    laws.assert_close("logits", torch.cat(parts, dim=1), whole_BTV)
    assert laws.distance(reads_own_values(model)(tokens())[0], whole_BTV) > 1e-3 * laws.size(whole_BTV)
    at_BQ = torch.tensor([[0, 3, 29], [5, 5, 6]])
    asked_BQV, _ = build(*ranks)(tokens(), at_BQ=at_BQ, want_states=False)
    laws.assert_close("asked", asked_BQV, whole_BTV.take_along_dim(at_BQ[..., None], dim=1))


@torch.no_grad()
def test_in_place_the_state_is_written_after_what_is_shared_was_read(model: Model) -> None:
    want_BTV, _ = model(tokens())
    states, parts = model.init_states(2, capacity=64), []
    there = [tensor.data_ptr() for state in states for tensor in state]
    for piece_BT in tokens().split([11, 1, 18], dim=1):
        logits_BTV, states = model(piece_BT, states, inplace=True)
        parts.append(logits_BTV)
    laws.assert_close("logits", torch.cat(parts, dim=1), want_BTV)
    assert there == [tensor.data_ptr() for state in states for tensor in state]


def test_states_are_those_of_a_model_without(model: Model) -> None:
    assert model.config.state_elements(9) == config(0, 0, 0).state_elements(9)
    assert model.state_bytes(9) == build(0, 0, 0).state_bytes(9)


def test_gradients_are_those_of_differences(model: Model) -> None:
    rows_BN = tokens(2, 8)
    loss = LanguageModelLoss(model, None, recompute=False)
    weights = [model.mixers[0].value.weight, model.mixers[0].mix_ZD, model.mixers[4].v1, model.mixers[2].v0]
    for weight, gradient in zip(weights, torch.autograd.grad(loss(rows_BN), weights), strict=True):
        turn = laws.draw(*weight.shape, dtype=torch.float64)
        ends = []
        for side in (1e-5, -1e-5):
            with torch.no_grad():
                weight.add_(turn, alpha=side)
                ends.append(loss(rows_BN))
                weight.sub_(turn, alpha=side)
        slope = (ends[0] - ends[1]) / 2e-5
        assert float((gradient * turn).sum()) == pytest.approx(float(slope), rel=1e-6)


# ---------------------------------------------------------------------------------------------- training


def gradients(loss: torch.nn.Module, rows_BN: Tensor) -> list[Tensor]:
    total = loss(rows_BN)
    return [total.detach(), *torch.autograd.grad(total, list(loss.parameters()))]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(0, 3, 3), (3, 3)])
def test_recomputed_blocks_give_the_same_gradients(dtype: torch.dtype | None, ranks: tuple[int, ...]) -> None:
    """Every weight has one, also those of a first layer that has a value residual and nothing to read."""
    model = build(*ranks).float()
    once, again = (gradients(LanguageModelLoss(model, dtype, r), tokens()) for r in (False, True))
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other)
    assert any(gradient.any() for gradient in once[1:])
    assert not torch.equal(
        once[1], gradients(LanguageModelLoss(reads_own_values(model), dtype, False), tokens())[1]
    )


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("ranks", [(0, 3), pytest.param((3, 3, 3), marks=pytest.mark.full)])
def test_compiled_blocks_give_the_same_gradients(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    model, rows_BN = build(*ranks), tokens(2, 9)
    want = gradients(LanguageModelLoss(model, None, False), rows_BN)
    compile_, kinds = torch.nn.Module.compile, []

    def traced(block: torch.nn.Module, **how: object) -> None:
        kinds.append(block)
        compile_(block, backend="aot_eager", fullgraph=True, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    assert compile_blocks(model, 2, 8, None) == {}
    assert len(kinds) == len(model.blocks)
    for one, other in zip(gradients(LanguageModelLoss(model, None, False), rows_BN), want, strict=True):
        torch.testing.assert_close(one, other)


def test_members_of_a_population_are_trained_as_alone() -> None:
    data = TaskData(TASK)

    def members() -> list[Member]:
        found = []
        for seed, rate in enumerate((0.003, 0.01)):
            model = build(0, 3, vocab=32, seed=seed)
            found.append(
                Member(rate, seed, model, torch.optim.AdamW(model.parameters(), lr=rate, fused=True))
            )
        return found

    together, alone = members(), members()
    everyone = Population(together, data, 8, "fp32", record=False)
    for step in range(4):
        losses_P = everyone.step(step)
        for place, member in enumerate(alone):
            batch = data.batch(member.seed, step, 8)
            logits_BQV, _ = member.model(batch.tokens_BN, at_BQ=batch.at_BQ)
            loss = F.cross_entropy(logits_BQV.flatten(0, 1), batch.answer_BQ.flatten())
            member.optimizer.zero_grad()
            loss.backward()
            member.optimizer.step()
            assert losses_P[place].item() == pytest.approx(loss.item(), rel=1e-6)
    for one, other in zip(together, alone, strict=True):
        for (name, weight), own in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(weight, own, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------- engine, analysis


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_engine_writes_what_the_definition_does(device: str) -> None:
    """On a GPU by recorded graphs, which hold what is shared within one step."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, asked = build(0, 3, vocab=TOKENIZER.vocab + 7).eval().to(device), requests(5)
    engine = Engine(model, TOKENIZER, EngineConfig(rows=3, max_context=200))
    assert_same(texts(engine.run(asked)), definition(model, asked))
    assert bool(engine.buffers.graphs) == (device == "cuda")


def test_matrices_of_a_trained_model_are_of_what_the_first_layer_shared(model: Model) -> None:
    tokens_1T = tokens(1, 6)
    given: list[tuple[Tensor, Tensor]] = []
    hook = model.mixers[2].register_forward_pre_hook(
        lambda mixer, args, how: given.append((args[0].detach(), how["shared_BTD"].detach())),
        with_kwargs=True,
    )
    model(tokens_1T)
    hook.remove()
    (found,) = matrices_of_model(model, tokens_1T, [2], jacobian=True)
    x_BTD, shared_BTD = given[0]
    mixer = model.mixers[2]
    full_TDTD = torch.autograd.functional.jacobian(
        lambda x_TD: mixer(x_TD[None], shared_BTD=shared_BTD)[0][0], x_BTD[0]
    )
    want_TJ = full_TDTD.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(torch.from_numpy(found.values_STJ[0]), want_TJ)
    alone_TJ, _ = jacobian(mixer, x_BTD)
    assert (alone_TJ - want_TJ).abs().max() > 1e-3 * want_TJ.max()


# ---------------------------------------------------------------------------------------------- the border


def test_what_is_shared_must_fit() -> None:
    mixer, x_BTD = RWKV7Config(width=WIDTH, value_rank=3).build(), torch.zeros(2, 5, WIDTH)
    with pytest.raises(
        ValueError, match=r"shared_BTD has shape \(2, 4, 16\), where rwkv-7 needs \(2, 5, 16\)"
    ):
        mixer(x_BTD, shared_BTD=x_BTD[:, 1:])
    with pytest.raises(ValueError, match="value_rank is above 0, and it is 0"):
        RWKV7Config(width=WIDTH).build()(x_BTD, shared_BTD=x_BTD)
    with pytest.raises(StateError, match="rwkv-7"):
        mixer.shared(x_BTD, mixer.init_state(3, dtype=torch.float32))
    with pytest.raises(NotImplementedError, match=r"attention of width 16 .* no method `shared`"):
        AttentionConfig(width=WIDTH).build().shared(x_BTD)


@torch.no_grad()
def test_alone_it_keeps_its_own_values() -> None:
    mixer = laws.build(RWKV7Config(width=WIDTH, value_rank=3))
    mixer.__class__ = type(mixer).__mro__[1]
    without = RWKV7Config(width=WIDTH).build()
    without.load_state_dict(
        {name: w for name, w in mixer.state_dict().items() if name[0] != "v" or "." in name}
    )
    x_BTD = laws.draw(2, 9, WIDTH, dtype=torch.float32)
    assert torch.equal(mixer(x_BTD)[0], without(x_BTD)[0])
    torch.testing.assert_close(mixer(x_BTD, shared_BTD=mixer.shared(x_BTD))[0], without(x_BTD)[0])


@torch.no_grad()
def test_under_autocast_what_is_shared_is_as_narrow_as_outputs(model: Model) -> None:
    model = model.float()
    with torch.autocast("cpu", torch.bfloat16):
        x_BTD = laws.draw(2, 9, WIDTH, dtype=torch.float32)
        assert model.mixers[0].shared(x_BTD).dtype == model.mixers[0](x_BTD)[0].dtype == torch.bfloat16
        logits_BTV, _ = model(tokens())
    torch.testing.assert_close(logits_BTV.float(), model(tokens())[0], rtol=0.1, atol=0.3)
