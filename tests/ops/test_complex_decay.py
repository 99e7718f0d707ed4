"""Complex decay: chunks of every size are the loop, however the state turns and for however long.

Letters: B row, T time, H heads, K key dim, V value dim.
"""

import pytest
import torch
from torch import Tensor

from holdall.ops.complex_decay import complex_decay, complex_decay_loop
from holdall.testing import laws

B, H, K, V = 2, 3, 4, 5


def inputs(length: int, *, keep: float = 0.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, s, log decay and turn; the larger `keep`, the less is forgotten."""
    q, k, v = (laws.draw(B, length, H, d, dtype=dtype, seed=i) for i, d in enumerate((K, K, V)))
    angle_BTH = 3 * laws.draw(B, length, H, dtype=dtype, seed=4)
    log_decay_BTH = torch.nn.functional.logsigmoid(keep + laws.draw(B, length, H, dtype=dtype, seed=5))
    turn_BTH2 = torch.stack((angle_BTH.cos(), angle_BTH.sin()), dim=-1)
    return [q, k, v, laws.draw(B, H, K, V, 2, dtype=dtype, seed=3), log_decay_BTH, turn_BTH2]


def pulled_back(function, tensors: list[Tensor], **options) -> list[Tensor]:
    """Results, and gradients of all tensors from all results together."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = list(function(*leaves, **options))
    ups = [laws.draw(*t.shape, dtype=t.dtype, seed=20 + i) for i, t in enumerate(results)]
    return [*(t.detach() for t in results), *torch.autograd.grad(results, leaves, ups)]


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("chunk", [1, 16, 64, 128])
def test_chunks_equal_the_loop(chunk: int, length: int) -> None:
    tensors = inputs(length, keep=3)
    want = pulled_back(complex_decay_loop, tensors)
    for i, got in enumerate(pulled_back(complex_decay, tensors, chunk=chunk)):
        laws.assert_close(f"result or gradient {i}", got, want[i])


def test_a_step_is_a_complex_product() -> None:
    q, k, v, s, log_decay, turn = inputs(1)
    a_BH11 = (log_decay[:, 0].exp() * torch.view_as_complex(turn)[:, 0])[..., None, None]
    after = a_BH11 * torch.view_as_complex(s) + torch.einsum("bhk,bhv->bhkv", k[:, 0], v[:, 0])
    y, end = complex_decay_loop(q, k, v, s, log_decay, turn)
    laws.assert_close("state", end, torch.view_as_real(after))
    laws.assert_close("output", y[:, 0], torch.einsum("bhk,bhkv->bhv", q[:, 0], after.real))


def test_without_turning_it_is_linear_attention_and_half_turns_change_the_sign() -> None:
    q, k, v, s, log_decay, turn = inputs(40)
    s = torch.stack((s[..., 0], torch.zeros_like(s[..., 0])), dim=-1)
    ahead = torch.zeros_like(turn)
    ahead[..., 0] = 1
    y, end = complex_decay(q, k, v, s, log_decay, ahead, chunk=16)
    sign_T = (-1.0) ** torch.arange(1, 41, dtype=torch.float64)
    z, _ = complex_decay(q, k, v * sign_T[:, None, None], s, log_decay, -ahead, chunk=16)
    laws.assert_close("alternating", z * sign_T[:, None, None], y)
    assert (end[..., 1] == 0).all()


def test_nothing_read_yet_is_a_state_of_zeros() -> None:
    q, k, v, s, *gate = inputs(40)
    want = complex_decay(q, k, v, torch.zeros_like(s), *gate, chunk=16)
    for got, tensor in zip(complex_decay(q, k, v, None, *gate, chunk=16), want, strict=True):
        laws.assert_close("from nothing", got, tensor)
    y, state = complex_decay(q, k, v, None, *gate, chunk=16, want_state=False)
    laws.assert_close("without the state", y, want[0])
    assert state is None


@pytest.mark.parametrize("keep", [0.0, 4.0, 12.0])
@pytest.mark.parametrize("chunk", [16, 32])
def test_in_fp32_chunks_are_as_exact_as_the_loop(chunk: int, keep: float) -> None:
    """However long the memory, so however many turns add up between two tokens."""
    tensors = inputs(500, keep=keep, dtype=torch.float32)
    plain = laws.plainly(pulled_back, complex_decay_loop, tensors)
    truth = pulled_back(complex_decay_loop, [t.double() for t in tensors])
    for i, got in enumerate(pulled_back(complex_decay, tensors, chunk=chunk)):
        laws.assert_as_good_as_plain(f"result or gradient {i}", got, plain[i], truth[i])
