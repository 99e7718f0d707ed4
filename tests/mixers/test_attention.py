"""Softmax attention, full and in a window: heads that share keys and values; and where biases are."""

import pytest

from holdall.mixers.attention import AttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.testing import laws


@pytest.mark.parametrize("config", [AttentionConfig, SlidingWindowConfig])
def test_fewer_heads_of_keys_need_fewer_weights_and_a_smaller_state(config) -> None:
    many, few = (config(width=16, heads=4, kv_heads=kv_heads).build() for kv_heads in (0, 1))
    assert many.project.qkv.out_features == 3 * 16
    assert few.project.qkv.out_features == 16 + 2 * 4
    assert (many.state_elements(30) - 1) == 4 * (few.state_elements(30) - 1)


@pytest.mark.parametrize("config", [AttentionConfig, SlidingWindowConfig])
@pytest.mark.parametrize("kv_heads", [3, 8, -1])
def test_heads_of_keys_divide_those_of_queries(config, kv_heads: int) -> None:
    says = f"heads 4 is not a multiple of kv_heads {kv_heads}|kv_heads = -1 must be at least 0"
    with pytest.raises(ValueError, match=says):
        config(width=16, heads=4, kv_heads=kv_heads)


@pytest.mark.parametrize(
    ("bias", "found"),
    [
        (True, ["project.qkv.bias", "out_proj.bias"]),
        (False, []),
        ("out", ["out_proj.bias"]),
    ],
)
def test_biases_everywhere_nowhere_or_last(bias: bool | str, found: list[str]) -> None:
    mixer = laws.build(SlidingWindowConfig(width=16, bias=bias))
    assert [name for name, _ in mixer.named_parameters() if "bias" in name] == found
