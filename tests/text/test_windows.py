"""The order of windows: each once in an epoch, a pure function of seed and step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdall.text.windows import Order


def rows(order: Order, first: int, count: int, batch: int) -> list[int]:
    return [int(start) for step in range(first, first + count) for start in order.rows(step, batch)]


@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 2**70), st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_shows_every_window_once(
    windows: int, context: int, seed: int, batch: int, spare: int
) -> None:
    order = Order(windows * context + 1 + min(spare, context - 1), context, seed)
    assert order.windows == windows
    seen = rows(order, 0, -(-2 * windows // batch), batch)
    every = [window * context for window in range(windows)]
    for epoch in range(2):
        assert sorted(seen[epoch * windows : (epoch + 1) * windows]) == every


def test_every_window_has_its_last_target_and_one_token_fewer_has_one_window_fewer() -> None:
    assert Order(3 * 8 + 1, 8, 0).windows == 3
    assert Order(3 * 8, 8, 0).windows == 2
    assert max(rows(Order(25, 8, 0), 0, 1, 3)) + 8 == 24


def test_the_order_is_the_same_from_any_step_and_for_any_batch() -> None:
    order = Order(10_000, 7, 3)
    whole = rows(order, 0, 60, 64)
    assert rows(order, 41, 19, 64) == whole[41 * 64 :]
    assert rows(order, 0, 240, 16) == whole


def test_seeds_and_epochs_give_other_orders() -> None:
    count = Order(1001, 1, 0).windows
    orders = [
        tuple(Order(1001, 1, seed).rows(epoch, count))
        for seed in (0, 1, 2**40, 2**64 - 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == len(orders)
    for order in orders:  # and none is at all sorted: the correlation of a shuffle is about 1/sqrt(1000)
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.12


def test_all_orders_of_few_windows_come_up_about_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        order = tuple(Order(4, 1, seed).rows(0, 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(850 < count < 1150 for count in counts.values())  # 1000, within 5 standard deviations


def test_the_order_never_changes() -> None:
    """A run that goes on under a later Holdall or NumPy must see the windows that it would have seen."""
    assert Order(101, 10, 0).rows(0, 10).tolist() == [60, 0, 50, 70, 40, 10, 80, 20, 30, 90]
    far = [401_092_872_192, 234_449_768_448, 335_215_013_888, 976_422_559_744]
    assert Order(10**12, 2048, 7).rows(123_456, 4).tolist() == far


def test_a_trillion_tokens_cost_no_more_than_a_thousand() -> None:
    starts = Order(10**12, 2048, 0).rows(10**6, 512)
    assert starts.dtype == np.int64
    assert starts.max() < 10**12
    assert starts.max() > 2**38
    assert len(set(starts.tolist())) == 512


def test_too_little_text_and_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"256 tokens do not fill one window of 256.*shorter context"):
        Order(256, 256, 0)
    with pytest.raises(ValueError, match="context_len 0"):
        Order(10, 0, 0)
    with pytest.raises(ValueError, match="step -1"):
        Order(10, 2, 0).rows(-1, 4)
