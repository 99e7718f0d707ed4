"""Linear attention, chunk by chunk, is its loop: with every decay, normalised or not, in every chunk size.

Letters: B row, T time, H heads, K key dim, F features, V value dim.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from holdall.mixers.taylor import TaylorConfig
from holdall.model import seeded
from holdall.ops.linear_attention import (
    FEATURE_MAPS,
    absorb,
    absorb_loop,
    linear_attention,
    linear_attention_loop,
    quadratic_features,
    taylor_features,
    taylor_scores,
)
from holdall.testing import laws

B, H, K, V = 2, 3, 4, 5
DECAYS = {"no decay": None, "per head": (H,), "per key": (H, K)}
parametrize_decay = pytest.mark.parametrize("decay", DECAYS)


def decays(kind: str, length: int, *, of: str = "mild", dtype: torch.dtype = torch.float64) -> Tensor | None:
    """log a_t, per head or key: always a little, always nearly all, or sometimes nearly all."""
    if DECAYS[kind] is None:
        return None
    share = torch.sigmoid(laws.draw(B, length, *DECAYS[kind], dtype=torch.float64, seed=9))
    log_a = {
        "mild": -share,
        "strong": -50 * torch.ones_like(share),
        "resets": torch.where(share < 0.3, -50.0, -1e-3 * share),
    }[of]
    return log_a.to(dtype)


def inputs(length: int, features: int = K, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k, v, s and z, as after a few tokens."""
    q, k, v = (laws.draw(B, length, H, d, dtype=dtype, seed=i) for i, d in enumerate((K, K, V)))
    return (
        q,
        k,
        v,
        laws.draw(B, H, features, V, dtype=dtype, seed=3),
        laws.draw(B, H, features, dtype=dtype).exp(),
    )


