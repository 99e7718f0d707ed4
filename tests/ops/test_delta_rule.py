"""The delta rules, chunk by chunk, are their loops: with every decay, chunk size and way to forget.

Letters: B row, T time, H heads, K key dim, V value dim.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from holdall.ops import delta_rule as ops
from holdall.ops.delta_rule import (
    delta_rule,
    delta_rule_loop,
    generalised_delta_rule,
    generalised_delta_rule_loop,
    unit_length,
)
from holdall.ops.linear_attention import linear_attention_loop
from holdall.testing import laws

B, H, K, V = 2, 3, 4, 5
DOUBLE, SINGLE = torch.float64, torch.float32
DECAYS = {"no decay": None, "per head": (H,), "per key": (H, K)}
PAIRS = {
    "delta": (delta_rule, delta_rule_loop),
    "generalised": (generalised_delta_rule, generalised_delta_rule_loop),
}
parametrize_decay = pytest.mark.parametrize("decay", DECAYS)
parametrize_rule = pytest.mark.parametrize("rule", PAIRS)


def inputs(
    rule: str, decay: str, length: int, *, of: str = "mild", dtype: torch.dtype = DOUBLE
) -> list[Tensor | None]:
    """The arguments of a rule, in order: keys of unit length, beta up to 2, a state as after a few tokens."""
    q, k, a, b = (laws.draw(B, length, H, K, dtype=DOUBLE, seed=i) for i in range(4))
    v, s = laws.draw(B, length, H, V, dtype=DOUBLE, seed=4), laws.draw(B, H, K, V, dtype=DOUBLE, seed=5)
    if rule == "delta":
        rest = [unit_length(k), v, 2 * a[..., 0].sigmoid(), s]
    else:
        b = unit_length(b)
        rest = [k, v, -b * a.sigmoid(), b, s]
    log_w = None
    if DECAYS[decay] is not None:
        share = laws.draw(B, length, *DECAYS[decay], dtype=DOUBLE, seed=9).sigmoid()
        log_w = {
            "mild": -share,
            "strong": -50 * torch.ones_like(share),
            "resets": torch.where(share < 0.3, -50.0, -1e-3 * share),
        }[of]
    return [None if t is None else t.to(dtype) for t in (q, *rest, log_w)]


def pulled_back(function: Any, tensors: list[Tensor | None], **options: Any) -> list[Tensor]:
    """Results, and gradients of all tensors from all results together."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    results = list(function(*leaves, **options))
    ups = [laws.draw(*t.shape, dtype=t.dtype, seed=20 + i) for i, t in enumerate(results)]
    return [*results, *torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], ups)]


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("chunk", [1, 16, 64])
@parametrize_decay
@parametrize_rule
def test_chunks_equal_the_loop(rule: str, decay: str, chunk: int, length: int) -> None:
    tensors, (parallel, loop) = inputs(rule, decay, length), PAIRS[rule]
    want = pulled_back(loop, tensors)
    for i, got in enumerate(pulled_back(parallel, tensors, chunk=chunk)):
        laws.assert_close(f"result or gradient {i}", got, want[i])


@parametrize_decay
@parametrize_rule
def test_more_chunks_than_are_solved_side_by_side(
    rule: str, decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "SIDE_BY_SIDE", 3)
    tensors, (parallel, loop) = inputs(rule, decay, 40), PAIRS[rule]
    want = pulled_back(loop, tensors)
    for i, got in enumerate(pulled_back(parallel, tensors, chunk=4)):
        laws.assert_close(f"result or gradient {i}", got, want[i])


@pytest.mark.parametrize("of", ["mild", "strong", "resets"])
@pytest.mark.parametrize("decay", ["per head", "per key"])
@parametrize_rule
def test_however_much_is_forgotten_chunks_are_as_exact_as_the_loop(rule: str, decay: str, of: str) -> None:
    """A token that forgets e^50 takes no digits from the tokens behind it, and nothing turns into NaN."""
    tensors, (parallel, loop) = inputs(rule, decay, 100, of=of, dtype=SINGLE), PAIRS[rule]
    plain = laws.plainly(pulled_back, loop, tensors)
    truth = pulled_back(loop, [None if t is None else t.double() for t in tensors])
    for i, got in enumerate(pulled_back(parallel, tensors)):
        if i < 2:
            laws.assert_as_good_as_plain("output or state", got, plain[i], truth[i])
        else:
            laws.assert_close(f"gradient {i}", got, truth[i].float(), 32 * laws.size(truth[i]) * 2.0**-23)


