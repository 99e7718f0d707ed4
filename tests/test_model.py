"""The backbone: logits where they are asked for, states that continue, what is counted."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from holdall.analysis.recall import predict
from holdall.contract import (
    StateError,
    bytes_per_row,
    elements_per_row,
    join_rows,
    load_states,
    save_states,
    select_rows,
)
from holdall.contract.rollback import LISTED
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.linformer import LinformerConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.repeat_attention import RepeatAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import MLP, Model, ModelConfig, head_loss
from holdall.recipes.patterns import based
from holdall.tasks.data import Questions
from holdall.training import stacked
from holdall.training.devices import LanguageModelLoss

pytestmark = pytest.mark.quick

CONFIG = ModelConfig(vocab=40, width=16, layers=based(16, feature_dim=4, window=5), mlp=24, positions=64)
UNTIED = dataclasses.replace(CONFIG, tied=False)
AFTER = dataclasses.replace(CONFIG, norms_after=(1, 2), norm="rms")


def build(config: ModelConfig = CONFIG) -> Model:
    torch.manual_seed(0)
    return config.build().double()


def tokens(rows: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "geglu"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("positions", [0, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_any_split_gives_the_whole(kind: str, norm: str, positions: int, tied: bool) -> None:
    model = build(dataclasses.replace(CONFIG, mlp_kind=kind, norm=norm, positions=positions, tied=tied))
    whole, _ = model(tokens())
    states, parts = None, []
    for piece in tokens().split([1, 7, 21, 1], dim=1):
        logits, states = model(piece, states)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


def test_norms_may_come_after_mixers_and_mlps() -> None:
    config = dataclasses.replace(AFTER, norms_after=(len(AFTER.layers) - 1,), positions=0)
    model = build(config)
    for weight in model.parameters():  # norms that start at one would hide where they are
        torch.nn.init.normal_(weight, std=0.5)
    r = model.embed(tokens())
    for depth, block in enumerate(model.blocks):
        mix = lambda x, block=block: block.mixer(x, want_state=False)[0]  # noqa: E731
        if depth < len(model.blocks) - 1:
            r = r + mix(block.norm(r))
            r = r + block.mlp(block.mlp_norm(r))
        else:
            r = r + block.norm(mix(r))
            r = r + block.mlp_norm(block.mlp(r))
    logits, _ = model(tokens())
    torch.testing.assert_close(logits, model.norm(r) @ model.embed.weight.T, rtol=0, atol=1e-10)


def test_norms_after_give_the_whole_from_any_split() -> None:
    model = build(AFTER)
    whole, _ = model(tokens())
    first, states = model(tokens()[:, :13])
    second, _ = model(tokens()[:, 13:], states)
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [CONFIG, UNTIED, AFTER], ids=["tied", "untied", "norms after"])
def test_logits_asked_for_are_those_of_all_positions(config: ModelConfig) -> None:
    at = torch.tensor([[0, 3, 29], [5, 5, 6]])
    every, _ = build(config)(tokens())
    asked, states = build(config)(tokens(), at_BQ=at, want_states=False)
    assert states is None
    torch.testing.assert_close(asked, every.take_along_dim(at[..., None], dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [CONFIG, UNTIED, AFTER], ids=["tied", "untied", "norms after"])
def test_logits_asked_for_carry_the_same_gradients(config: ModelConfig) -> None:
    at = torch.tensor([[0, 3, 29], [5, 5, 6]])
    some, every = build(config), build(config)
    some(tokens(), at_BQ=at)[0].square().sum().backward()
    every(tokens())[0].take_along_dim(at[..., None], dim=1).square().sum().backward()
    for (name, a), b in zip(some.named_parameters(), every.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_a_state_is_saved_and_its_rows_selected(tmp_path: Path) -> None:
    model = build(dataclasses.replace(CONFIG, positions=0))
    _, states = model(tokens())
    assert states is not None
    save_states(states, tmp_path / "state.safetensors")
    loaded = load_states(tmp_path / "state.safetensors", model.mixers)
    again, _ = model(tokens()[[1]], [select_rows(state, [1]) for state in loaded])
    torch.testing.assert_close(again, model(tokens(), states)[0][[1]], rtol=0, atol=1e-12)


@torch.no_grad()
def test_all_states_are_saved_and_loaded_learned_positions_too(tmp_path: Path) -> None:
    model, file = build(), tmp_path / "state.safetensors"
    _, states = model(tokens())
    save_states(states, file)
    loaded = load_states(file, model.mixers)
    assert [type(state) for state in loaded] == [type(state) for state in states]
    assert torch.equal(model(tokens(), loaded)[0], model(tokens(), states)[0])
    bare = build(dataclasses.replace(CONFIG, positions=0))
    with pytest.raises(ValueError, match=r"a model of 3 layers needs 3 states, not 4"):
        bare(tokens(), loaded)
    joined = [join_rows(pair) for pair in zip(states, model(tokens(length=9))[1], strict=True)]
    assert joined[-1].seen_B.tolist() == [30, 30, 9, 9]
    assert bytes_per_row(joined[-1]) == 8


@torch.no_grad()
def test_states_that_are_not_the_model_s_are_refused_by_layer() -> None:
    model = build()
    _, states = model(tokens())
    for wrong, why in (
        (states[:-1], "a model of 3 layers and learned positions needs 4 states, not 3"),
        ([*states, states[-1]], "needs 4 states, not 5"),
        ([*states[:-1], states[0]], "the state is a ConvState, where a model .* needs a Position"),
        ([states[1], states[0], *states[2:]], "layer 0: the state is a .*, where base-conv of width 16"),
        (
            [*states[:2], select_rows(states[2], [0]), states[3]],
            "layer 2: .* where sliding-window of width 16",
        ),
        ([*states[:3], select_rows(states[3], [0])], "seen_B has shape .* needs 2 rows"),
    ):
        with pytest.raises(ValueError, match=why):
            model(tokens(), wrong)
    for shape in ((2, 0), (5,), (1, 2, 3)):
        with pytest.raises(ValueError, match="tokens"):
            model(torch.zeros(shape, dtype=torch.long))
    logits, after = model(tokens()[:0])
    assert logits.shape == (0, 30, 40)
    assert model(tokens()[:0], after)[0].shape == (0, 30, 40)


@torch.no_grad()
def test_positions_run_out_while_decoding_only_for_rows_that_have_read_so_many() -> None:
    model = build()
    _, long = model(tokens(1, 60))
    _, short = model(tokens(1, 10))
    joined = [join_rows(pair) for pair in zip(long, short, strict=True)]
    _, joined = model(tokens(2, 4), joined)
    with pytest.raises(
        ValueError, match="65 tokens, 64 of them read before, but the model has 64 learned positions"
    ):
        model(tokens(2, 1), joined)
    rest = [select_rows(state, [1]) for state in joined]  # the long row is done
    logits, rest = model(tokens(1, 1), rest)
    alone = model(tokens(1, 1), model(tokens(2, 4)[1:], short)[1])[0]
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-12)
    assert rest[-1].read_BT0.shape == (1, 15, 0)


@torch.no_grad()
def test_a_linformer_s_positions_run_out_likewise() -> None:
    mixer = LinformerConfig(width=8, max_length=8, rank=2).build()
    x_BTD = torch.ones(2, 9, 8)
    _, state = mixer(x_BTD[:, :5])
    with pytest.raises(ValueError, match="9 tokens, 5 of them read before, but linformer has max_length 8"):
        mixer(x_BTD[:, 5:], state)
    assert mixer(x_BTD[:, 5:8], state)[1].seen_B.tolist() == [8, 8]


def test_a_model_runs_and_learns_under_autocast() -> None:
    torch.manual_seed(0)
    model = CONFIG.build()
    with torch.autocast("cpu", torch.bfloat16):
        logits, states = model(tokens())
        more, _ = model(tokens(length=3), states)
    (logits.float().square().mean() + more.float().square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_a_state_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    save_states(build(dataclasses.replace(CONFIG, positions=0))(tokens())[1], tmp_path / "state.safetensors")
    wider = ModelConfig(vocab=40, width=32, layers=based(32, feature_dim=4, window=5)).build()
    with pytest.raises(ValueError, match=r"past_BPD of layer 0 has shape \(2, 2, 16\), where base-conv"):
        load_states(tmp_path / "state.safetensors", wider.mixers)
    fewer = ModelConfig(vocab=40, width=16, layers=based(16, feature_dim=4, window=5)[:2]).build()
    with pytest.raises(ValueError, match="states of more than 2 layers"):
        load_states(tmp_path / "state.safetensors", fewer.mixers)


def test_the_state_is_counted_over_all_layers() -> None:
    model = ModelConfig(vocab=40, width=16, layers=based(16, feature_dim=4, window=5)).build()
    conv, taylor, window = 2 * 16, 15 * (16 + 1), 2 * 4 * 16
    assert model.state_bytes(30) == 4 * (conv + taylor + window) + 8  # and one count of tokens, int64
    assert model.state_bytes(30) == model.state_bytes(300)
    growing = ModelConfig(vocab=40, width=16, layers=(AttentionConfig(width=16),)).build()
    assert growing.state_bytes(30) == 4 * 2 * 30 * 16 + 8
    assert model.config.state_elements(30) == conv + taylor + window + 1
    positions = dataclasses.replace(growing.config, positions=64)
    assert positions.state_elements(30) == 2 * 30 * 16 + 1 + 1
    _, states = positions.build()(tokens(1, 30))
    assert positions.state_elements(30) == sum(map(elements_per_row, states))


@torch.no_grad()
def test_a_mixer_that_reads_tokens_is_given_those_of_each_call() -> None:
    layers = (RepeatAttentionConfig(width=16), BaseConvConfig(width=16), RepeatAttentionConfig(width=16))
    model = build(dataclasses.replace(CONFIG, layers=layers))
    whole, _ = model(tokens())
    states, parts = None, []
    for piece in tokens().split([1, 7, 21, 1], dim=1):
        logits, states = model(piece, states)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    at = torch.tensor([[0, 3, 29], [5, 5, 6]])
    asked, _ = model(tokens(), at_BQ=at, want_states=False)
    torch.testing.assert_close(asked, whole.take_along_dim(at[..., None], dim=1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="repeat-attention needs the tokens' ids: pass tokens_BT"):
        model.mixers[0](torch.zeros(2, 3, 16).double())


def test_parameters_count_the_tied_embedding_once() -> None:
    model = ModelConfig(vocab=40, width=16, layers=(BaseConvConfig(width=16),)).build()
    conv = 16 * 3 + 16 + 16 * 16 + 16
    assert model.parameter_count() == 40 * 16 + conv + 2 * 2 * 16


@torch.no_grad()
def test_a_head_of_its_own_gives_the_logits_and_a_tied_one_is_the_embedding() -> None:
    for config, owner in ((CONFIG, "embed.weight"), (UNTIED, "head.weight")):
        model = build(config)
        before, _ = model(tokens())
        assert model.head_weight is dict(model.named_parameters())[owner]
        torch.testing.assert_close(before, model.hidden(tokens())[0] @ model.head_weight.T)
        assert model.logits(model.hidden(tokens())[0].float()).dtype == torch.float64  # that of the head
        model.head_weight[7] += 1
        after, _ = model(tokens() % 7)  # which never looks up token 7
        changed_V = (after != build(config)(tokens() % 7)[0]).any(0).any(0)
        assert changed_V.nonzero().flatten().tolist() == [7]


def test_a_head_of_its_own_is_counted_and_initialised() -> None:
    assert build(UNTIED).parameter_count() == build().parameter_count() + 40 * 16
    model = dataclasses.replace(UNTIED, vocab=5000).build()
    assert model.head is not None
    assert model.head.weight.detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(model.head.weight, model.embed.weight)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


@pytest.mark.parametrize("bias", [None, False, True])
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu", "geglu"])
@torch.no_grad()
def test_kinds_of_mlp_are_their_equations(kind: str, bias: bool | None) -> None:
    torch.manual_seed(0)
    mlp = MLP(6, 5, kind, bias).double()
    for parameter in mlp.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    there = {name for name, _ in mlp.named_parameters() if name.endswith("bias")}
    has_bias = kind.startswith("gelu") if bias is None else bias
    assert there == ({"fc1.bias", "fc2.bias"} if has_bias else set())
    x = torch.randn(3, 6, dtype=torch.float64)
    h = x @ mlp.fc1.weight.T + (mlp.fc1.bias if has_bias else 0)
    if kind == "swiglu":
        h = h[:, :5] * h[:, 5:] * torch.sigmoid(h[:, 5:])
    elif kind == "geglu":
        h = h[:, :5] * gelu_tanh(h[:, 5:])
    else:
        h = gelu_tanh(h) if kind == "gelu_tanh" else h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    want = h @ mlp.fc2.weight.T + (mlp.fc2.bias if has_bias else 0)
    torch.testing.assert_close(mlp(x), want, rtol=0, atol=1e-13)


@torch.no_grad()
def test_embeddings_are_scaled_and_the_head_is_not() -> None:
    plain, scaled = build(UNTIED), build(dataclasses.replace(UNTIED, embed_scale=3.0))
    plain.embed.weight.mul_(3)
    torch.testing.assert_close(scaled(tokens())[0], plain(tokens())[0], rtol=0, atol=1e-12)
    tied = build(dataclasses.replace(CONFIG, embed_scale=3.0))
    h_BTD, _ = tied.hidden(tokens())
    torch.testing.assert_close(tied.logits(h_BTD), h_BTD @ tied.embed.weight.T)


def test_logits_are_capped_in_generation_and_in_the_loss() -> None:
    config = dataclasses.replace(CONFIG, soft_cap=0.1)
    plain, model = build(), build(config)
    logits, _ = plain(tokens())
    capped, _ = model(tokens())
    torch.testing.assert_close(capped, 0.1 * (logits / 0.1).tanh())
    assert capped.abs().max() < 0.1 < logits.abs().max()
    h_ND, target_N = model.hidden(tokens())[0].flatten(0, 1), tokens().flatten()
    loss, right_N = head_loss(h_ND, model.head_weight, target_N, 0.1)
    torch.testing.assert_close(loss, F.cross_entropy(capped.flatten(0, 1), target_N))
    assert torch.equal(right_N, capped.flatten(0, 1).argmax(-1) == target_N)
    (grad,) = torch.autograd.grad(loss, [model.embed.weight])
    assert grad.any()


def test_losses_and_measures_are_of_capped_logits() -> None:
    model, tokens_BT = build(dataclasses.replace(CONFIG, soft_cap=0.1)), tokens()
    next_BT, logits_BTV = tokens_BT[:, 1:], model(tokens_BT[:, :-1])[0]
    log_prob_BTV = logits_BTV.log_softmax(-1)
    want = F.nll_loss(log_prob_BTV.flatten(0, 1), next_BT.flatten())
    torch.testing.assert_close(LanguageModelLoss(model, None, False)(tokens_BT), want)
    at_BQ = torch.arange(29).expand(2, -1)
    questions = Questions(tokens_BT[:, :-1], at_BQ, next_BT)
    weights = dict(model.named_parameters())
    torch.testing.assert_close(stacked.loss(model, weights, questions, "fp32"), want)
    said = predict(model.float(), tokens_BT.numpy())
    true_BT = log_prob_BTV.gather(-1, next_BT[..., None])[..., 0]
    torch.testing.assert_close(torch.from_numpy(said.log_prob), true_BT.float(), rtol=0, atol=1e-5)


def test_a_config_from_before_heads_could_be_untied_is_of_a_tied_one() -> None:
    before = CONFIG.to_dict()
    del before["tied"]
    assert ModelConfig.from_dict(before) == CONFIG
    assert ModelConfig.from_dict(UNTIED.to_dict()) == UNTIED


def test_initialisation_is_the_model_s_except_where_a_mixer_has_its_own() -> None:
    torch.manual_seed(0)
    layers = (TaylorConfig(width=64), MambaConfig(width=64))
    model = ModelConfig(vocab=500, width=64, layers=layers).build()
    taylor, mamba = model.mixers
    assert model.embed.weight.detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert taylor.qkv.weight.detach().std().item() == pytest.approx(0.02, rel=0.05)
    assert taylor.out_proj.weight.detach().std().item() == pytest.approx(
        0.02 / 2, rel=0.05
    )  # 1 / sqrt(2 layers)
    assert mamba.in_proj.weight.detach().std().item() == pytest.approx(64**-0.5 / 3**0.5, rel=0.05)
    steps = torch.nn.functional.softplus(mamba.dt_proj.bias)
    assert 0.001 <= steps.detach().min().item() < steps.detach().max().item() <= 0.1001


def test_bad_settings_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"layer 0 \(base-conv\) has width 8, the model 16"):
        ModelConfig(vocab=40, width=16, layers=(BaseConvConfig(width=8),))
    with pytest.raises(ValueError, match=r"norms_after \(1,\) names more than the 1 layers"):
        ModelConfig(vocab=40, width=16, layers=(BaseConvConfig(width=16),), norms_after=(1,))
    with pytest.raises(ValueError, match="at least one layer"):
        ModelConfig(vocab=40, width=16, layers=())
    with pytest.raises(TypeError, match="layers"):
        ModelConfig(vocab=40, width=16, layers=[BaseConvConfig(width=16)])


def test_a_context_beyond_the_learned_positions_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"70 tokens.*64 learned positions"):
        build()(tokens(length=70))


ABLE = {
    "based": (
        BaseConvConfig(width=16, expand=2, replay=5),
        TaylorConfig(width=16, feature_dim=4, replay=6),
        SlidingWindowConfig(width=16, window=5, heads=2, rotary=1.0, replay=7),
    ),
    "growing": (AttentionConfig(width=16, heads=2), BaseConvConfig(width=16, filter="long")),
}


@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("kind", ABLE)
def test_tokens_taken_back_are_as_good_as_never_read(kind: str, capacity: int | None) -> None:
    """By all layers and learned positions, of each row by its own number, with room and without."""
    model = build(dataclasses.replace(CONFIG, layers=ABLE[kind]))
    assert model.rollback_limit == (5 if kind == "based" else LISTED)
    given, more = tokens(2, 30).split([22, 8], dim=1)
    for inplace in (False, True):
        _, states = model(given, model.init_states(2, capacity=capacity))
        _, ahead = model(tokens(2, 5) % 7, states)
        before = [t.data_ptr() for state in ahead for t in state]
        kept = [[t.clone() for t in state] for state in ahead]
        back = model.rollback(ahead, torch.tensor([5, 2]), inplace=inplace)
        if not inplace:
            assert all(
                torch.equal(a, b) for x, y in zip(ahead, kept, strict=True) for a, b in zip(x, y, strict=True)
            )
        elif capacity:
            assert [t.data_ptr() for state in back for t in state] == before
        got, _ = model(more, back)
        read = [given[0], torch.cat((given[1], tokens(2, 5)[1, :3] % 7))]
        for row, own in enumerate(read):
            _, alone = model(own[None])
            want, _ = model(more[row : row + 1], alone)
            torch.testing.assert_close(got[row : row + 1], want, rtol=0, atol=1e-12)


def test_what_cannot_be_taken_back_is_refused_by_its_layer() -> None:
    model = build(dataclasses.replace(CONFIG, layers=(ABLE["based"][0], MambaConfig(width=16))))
    assert model.rollback_limit == 0
    _, states = model(tokens())
    with pytest.raises(StateError, match="layer 1: mamba of width 16 cannot take back 1 tokens"):
        model.rollback(states, 1)
    able = build(dataclasses.replace(CONFIG, layers=ABLE["growing"][:1]))
    with pytest.raises(StateError, match="layer 0: attention of width 16 cannot take back 4 tokens of row 0"):
        able.rollback(able(tokens(2, 3))[1], 4)
