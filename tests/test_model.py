"""The backbone: logits where they are asked for, states that continue, what is counted."""

import dataclasses
from pathlib import Path

import pytest
import torch

from holdall.contract import load_states, save_states, select_rows
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.repeat_attention import RepeatAttentionConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig
from holdall.recipes.patterns import based

CONFIG = ModelConfig(vocab=40, width=16, layers=based(16, feature_dim=4, window=5), mlp=24, positions=64)


def build(config: ModelConfig = CONFIG) -> Model:
    torch.manual_seed(0)
    return config.build().double()


def tokens(rows: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("positions", [0, 64])
def test_any_split_gives_the_whole(kind: str, norm: str, positions: int) -> None:
    model = build(dataclasses.replace(CONFIG, mlp_kind=kind, norm=norm, positions=positions))
    whole, _ = model(tokens())
    states, parts = None, []
    for piece in tokens().split([1, 7, 21, 1], dim=1):
        logits, states = model(piece, states)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)


def test_logits_asked_for_are_those_of_all_positions() -> None:
    at = torch.tensor([[0, 3, 29], [5, 5, 6]])
    every, _ = build()(tokens())
    asked, states = build()(tokens(), at_BQ=at, want_states=False)
    assert states is None
    torch.testing.assert_close(asked, every.take_along_dim(at[..., None], dim=1), rtol=0, atol=1e-12)


def test_logits_asked_for_carry_the_same_gradients() -> None:
    at = torch.tensor([[0, 3, 29], [5, 5, 6]])
    some, every = build(), build()
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
    with pytest.raises(ValueError, match="at least one layer"):
        ModelConfig(vocab=40, width=16, layers=())
    with pytest.raises(TypeError, match="layers"):
        ModelConfig(vocab=40, width=16, layers=[BaseConvConfig(width=16)])


def test_a_context_beyond_the_learned_positions_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"70 tokens.*64 learned positions"):
        build()(tokens(length=70))
