"""Sliding-window attention's kernels against the plain form in the same dtype, both against fp64.

Letters: B row, T tokens, S slots of the ring, H heads of queries, G of keys and values, K key dim, V value
dim.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from kernel_checks import assert_trains_under_vmap, poisoned, times_compiled, traced
from torch import Tensor

import holdall
from holdall.contract import forms
from holdall.contract.forms import KernelError
from holdall.contract.rollback import LOST
from holdall.kernels import window_attention as kernel
from holdall.ops.attention import KeyValueCache
from holdall.ops.window_attention import window_attention, window_attention_loop
from holdall.testing import laws

SINGLE, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64
attend = kernel.window_attention


def inputs(
    length: int, *, seen: tuple[int, ...] | None, window: int, heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (16, 16), batch: int = 2, spare: int = 0, dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[Tensor, ...], KeyValueCache | None]:  # fmt: skip
    """q, k, v as strided parts of one projection, and a ring of rows that have read `seen` tokens.

    spare: slots of the ring beside those of the window.
    """
    (many, few), (key_dim, value_dim) = heads, dims
    sizes = [many * key_dim, few * key_dim, few * value_dim]
    parts = laws.draw(batch, length, sum(sizes), dtype=dtype).to(device).split(sizes, dim=-1)
    q, k, v = (part.unflatten(-1, (n, -1)) for part, n in zip(parts, (many, few, few), strict=True))
    if seen is None:
        return (q, k, v), None
    ring_k, ring_v = (
        laws.draw(batch, window - 1 + spare, few, d, dtype=dtype, seed=1 + i).to(device)
        for i, d in enumerate(dims)
    )
    return (q, k, v), KeyValueCache(ring_k, ring_v, torch.tensor(seen, device=device))


def results(function: Any, tensors: tuple[Tensor, ...], cache: KeyValueCache | None, **how: Any) -> dict:
    """Outputs, the next ring, and gradients pulled back from all of them together."""
    leaves = [t.detach().requires_grad_() for t in (*tensors, *(cache[:2] if cache else ()))]
    given = KeyValueCache(*leaves[3:], cache.seen_B) if cache else None
    y, after = function(*leaves[:3], given, scale=leaves[0].shape[-1] ** -0.5, **how)
    ends = {"y": y, "ring of keys": after.k_BSHK, "ring of values": after.v_BSHV}
    ups = [laws.draw(*e.shape, dtype=e.dtype, seed=7 + i).to(e.device) for i, e in enumerate(ends.values())]
    grads = torch.autograd.grad(list(ends.values()), leaves, ups)
    names = ("q", "k", "v", "keys of the ring", "values of the ring")
    return {
        **ends,
        "seen": after.seen_B,
        **{f"gradient of {n}": g for n, g in zip(names, grads, strict=False)},
    }


def wide(tensors: tuple[Tensor, ...], cache: KeyValueCache | None) -> tuple[Any, Any]:
    return tuple(t.double() for t in tensors), cache and KeyValueCache(
        cache.k_BSHK.double(), cache.v_BSHV.double(), cache.seen_B
    )


def check(tensors: tuple[Tensor, ...], cache: KeyValueCache | None, window: int) -> None:
    with poisoned():
        got = results(attend, tensors, cache, window=window)
    plain = laws.plainly(results, window_attention, tensors, cache, window=window)
    truth = results(window_attention, *wide(tensors, cache), window=window)
    for name, result in plain.items():
        laws.assert_as_good_as_plain(name, got[name], result, truth[name])


@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize(("window", "seen"), [(9, None), (9, (3, 40)), (66, (0, 200))], ids=str)
def test_outputs_ring_and_gradients(
    length: int, window: int, seen: tuple[int, ...] | None, device: torch.device
) -> None:
    check(*inputs(length, seen=seen, window=window, dtype=SINGLE, device=device), window)


@pytest.mark.parametrize("spare", [1, 30])
@pytest.mark.parametrize("length", [1, 7, 65])
def test_a_ring_of_more_slots_than_the_window(length: int, spare: int, device: torch.device) -> None:
    """What is older than the window is not looked at, NaN or not, by steps, calls and gradients."""
    seen, how = (3, 200), {"spare": spare, "heads": (4, 2), "dtype": SINGLE, "device": device}
    tensors, cache = inputs(length, seen=seen, window=17, **how)
    assert cache is not None
    check(tensors, cache, 17)
    with torch.no_grad():
        for inplace in (False, True):
            given = KeyValueCache(*(x.clone() for x in cache))
            for row, count in enumerate(seen):
                slot_S = torch.arange(16 + spare, device=device)
                old_S = (count - 1 - slot_S) % (16 + spare) >= min(count, 16)
                given.k_BSHK[row, old_S] = given.v_BSHV[row, old_S] = torch.nan
            y, after = attend(*tensors, given, window=17, scale=0.25, inplace=inplace)
            plain, state = laws.plainly(window_attention, *tensors, cache, window=17, scale=0.25)
            truth, _ = window_attention(*wide(tensors, None)[0], wide((), cache)[1], window=17, scale=0.25)
            laws.assert_as_good_as_plain("y", y, plain, truth)
            assert after is not None
            for got, want, old in zip(after, state, given, strict=True):
                new = got == want  # all but what was spoilt above
                assert bool((new | got.isnan()).all())
                assert not inplace or got is after.seen_B or got.data_ptr() == old.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7])
def test_a_row_that_gave_back_too_much_is_nan_and_no_other(length: int, device: torch.device) -> None:
    tensors, cache = inputs(length, seen=(30, LOST), window=9, spare=4, dtype=SINGLE, device=device)
    assert cache is not None
    right, _ = attend(*tensors, cache._replace(seen_B=cache.seen_B.clamp(min=30)), window=9, scale=1.0)
    for inplace in (False, True):
        given = KeyValueCache(*(x.clone() for x in cache))
        y, after = attend(*tensors, given, window=9, scale=1.0, inplace=inplace)
        laws.assert_bitwise("the other row", y[0], right[0])
        assert y[1].isnan().all()
        assert after is not None
        assert after.seen_B.tolist() == [30 + length, LOST + length]


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
@pytest.mark.parametrize(("heads", "dims"), [((4, 2), (48, 24)), ((1, 1), (112, 112))], ids=str)
def test_half_precision_grouped_heads_and_sizes_that_are_no_power_of_two(
    dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int], device: torch.device
) -> None:
    tensors, cache = inputs(70, seen=(5, 31), window=17, heads=heads, dims=dims, dtype=dtype, device=device)
    check(tensors, cache, 17)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("window", [8, 129, 1025])
@pytest.mark.parametrize(("length", "heads", "dims"), [
    (1000, (16, 16), (64, 64)), (1000, (4, 1), (128, 128)), (1000, (2, 2), (112, 48)),
    (1000, (2, 1), (24, 112)), (16384, (2, 2), (64, 64)),
], ids=str)  # fmt: skip
def test_great_lengths(length, heads, dims, window, dtype, device) -> None:
    for seen in (None, (window // 2, 5 * window)):
        tensors, cache = inputs(
            length, seen=seen, window=window, heads=heads, dims=dims, dtype=dtype, device=device
        )
        check(tensors, cache, window)


def test_slots_never_filled_may_hold_anything(device: torch.device) -> None:
    tensors, cache = inputs(5, seen=(3, 0), window=9, dtype=SINGLE, device=device)
    assert cache is not None
    clean = results(attend, tensors, cache, window=9)
    for ring in cache[:2]:
        for row, seen in enumerate(cache.seen_B.tolist()):
            ring[row, seen:] = torch.nan
    got = results(attend, tensors, cache, window=9)
    for name in ("y", *(name for name in clean if "gradient" in name)):
        laws.assert_bitwise(name, got[name], clean[name])
    step = [t[:, :1] for t in tensors]
    with torch.no_grad():
        assert attend(*step, cache, window=9, scale=1.0)[0].isfinite().all()
        assert attend(*step, cache, window=9, scale=1.0, inplace=True)[0].isfinite().all()


def test_the_same_bits_twice(device: torch.device) -> None:
    how = inputs(65, seen=(3, 40), window=9, dtype=HALF, device=device)
    first, second = (results(attend, *how, window=9) for _ in range(2))
    for name, tensor in first.items():
        laws.assert_bitwise(name, second[name], tensor)


# ------------------------------------------------------------------------------------------------------ steps


@torch.no_grad()
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("heads", "dims", "window"), [
    ((2, 2), (16, 16), 5), ((3, 1), (48, 24), 70), ((1, 1), (112, 112), 2),
], ids=str)  # fmt: skip
def test_steps_around_the_ring(heads, dims, window, dtype, inplace, device) -> None:
    """Each step from the same state in all three, so that errors are of one step."""
    seen = (0, window - 2, window, 7 * window + 1)
    tensors, cache = inputs(
        6, seen=seen, window=window, heads=heads, dims=dims, batch=len(seen), dtype=dtype, device=device
    )
    how: Any = {"window": window, "scale": dims[0] ** -0.5}
    for t in range(6):
        now = tuple(x[:, t : t + 1] for x in tensors)
        plain, state = laws.plainly(window_attention_loop, *now, cache, **how)
        truth, _ = window_attention_loop(*wide(now, None)[0], wide((), cache)[1], **how)
        given = KeyValueCache(*(x.clone() for x in cache))
        with poisoned():
            y, after = attend(*now, given, inplace=inplace, **how)
        laws.assert_as_good_as_plain(f"y of step {t}", y, plain, truth)
        for name, got, want in zip(("keys", "values", "seen"), after, state, strict=True):
            laws.assert_bitwise(f"{name} after step {t}", got, want)
        for got, mine, before in zip(after, given, cache, strict=True):
            if inplace and got is not after.seen_B:
                assert got.data_ptr() == mine.data_ptr()
            else:
                laws.assert_bitwise("what went in", mine, before)
        cache = after


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 128, 512])
@pytest.mark.parametrize("window", [8, 129, 1025])
def test_steps_of_many_rows(batch: int, window: int, device: torch.device) -> None:
    seen = tuple(37 * row for row in range(batch))
    how: Any = {"window": window, "scale": 0.125}
    for heads in ((16, 16), (16, 2)):
        tensors, cache = inputs(
            1, seen=seen, window=window, heads=heads, dims=(64, 64), batch=batch, dtype=HALF, device=device
        )
        plain, state = laws.plainly(window_attention, *tensors, cache, **how)
        wide_tensors, wide_cache = wide(tensors, cache)
        truth, _ = window_attention(*wide_tensors, wide_cache, **how)
        for inplace in (False, True):
            y, after = attend(*tensors, KeyValueCache(*(x.clone() for x in cache)), inplace=inplace, **how)
            laws.assert_as_good_as_plain("y", y, plain, truth)
            for name, got, want in zip(("keys", "values", "seen"), after, state, strict=True):
                laws.assert_bitwise(name, got, want)


# ---------------------------------------------------------------------------- vmap, autocast, compile, mixer


def mixers_of(device: torch.device, **options: Any) -> tuple[Any, Any]:
    """The same weights in the kernel's form and in the plain one."""
    built = [
        laws.build(holdall.describe("sliding-window").configure(form=form, **options)).to(device)
        for form in ("kernel", "parallel")
    ]
    assert [mixer.form for mixer in built] == ["kernel", "parallel"]
    return built[0], built[1]