def pulled_back(function: Any, tensors: list[Tensor | None], **options: Any) -> list[Tensor]:
    """Results, and gradients of all tensors from all results together."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    results = [t for t in function(*leaves, **options) if t is not None]
    ups = [laws.draw(*t.shape, dtype=t.dtype, seed=20 + i) for i, t in enumerate(results)]
    return [*results, *torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], ups)]


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("chunk", [1, 16, 64, 128])
@parametrize_decay
def test_chunks_equal_the_loop(decay: str, chunk: int, length: int) -> None:
    q, k, v, s, _ = inputs(length)
    tensors = [q, k, v, s, None, decays(decay, length)]
    want = pulled_back(linear_attention_loop, tensors)
    for i, got in enumerate(pulled_back(linear_attention, tensors, chunk=chunk)):
        laws.assert_close(f"result or gradient {i}", got, want[i])


@pytest.mark.parametrize(
    ("name", "decay"),
    # a decay per key dimension goes with maps that keep the dimensions
    [
        pair
        for pair in itertools.product(FEATURE_MAPS, DECAYS)
        if pair not in (("taylor", "per key"), ("quadratic", "per key"))
    ],
)
def test_every_feature_map_normalised_and_decayed(name: str, decay: str) -> None:
    feature_map, length = FEATURE_MAPS[name], 40
    q, k, v, s, z = inputs(length, feature_map.size(K))
    if name == "identity":  # its normaliser is a sum of signed numbers; with positive ones it is sound
        q, k = q.exp(), k.exp()
    tensors = [q, k, v, s, z, decays(decay, length)]
    want = pulled_back(linear_attention_loop, tensors, feature_map=feature_map)
    got = pulled_back(linear_attention, tensors, feature_map=feature_map, normalise=True, chunk=16)
    for i, tensor in enumerate(got):
        laws.assert_close(f"result or gradient {i}", tensor, want[i])


@pytest.mark.parametrize("floor", [1e-6, 3.0])
@parametrize_decay
def test_a_floor_is_the_least_that_is_divided_by(decay: str, floor: float) -> None:
    length = 40
    q, k, v, s, z = inputs(length)  # of both signs, so that sums are below the floor, and below zero
    tensors = [q, k, v, s, z, decays(decay, length)]
    want = pulled_back(linear_attention_loop, tensors, floor=floor)
    got = pulled_back(linear_attention, tensors, normalise=True, floor=floor, chunk=16)
    for i, tensor in enumerate(got):
        laws.assert_close(f"result or gradient {i}", tensor, want[i])


def test_a_step_with_a_floor() -> None:
    q, k, v, s, z = inputs(1)
    y, *_ = linear_attention_loop(q, k, v, s, z, floor=1.0)
    s, z = s + k[:, 0, :, :, None] * v[:, 0, :, None, :], z + k[:, 0]
    divisor = torch.maximum((q[:, 0] * z).sum(-1), torch.ones(()))
    laws.assert_close("a step", y[:, 0], (q[:, 0, :, :, None] * s).sum(2) / divisor[..., None])
    assert (divisor == 1).any()
    assert (divisor > 1).any()


@pytest.mark.parametrize("normalise", [False, True])
@parametrize_decay
def test_nothing_read_yet_is_a_state_of_zeros(decay: str, normalise: bool) -> None:
    length, feature_map = 40, FEATURE_MAPS["elu1"]
    q, k, v, s, z = inputs(length)
    how: dict[str, Any] = {"feature_map": feature_map, "normalise": normalise, "chunk": 16}
    log_a = decays(decay, length)
    zeros = (torch.zeros_like(s), torch.zeros_like(z) if normalise else None)
    want = linear_attention(q, k, v, *zeros, log_a, **how)
    for got, tensor in zip(linear_attention(q, k, v, None, None, log_a, **how), want, strict=True):
        assert (got is None) == (tensor is None)
        if tensor is not None:
            laws.assert_close("from nothing", got, tensor)
    y, *state = linear_attention(q, k, v, None, None, log_a, want_state=False, **how)
    laws.assert_close("without the state", y, want[0])
    assert state == [None, None]


@pytest.mark.parametrize("of", ["mild", "strong", "resets"])
@pytest.mark.parametrize("decay", ["per head", "per key"])
def test_however_much_is_forgotten_chunks_are_as_exact_as_the_loop(decay: str, of: str) -> None:
    """A token that forgets e^50 takes no digits from the tokens behind it, and nothing turns into NaN."""
    length, dtype = 100, torch.float32
    q, k, v, s, _ = inputs(length, dtype=dtype)
    tensors = [q, k, v, s, None, decays(decay, length, of=of, dtype=dtype)]
    plain = laws.plainly(pulled_back, linear_attention_loop, tensors)
    truth = pulled_back(linear_attention_loop, [None if t is None else t.double() for t in tensors])
    for i, got in enumerate(pulled_back(linear_attention, tensors)):
        laws.assert_as_good_as_plain(f"result or gradient {i}", got, plain[i], truth[i])


def test_sums_are_kept_in_fp32_beside_bf16() -> None:
    q, k, v, s, z = inputs(64, dtype=torch.bfloat16)
    y, s, z = linear_attention(q.exp(), k.exp(), v, None, None, normalise=True)
    assert (y.dtype, s.dtype, z.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@parametrize_decay
def test_inplace_uses_the_memory_of_the_state(decay: str) -> None:
    q, k, v, s, z = inputs(40)
    log_a = decays(decay, 40)
    how: dict[str, Any] = {"feature_map": FEATURE_MAPS["elu1"], "normalise": True, "chunk": 16}
    want = linear_attention(q, k, v, s.clone(), z.clone(), log_a, **how)
    got = linear_attention(q, k, v, s, z, log_a, inplace=True, **how)
    for tensor, right in zip(got, want, strict=True):
        laws.assert_close("inplace", tensor, right)
    assert got[1] is s
    assert got[2] is z


@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("name", ["taylor", "elu1"])
def test_absorbing_equals_its_loop_and_the_state_that_linear_attention_leaves(name: str, length: int) -> None:
    feature_map = FEATURE_MAPS[name]
    q, k, v, s, z = inputs(length, feature_map.size(K))
    want = pulled_back(absorb_loop, [k, v, s, z], feature_map=feature_map)
    got = pulled_back(absorb, [k, v, s, z], feature_map=feature_map, chunk=16)
    _, *left = linear_attention(q, k, v, s, z, feature_map=feature_map, normalise=True)
    for i, (tensor, right) in enumerate(zip(got, want, strict=True)):
        laws.assert_close(f"result or gradient {i}", tensor, right)
    for tensor, right in zip(got[:2], left, strict=True):
        laws.assert_close("left behind", tensor, right)
    for tensor, right in zip(
        absorb(k, v, None, None, feature_map=feature_map), (got[0] - s, got[1] - z), strict=True
    ):
        laws.assert_close("from nothing", tensor, right)


# ----------------------------------------------------------------------------------------------- feature maps


def full_taylor(x: Tensor) -> Tensor:
    """The textbook's features, with every x_i x_j twice."""
    dim = x.shape[-1]
    outer = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2 * dim) ** 0.5
    return torch.cat((torch.ones_like(x[..., :1]), x / dim**0.25, outer), dim=-1)


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_taylor_features_are_the_full_outer_product_in_half_the_room(dim: int) -> None:
    q, k = laws.draw(7, dim, dtype=torch.float64), laws.draw(9, dim, dtype=torch.float64, seed=1)
    features = taylor_features(q)
    assert features.shape[-1] == FEATURE_MAPS["taylor"].size(dim)
    laws.assert_close("products", features @ taylor_features(k).mT, full_taylor(q) @ full_taylor(k).mT)