@pytest.mark.parametrize("beta", [1.0, 1.9, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_keys_that_are_nearly_the_same_keep_their_digits(spread: float, beta: float) -> None:
    """Powers of the chunk's matrix reach 2^60 here: an inverse made of them would have no digits left."""
    length = 1000
    k = unit_length(1 + spread * laws.draw(1, length, H, K, dtype=SINGLE))
    q, v = (laws.draw(1, length, H, dim, dtype=SINGLE, seed=dim) for dim in (K, V))
    s = torch.zeros(1, H, K, V)
    tensors = [q, k, v, torch.full((1, length, H), beta), s]
    want = delta_rule_loop(*(t.double() for t in tensors))
    for got, right in zip(delta_rule(*tensors, chunk=64), want, strict=True):
        assert laws.distance(got, right) < 1e-4 * laws.size(right)


@parametrize_decay
def test_the_delta_rule_is_the_generalised_one_with_equal_keys(decay: str) -> None:
    """It reads the decayed state, so its removal key is the decayed one."""
    q, k, v, beta, s, log_w = inputs("delta", decay, 30)
    w = 1.0 if log_w is None else (log_w if log_w.ndim == 4 else log_w[..., None]).exp()
    want = generalised_delta_rule_loop(q, k, beta[..., None] * v, -beta[..., None] * k, w * k, s, log_w)
    for got, right in zip(delta_rule_loop(q, k, v, beta, s, log_w), want, strict=True):
        laws.assert_close("loop", got, right)


@parametrize_decay
@pytest.mark.parametrize("form", [0, 1], ids=["parallel", "loop"])
def test_without_removal_it_is_linear_attention(decay: str, form: int) -> None:
    q, k, v, a, b, s, log_w = inputs("generalised", decay, 30)
    y, state, _ = linear_attention_loop(q, k, v, s, None, log_w)
    for got, want in zip(
        PAIRS["generalised"][form](q, k, v, torch.zeros_like(a), b, s, log_w), (y, state), strict=True
    ):
        laws.assert_close("sum", got, want)


@pytest.mark.parametrize("form", [0, 1], ids=["parallel", "loop"])
def test_with_beta_one_and_orthonormal_keys_the_last_value_of_each_key_is_held(form: int) -> None:
    """Written twice, a key holds its second value; a sum would hold both."""
    keys = torch.linalg.qr(laws.draw(K, K, dtype=DOUBLE)).Q
    order = torch.tensor([0, 1, 0, 2, 3, 1, 1])
    k = keys[order][None, :, None]
    v, s = laws.draw(1, len(order), 1, V, dtype=DOUBLE), torch.zeros(1, 1, K, V, dtype=DOUBLE)
    _, state = PAIRS["delta"][form](k, k, v, torch.ones(1, len(order), 1, dtype=DOUBLE), s)
    laws.assert_close("held", keys @ state[0, 0], v[0, torch.tensor([2, 6, 3, 4]), 0])


@pytest.mark.parametrize("form", [0, 1], ids=["parallel", "loop"])
def test_beta_two_reflects(form: int) -> None:
    """With a unit key and value zero the transition is a Householder reflection: twice is the identity."""
    k = unit_length(laws.draw(1, 1, H, K, dtype=DOUBLE), eps=0.0).expand(1, 2, H, K)
    s = laws.draw(1, H, K, V, dtype=DOUBLE, seed=1)
    v, beta = torch.zeros(1, 2, H, V, dtype=DOUBLE), 2 * torch.ones(1, 2, H, dtype=DOUBLE)
    rule = PAIRS["delta"][form]
    laws.assert_close("twice", rule(k, k, v, beta, s)[1], s)
    once = rule(k[:, :1], k[:, :1], v[:, :1], beta[:, :1], s)[1]
    read, back = (torch.einsum("hk,bhkv->bhv", k[0, 0], state) for state in (s, once))
    laws.assert_close("the other sign", back, -read)


@parametrize_rule
def test_a_state_is_kept_in_fp32_beside_bf16(rule: str) -> None:
    tensors = inputs(rule, "per key", 40, dtype=torch.bfloat16)
    tensors[-2] = tensors[-2].float()
    for function in PAIRS[rule]:
        y, s = function(*tensors)
        assert (y.dtype, s.dtype) == (torch.bfloat16, torch.float32)


def test_a_vector_of_unit_length_may_come_from_zero() -> None:
    x = torch.cat((torch.zeros(1, K), laws.draw(1, K, dtype=SINGLE))).requires_grad_()
    y = unit_length(x)
    laws.assert_close("length", y.norm(dim=-1), torch.tensor([0.0, 1.0]), 1e-6)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.isfinite().all()