@pytest.mark.parametrize("options", [
    {"window": 5}, {"window": 9, "heads": 4, "kv_heads": 2, "rotary": 0.5, "bias": "out"},
], ids=str)  # fmt: skip
def test_a_mixer_in_pieces_is_the_plain_one(options: dict, device: torch.device) -> None:
    fast, plain = mixers_of(device, width=32, **options)
    x = laws.draw(2, 24, 32, dtype=SINGLE).to(device)
    with torch.no_grad():
        truth = laws.outcome(laws.twin(plain, dtype=DOUBLE).to(device), x.double())
        want = laws.plainly(laws.outcome, plain, x)
        for sizes in ([24], [3, 20, 1], [20, 1, 1, 1, 1]):
            for inplace in (False, True):
                call = functools.partial(fast, inplace=inplace)
                for name, got in laws.named(*laws.read_in_pieces(call, x, sizes)).items():
                    laws.assert_as_good_as_plain(f"{name} in {sizes}", got, want[name], truth[name])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_population_trains_under_vmap(autocast: bool, device: torch.device) -> None:
    fast, _ = mixers_of(device, width=32, window=9, heads=2, rotary=1.0)
    x = laws.draw(3, 2, 20, 32, dtype=SINGLE).to(device)
    assert_trains_under_vmap(fast, x, autocast=autocast)


