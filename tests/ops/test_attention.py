"""Softmax attention, full and in a window, against a textbook's mask over the whole sequence.

Letters: B row, T tokens, H heads, K key dim, V value dim.
"""

import functools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from holdall.contract import join_rows, select_rows
from holdall.ops.attention import (
    KeyValueCache,
    blockwise_attention,
    empty_cache,
    full_attention,
    full_attention_loop,
)
from holdall.ops.window_attention import window_attention, window_attention_loop
from holdall.testing import laws

B, H, K, V, SCALE = 2, 2, 4, 3, 0.5
DOUBLE = torch.float64
in_blocks = functools.partial(blockwise_attention, block=4)


def tokens(length: int, *, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (laws.draw(batch, length, H, d, dtype=DOUBLE, seed=i) for i, d in enumerate((K, K, V)))
    return q, k, v


def textbook(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Scores of all pairs, softmax over those that each token may see."""
    score = SCALE * torch.einsum("bthk,bshk->bhts", q, k)
    t = torch.arange(q.shape[1])
    lag = t[:, None] - t
    visible = (lag >= 0) & (lag < (window or q.shape[1]))
    return torch.einsum("bhts,bshv->bthv", score.masked_fill(~visible, -torch.inf).softmax(-1), v)


def empty(slots: int, batch: int = B) -> KeyValueCache:
    return empty_cache(batch, slots, H, K, V, dtype=DOUBLE)


def in_pieces(attend, cache: KeyValueCache, tensors: tuple[Tensor, ...], sizes: list[int], **how) -> tuple:
    ys = []
    for q, k, v in zip(*(t.split(sizes, dim=1) for t in tensors), strict=True):
        y, cache = attend(q, k, v, cache, scale=SCALE, **how)
        ys.append(y)
    return torch.cat(ys, dim=1), cache


@pytest.mark.parametrize("attend", [full_attention_loop, full_attention, in_blocks])
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 1, 4], [8, 1]], ids=str)
def test_full_attention_is_the_textbooks(attend, sizes: list[int]) -> None:
    tensors = tokens(9)
    y, cache = in_pieces(attend, empty(0), tensors, sizes)
    laws.assert_close("y", y, textbook(*tensors))
    laws.assert_close("keys", cache.k_BSHK, tensors[1])
    laws.assert_close("values", cache.v_BSHV, tensors[2])
    assert cache.seen_B.tolist() == [9] * B


@pytest.mark.parametrize("attend", [full_attention_loop, full_attention, in_blocks])
@pytest.mark.parametrize("more", [1, 3, 9])
def test_rows_that_have_read_unequally_attend_as_if_alone(attend, more: int) -> None:
    read = (2, 7, 1)
    q, k, v = tokens(max(read) + more, batch=len(read))
    caches = [
        full_attention_loop(q[i : i + 1, :n], k[i : i + 1, :n], v[i : i + 1, :n], empty(0, 1), scale=SCALE)[1]
        for i, n in enumerate(read)
    ]
    rest = [torch.stack([t[i, n : n + more] for i, n in enumerate(read)]) for t in (q, k, v)]
    y, cache = attend(*rest, join_rows(caches), scale=SCALE)
    for i, n in enumerate(read):
        whole = textbook(*(t[i : i + 1, : n + more] for t in (q, k, v)))
        laws.assert_close(f"row {i}", y[i], whole[0, n:])
    assert cache.seen_B.tolist() == [n + more for n in read]


@pytest.mark.parametrize("block", [1, 7, 40, 64])
@pytest.mark.parametrize("past", [0, 1, 6, 7, 23])
def test_attention_in_blocks_has_the_loops_gradients(block: int, past: int) -> None:
    """Also those through the log of the softmax's sum, and where rows have read unequally."""
    _, cache = full_attention_loop(*tokens(past), empty(0), scale=SCALE) if past else (None, empty(0))
    cache = cache._replace(seen_B=torch.tensor([past, past // 2]))
    grads = []
    for attend in (functools.partial(blockwise_attention, block=block), full_attention_loop):
        leaves = [t.clone().requires_grad_() for t in (*tokens(40), *cache[:2])]
        y, after = attend(*leaves[:3], KeyValueCache(*leaves[3:], cache.seen_B), scale=SCALE)
        ends = [y, *after[:2]]
        ups = [laws.draw(*end.shape, dtype=DOUBLE, seed=7 + i) for i, end in enumerate(ends)]
        grads.append((y, *torch.autograd.grad(ends, leaves, ups)))
    names = ("output", *(f"gradient of {name}" for name in ("q", "k", "v", "cached keys", "cached values")))
    for name, got, want in zip(names, *grads, strict=True):
        laws.assert_close(name, got, want)


def test_attention_in_blocks_survives_scores_that_would_overflow() -> None:
    q, k, v = (300 * t.float() for t in tokens(40))
    y, _ = in_blocks(q, k, v, empty_cache(B, 0, H, K, V, dtype=torch.float32), scale=SCALE)
    truth = textbook(q.double(), k.double(), v.double())
    assert laws.distance(y, truth) < 1e-3 * laws.size(truth)


PEAK = """
import resource, torch
from holdall.ops.attention import blockwise_attention, empty_cache
torch.set_num_threads(1)
def run(n):
    q, k, v = (torch.randn(1, n, 1, 16, requires_grad=True) for _ in range(3))
    y, _ = blockwise_attention(q, k, v, empty_cache(1, 0, 1, 16, 16, dtype=q.dtype), scale=0.25, block=512)
    y.sum().backward()
run(600)
for n in (4096, 16384):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(n)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.full
def test_memory_of_attention_in_blocks_is_linear() -> None:
    """The pairs of 16,384 tokens are 1 GiB in fp32; keys, values, outputs and gradients a MiB each."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    few, many = (int(line) * 1024 for line in done.stdout.split())
    assert few < 64 * 2**20
    assert many < 128 * 2**20


@pytest.mark.parametrize("attend", [window_attention_loop, window_attention])
@pytest.mark.parametrize("window", [2, 5, 33, 40])
@pytest.mark.parametrize("past", [-1, 0, 1, 2, 70, 300], ids="window{:+d}".format)
def test_a_window_is_the_textbooks_on_either_side_of_its_width(attend, window: int, past: int) -> None:
    tensors = tokens(window + past)
    y, cache = attend(*tensors, empty(window - 1), window=window, scale=SCALE)
    laws.assert_close("y", y, textbook(*tensors, window))
    # position p lies in slot p mod (w - 1)
    for p in range(max(0, window + past - (window - 1)), window + past):
        laws.assert_close(f"key {p}", cache.k_BSHK[:, p % (window - 1)], tensors[1][:, p])


@pytest.mark.parametrize("attend", [window_attention_loop, window_attention])
@pytest.mark.parametrize("window", [2, 5, 33])
@pytest.mark.parametrize("sizes", [[1] * 70, [3, 1, 40, 26], [32, 33, 5], [69, 1]], ids=lambda s: str(s[:4]))
def test_several_tokens_at_once_and_one_by_one_fill_the_ring_alike(
    attend, window: int, sizes: list[int]
) -> None:
    tensors = tokens(70)
    y, cache = in_pieces(attend, empty(window - 1), tensors, sizes, window=window)
    laws.assert_close("y", y, textbook(*tensors, window))
    _, whole = window_attention_loop(*tensors, empty(window - 1), window=window, scale=SCALE)
    for got, want in zip(cache, whole, strict=True):
        laws.assert_close("ring", got, want)


def test_rows_at_unequal_places_of_their_rings() -> None:
    window, read, more = 5, (1, 3, 11), 7
    q, k, v = tokens(max(read) + more, batch=len(read))
    rings = [
        window_attention(
            *(t[i : i + 1, :n] for t in (q, k, v)), empty(window - 1, 1), window=window, scale=SCALE
        )[1]
        for i, n in enumerate(read)
    ]
    rest = [torch.stack([t[i, n : n + more] for i, n in enumerate(read)]) for t in (q, k, v)]
    for attend in (window_attention, window_attention_loop):
        y, _ = attend(*rest, join_rows(rings), window=window, scale=SCALE)
        for i, n in enumerate(read):
            whole = textbook(*(t[i : i + 1, : n + more] for t in (q, k, v)), window)
            laws.assert_close(f"row {i}", y[i], whole[0, n:])


def test_the_ring_is_overwritten_only_if_it_was_given_away() -> None:
    tensors = tokens(9)
    _, ring = window_attention(*tensors, empty(4), window=5, scale=SCALE)
    kept = select_rows(ring, range(B))
    y, after = window_attention(*tensors, ring, window=5, scale=SCALE)
    for got, want in zip(ring, kept, strict=True):
        laws.assert_bitwise("ring", got, want)
    z, given = window_attention(*tensors, ring, window=5, scale=SCALE, inplace=True)
    laws.assert_close("y", z, y)
    assert given.k_BSHK is ring.k_BSHK
    for got, want in zip(given, after, strict=True):
        laws.assert_close("ring inplace", got, want)


@pytest.mark.parametrize("new", [1, 40, 127, 128, 129, 300])
def test_a_window_over_nothing_is_a_window_over_an_empty_ring(new: int) -> None:
    want = window_attention(*tokens(new), empty(4), window=5, scale=SCALE)
    for got, tensor in zip(window_attention(*tokens(new), None, window=5, scale=SCALE), want, strict=True):
        if isinstance(got, Tensor):
            laws.assert_close("y", got, tensor)
        else:
            for a, b in zip(got, tensor, strict=True):
                laws.assert_close("ring", a, b)


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_equal_the_loops(window: int | None) -> None:
    how = {"scale": SCALE} if window is None else {"scale": SCALE, "window": window}
    pair = (
        (full_attention, full_attention_loop) if window is None else (window_attention, window_attention_loop)
    )
    _, cache = pair[1](*tokens(6), empty(0 if window is None else window - 1), **how)
    grads = []
    for attend in pair:
        leaves = [t.clone().requires_grad_() for t in (*tokens(40 if window is None else 150), *cache[:2])]
        y, after = attend(*leaves[:3], KeyValueCache(*leaves[3:], cache.seen_B), **how)
        ends = [y, *after[:2]]
        ups = [laws.draw(*end.shape, dtype=DOUBLE, seed=7 + i) for i, end in enumerate(ends)]
        grads.append(torch.autograd.grad(ends, leaves, ups))
    for name, got, want in zip(("q", "k", "v", "cached keys", "cached values"), *grads, strict=True):
        laws.assert_close(f"gradient of {name}", got, want)


@pytest.mark.parametrize("groups", [1, 2, 4], ids="{} heads of keys".format)
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 1, 4]], ids=str)
@pytest.mark.parametrize("attend", [full_attention_loop, full_attention, in_blocks, "loop", "ring"])
def test_a_head_of_keys_serves_neighbouring_heads_of_queries(attend, sizes: list[int], groups: int) -> None:
    """4 / groups queries each: as if all of them had that key and value, which are kept but once."""
    window = None
    if isinstance(attend, str):
        attend, window = {"loop": window_attention_loop, "ring": window_attention}[attend], 4
    q = laws.draw(B, 9, 4, K, dtype=DOUBLE)
    k, v = (laws.draw(B, 9, groups, d, dtype=DOUBLE, seed=i) for i, d in enumerate((K, V), 1))
    cache = empty_cache(B, 0 if window is None else window - 1, groups, K, V, dtype=DOUBLE)
    y, after = in_pieces(attend, cache, (q, k, v), sizes, **({} if window is None else {"window": window}))
    served = [group for group in range(groups) for _ in range(4 // groups)]
    laws.assert_close("y", y, textbook(q, k[:, :, served], v[:, :, served], window))
    assert after.k_BSHK.shape[2] == after.v_BSHV.shape[2] == groups
