"""Taking tokens back: what the laws do not say, of rows that are to give back more than they can."""

import pytest
import torch
from torch import Tensor

from holdall.contract import Mixer, MixerConfig, StateError, rollback, room
from holdall.contract.rollback import LISTED
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import ModelConfig
from holdall.testing import laws

RINGS = (
    SlidingWindowConfig(width=16, window=4, replay=3),
    BaseConvConfig(width=16, replay=3),
    BaseConvConfig(width=16, expand=2, kernel=4, replay=3),
)
LISTS = (AttentionConfig(width=16), BaseConvConfig(width=16, filter="long"))


def build(config: MixerConfig) -> Mixer:
    return laws.build(config).double()


def tokens(length: int, seed: int = 0) -> Tensor:
    return laws.draw(2, length, 16, dtype=torch.float64, seed=seed)


def as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host does not ask for counts."""
    for module in (room, rollback):
        monkeypatch.setattr(module, "known_to_the_host", lambda count_B: False)


@torch.no_grad()
@pytest.mark.parametrize("config", RINGS, ids=str)
def test_a_second_rollback_takes_only_what_the_first_one_left(config: MixerConfig) -> None:
    mixer, x_BTD = build(config), tokens(20)
    _, state = mixer(x_BTD[:, :12])
    back = mixer.rollback(state, torch.tensor([2, 1]))
    with pytest.raises(StateError, match="cannot take back 2 tokens of row 0: it can give back its last 1"):
        mixer.rollback(back, 2)
    once = mixer.rollback(back, torch.tensor([1, 2]))
    for row in range(2):
        got, _ = mixer(x_BTD[:, 12:], once)
        want, _ = mixer(x_BTD[:, 12:], mixer(x_BTD[:, :9])[1])
        laws.assert_close(f"row {row}", got[row], want[row])
    _, further = mixer(x_BTD[:, 12:14], back)
    assert mixer.rollback(further, 3)[-1].tolist() == [0, 0]


@torch.no_grad()
@pytest.mark.parametrize("config", [*RINGS, *LISTS], ids=str)
def test_a_row_that_has_read_less_is_refused(config: MixerConfig) -> None:
    mixer = build(config)
    _, state = mixer(tokens(2))
    with pytest.raises(StateError, match=f"{config.name} .*cannot take back 3 tokens of row 1: .* last 2,"):
        mixer.rollback(state, torch.tensor([2, 3]))
    roomy = mixer.with_room(state, 9)
    with pytest.raises(StateError, match="cannot take back 3 tokens of row 1"):
        mixer.rollback(roomy, torch.tensor([2, 3]))
    empty = mixer.rollback(roomy, 2, inplace=True)
    laws.assert_close("from the beginning", mixer(tokens(7, 1), empty)[0], mixer(tokens(7, 1))[0])


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("config", [*RINGS, *LISTS], ids=str)
def test_what_only_a_gpu_knows_makes_a_row_nan_and_no_other(
    config: MixerConfig, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, x_BTD = build(config), tokens(30)
    start = mixer.init_state(2, dtype=torch.float64, capacity=capacity)
    _, state = mixer(x_BTD[:, :2], start)
    want, _ = mixer(x_BTD[:, 1:], mixer(x_BTD[:, :1])[1])
    as_unknown(monkeypatch)
    back = mixer.rollback(state, torch.tensor([1, 3]), inplace=capacity is not None)
    laws.assert_close("good row", mixer(x_BTD[:, 1:], back)[0][0], want[0])
    for at in range(2, 20):
        y_BTD, back = mixer(x_BTD[:, at : at + 1], back, inplace=True)
        assert y_BTD[0].isfinite().all()
        assert y_BTD[1].isnan().all(), f"{at - 2} tokens later"


@torch.no_grad()
def test_a_cache_on_a_gpu_keeps_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot know that no row needs them any longer; what it gives is the same."""
    mixer, x_BTD = build(LISTS[0]), tokens(12)
    _, state = mixer(x_BTD[:, :9])
    want = mixer.rollback(state, 4)
    as_unknown(monkeypatch)
    got = mixer.rollback(state, 4)
    assert (got.k_BSHK.shape[1], want.k_BSHK.shape[1]) == (9, 5)  # type: ignore[attr-defined]
    laws.assert_close("output", mixer(x_BTD[:, 9:], got)[0], mixer(x_BTD[:, 9:], want)[0])


def test_limits() -> None:
    limits = [build(config).rollback_limit for config in (*RINGS, *LISTS)]
    assert limits == [3, 3, 3, LISTED, LISTED]
    config = ModelConfig(vocab=9, width=16, layers=(*RINGS[:1], *LISTS[:1]))
    assert config.build().rollback_limit == 3