def test_taylor_at_16_needs_153_features_where_the_full_product_has_273() -> None:
    x = laws.draw(1, 16, dtype=torch.float64)
    assert (taylor_features(x).shape[-1], full_taylor(x).shape[-1]) == (153, 273)


def test_taylor_is_the_exponential_to_second_order() -> None:
    q, k = (0.01 * laws.draw(6, 16, dtype=torch.float64, seed=i) for i in range(2))
    s = q @ k.mT / 4
    error = (taylor_features(q) @ taylor_features(k).mT - s.exp()).abs().max()
    assert error <= s.abs().max() ** 3  # the first term left out is s^3 / 6


@pytest.mark.parametrize("dim", [1, 2, 16])
def test_quadratic_features_are_the_squared_dot_product(dim: int) -> None:
    q, k = laws.draw(7, dim, dtype=torch.float64), laws.draw(9, dim, dtype=torch.float64, seed=1)
    products = quadratic_features(q) @ quadratic_features(k).mT
    laws.assert_close("products", products, (q @ k.mT / dim**0.5) ** 2)


@pytest.mark.parametrize("dim", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quadratic_features_are_exact_products(dim: int, dtype: torch.dtype) -> None:
    x = laws.draw(7, dim, dtype=dtype)
    i, j = torch.triu_indices(dim, dim, offset=1)
    want = torch.cat((x.square(), x[:, i] * x[:, j] * 2**0.5), dim=-1) / dim**0.5
    laws.assert_bitwise("features", quadratic_features(x), want)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """What torch.compile makes for several threads differs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.full
@pytest.mark.compile
def test_taylor_of_several_chunks_compiles_with_its_gradients(two_threads: None) -> None:
    """Features that were looked up by index made a program that wrote past its memory, and died of it."""
    with seeded(0):
        mixer = TaylorConfig(width=32, feature_dim=16, heads=2, chunk=16).build()
    x_BTD = laws.draw(2, 64, 32, dtype=torch.float32)

    def pull(function: Any) -> tuple[Tensor, ...]:
        y_BTD, _ = function(x_BTD, want_state=False)
        return y_BTD.detach(), *torch.autograd.grad(y_BTD.square().sum(), list(mixer.parameters()))

    torch.compiler.reset()
    compiled, want = torch.compile(mixer, dynamic=False), pull(mixer)
    for _ in range(15):
        for k, got in enumerate(pull(compiled)):
            laws.assert_close(f"result {k}", got, want[k])


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_scores_are_the_dot_products_of_features(name: str) -> None:
    feature_map = FEATURE_MAPS[name]
    q, k = (laws.draw(B, H, n, K, dtype=torch.float64, seed=n) for n in (6, 7))
    features = feature_map.features(q)
    assert features.shape == (B, H, 6, feature_map.size(K))
    laws.assert_close(name, feature_map.pairs(q, k), features @ feature_map.features(k).mT)


@pytest.mark.parametrize("name", ["relu", "square", "elu1"])
def test_maps_that_normalise_are_never_negative(name: str) -> None:
    x = torch.linspace(-50, 50, 101, dtype=torch.float32)
    assert (FEATURE_MAPS[name].features(x) >= 0).all()


def test_elu1_is_elu_plus_one_with_all_its_digits() -> None:
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 1.0, 20.0], dtype=torch.float64, requires_grad=True)
    y = FEATURE_MAPS["elu1"].features(x)
    laws.assert_close("elu1", y.detach(), torch.nn.functional.elu(x).detach() + 1)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, x.detach().clamp(max=0).exp())
    assert FEATURE_MAPS["elu1"].features(torch.tensor([-80.0])) > 0


def test_every_map_keeps_its_gradient() -> None:
    x = laws.draw(2, 3, K, dtype=torch.float64).requires_grad_()
    for name, feature_map in FEATURE_MAPS.items():
        assert torch.autograd.gradcheck(feature_map.features, (x,)), name


def test_taylor_scores_need_no_features() -> None:
    """Memory for all pairs of a chunk is the scores alone: the reason why `scores` exists."""
    q, k = (laws.draw(1, 1, 3, K, dtype=torch.float64, seed=i) for i in range(2))
    for t, s in itertools.product(range(3), range(3)):
        product = (q[0, 0, t] * k[0, 0, s]).sum() / K**0.5
        laws.assert_close("score", taylor_scores(q, k)[0, 0, t, s], 1 + product + product**2 / 2)