def test_several_gradients_at_once(device: torch.device) -> None:
    """The backward itself under vmap."""
    tensors, _ = inputs(12, seen=None, window=5, dtype=SINGLE, device=device)
    leaves = [x.detach().requires_grad_() for x in tensors]
    y, _ = attend(*leaves, None, window=5, scale=0.25, want_state=False)
    ups = laws.draw(3, *y.shape, dtype=SINGLE).to(device)
    together = torch.autograd.grad(y, leaves, ups, is_grads_batched=True, retain_graph=True)
    for i, up in enumerate(ups):
        for got, want in zip(together, torch.autograd.grad(y, leaves, up, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.compile
@traced
def test_one_graph_under_compile(device: torch.device) -> None:
    fast, _ = mixers_of(device, width=32, window=9)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    x = laws.draw(2, 12, 32, dtype=SINGLE).to(device).requires_grad_()
    with torch.no_grad():
        _, state = fast(x[:, :4])
        for inplace in (False, True):
            given = [laws.map_state(state, torch.clone) for _ in range(2)]
            got, want = (
                f(x[:, :1], s, inplace=inplace) for f, s in zip((compiled, fast), given, strict=True)
            )
            for name, tensor in laws.named(*want).items():
                torch.testing.assert_close(laws.named(*got)[name], tensor)
    (got,), (want,) = (torch.autograd.grad(f(x, state)[0].square().sum(), x) for f in (compiled, fast))
    torch.testing.assert_close(got, want)


def test_what_cannot_run_says_why(device: torch.device) -> None:
    tensors, _ = inputs(3, seen=None, window=5, dtype=DOUBLE, device=device)
    with pytest.raises(KernelError, match="float64"):
        attend(*tensors, None, window=5, scale=1.0)
    tensors, _ = inputs(3, seen=None, window=5, dims=(16, 144), dtype=SINGLE, device=device)
    with pytest.raises(KernelError, match="at most 128 dimensions, not 144"):
        attend(*tensors, None, window=5, scale=1.0)
    config = holdall.describe("sliding-window").configure(width=256)
    assert "not 256" in config.kernel_refusal(device, SINGLE)
    assert not holdall.describe("sliding-window").configure(width=256, heads=2).kernel_refusal(device, SINGLE)


@pytest.mark.gpu
def test_a_cuda_graph_replays_training_and_steps(device: torch.device, assert_replays: Any) -> None:
    tensors, cache = inputs(100, seen=(3, 40), window=17, dtype=HALF, device=device)
    leaves = [x.requires_grad_() for x in tensors]
    assert_replays(lambda: torch.autograd.grad(attend(*leaves, None, window=17, scale=0.25)[0].sum(), leaves))
    now = [x.detach()[:, :1] for x in tensors]

    def step() -> list[Tensor]:
        y, after = attend(*now, cache, window=17, scale=0.25)
        return [y, *after]

    assert_replays(step)


@pytest.mark.gpu
def test_a_new_length_compiles_nothing(device: torch.device) -> None:
    kernels = kernel._forward_kernel, kernel._backward_kernel

    def call(length: int) -> None:
        results(attend, *inputs(length, seen=(3, 40), window=17, dtype=HALF, device=device), window=17)

    call(64)
    before = times_compiled(*kernels)
    for length in (2, 16, 63, 128, 1000):
        call(length)
    assert times_compiled(*kernels) == before


@pytest.mark.gpu("tens of GB")
def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    length, tail = 2**24 + 300, 200
    x = torch.randn(1, length, 1, 128, device=device, dtype=HALF).requires_grad_()
    y, _ = attend(x, x, x, None, window=9, scale=0.1, want_state=False)
    y.backward(torch.ones_like(y))
    end = x.detach()[:, -tail - 8 :].clone().requires_grad_()
    want, _ = window_attention(end, end, end, None, window=9, scale=0.1, want_state=False)
    want[:, 8:].backward(torch.ones_like(want[:, 8:]))
    torch.testing.assert_close(y[:, -tail:], want[:, -tail:], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad[:, -tail + 8 :], end.grad[:, -tail + 8 :], rtol=2e-2, atol=5e-2)


def test_a_kernel_that_a_gpu_could_run_is_built_and_refuses_to_run_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forms, "HAS_TRITON", True)
    monkeypatch.setattr(forms, "interpreted", lambda: False)
    mixer = holdall.build("sliding-window", width=16, form="kernel")  # to be moved to a GPU
    assert mixer.double().form == "kernel"  # and perhaps back again
    with pytest.raises(forms.KernelError, match="the kernel takes heads of at most"):
        holdall.build("sliding-window", width=1024, form="kernel")  # which no move will mend
