"""Where a token repeats, and what is written there."""

import pytest
import torch

from holdall.mixers.attention import AttentionConfig
from holdall.mixers.repeat_attention import RepeatAttentionConfig, repeats, repeats_loop
from holdall.model import ModelConfig
from holdall.testing import laws

DOUBLE = torch.float64
IDS = torch.tensor([[3, 0, 3, 5, 0, 0, 7, 5], [1, 1, 2, 3, 4, 5, 6, 1]])
AGAIN = [[0, 0, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("find", [repeats_loop, repeats])
@pytest.mark.parametrize("past", [0, 1, 4, 7])
def test_a_token_repeats_if_it_occurred_before(find, past: int) -> None:
    again_BT = find(IDS[:, past:], IDS[:, :past] + 1)
    assert again_BT.int().tolist() == [row[past:] for row in AGAIN]


@pytest.mark.parametrize("find", [repeats_loop, repeats])
def test_an_empty_slot_is_no_token_0(find) -> None:
    assert find(torch.tensor([[0, 0]]), torch.zeros(1, 3, dtype=torch.long)).tolist() == [[False, True]]


@pytest.mark.claim("mixers/repeat_attention.py", "Weights", "Deviations: none")
@torch.no_grad()
def test_it_is_attention_where_a_token_repeats_and_zero_elsewhere() -> None:
    mixer = RepeatAttentionConfig(width=8, heads=2).build().double()
    plain = AttentionConfig(width=8, heads=2).build().double()
    plain.load_state_dict(mixer.state_dict())
    x_BTD = laws.draw(2, 8, 8, dtype=DOUBLE)
    y_BTD, state = mixer(x_BTD, tokens_BT=IDS)
    laws.assert_close("y", y_BTD, plain(x_BTD)[0] * torch.tensor(AGAIN)[..., None])
    assert state.id_BS.equal(IDS + 1)


def test_models_with_it_train_side_by_side() -> None:
    """Under vmap each member has its own weights and its own tokens."""
    config = ModelConfig(vocab=9, width=8, layers=(RepeatAttentionConfig(width=8),))
    models = [config.build().double() for _ in range(2)]
    weights, buffers = torch.func.stack_module_state(models)
    ids = torch.stack((IDS, IDS.flip(1)))

    def logits(own: dict, held: dict, tokens_BT: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(models[0], (own, held), (tokens_BT,), {"want_states": False})[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        together = torch.func.vmap(logits)(weights, buffers, ids)
    for model, own, got in zip(models, ids, together, strict=True):
        laws.assert_close("logits", got, model(own)[0])
