"""Linear attentions with feature maps of their own, against packages that others wrote.

Letters: B row, T time, H heads, K dimensions of a head, F features, V value dimensions.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import holdall
from holdall.contract import Mixer
from holdall.mixers.performer import orthogonal_rows
from holdall.testing import laws

WIDTH, HEADS, LENGTH = 16, 2, 40


def performer_pytorch() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("performer_pytorch", reason="performer-pytorch is not installed")


def fla(module: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"fla.{module}", reason="flash-linear-attention is not installed")


def assert_same(name: str, got: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    assert got.shape == want.shape, name
    assert laws.distance(got, want) <= relative * laws.size(want), name


def performers(kernel: str, form: str, dtype: torch.dtype) -> tuple[nn.Module, Mixer]:
    """Theirs, with unlike parameters, and ours with the same weights."""
    package = performer_pytorch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = package.SelfAttention(
            dim=WIDTH, heads=HEADS, dim_head=WIDTH // HEADS, nb_features=12, causal=True, qkv_bias=True,
            generalized_attention=kernel == "relu",
        ).to(dtype)  # fmt: skip
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter += 0.3 * laws.draw(*parameter.shape, dtype=dtype, seed=i)
    config = holdall.describe("performer").configure(
        width=WIDTH, heads=HEADS, features=12, bias=True, kernel=kernel, form=form, chunk=16
    )
    mixer = laws.build(config).to(dtype)
    qkv = [theirs.to_q, theirs.to_k, theirs.to_v]
    mixer.load_state_dict(
        {
            "qkv.weight": torch.cat([linear.weight for linear in qkv]),
            "qkv.bias": torch.cat([linear.bias for linear in qkv]),
            "out_proj.weight": theirs.to_out.weight,
            "out_proj.bias": theirs.to_out.bias,
            "projection_FK": theirs.fast_attention.projection_matrix,
        }
    )
    return theirs, mixer


@pytest.mark.claim("mixers/performer.py", "Weights", "performer-pytorch (and")
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@torch.no_grad()
def test_performer(kernel: str, form: str, dtype: torch.dtype, relative: float) -> None:
    """Each output is theirs for the tokens up to there: their stabiliser is of the whole, future included."""
    theirs, mixer = performers(kernel, form, dtype)
    x_BTD = 2 * laws.tokens(mixer, LENGTH)
    y_BTD, _ = mixer(x_BTD)
    if kernel == "relu":
        assert_same("output", y_BTD, theirs(x_BTD), relative)
        return
    want_BTD = torch.stack([theirs(x_BTD[:, :t])[:, -1] for t in range(1, LENGTH + 1)], dim=1)
    assert_same("output", y_BTD, want_BTD, relative)
    # and this is no formality: theirs for the whole differ where the maximum is yet to come
    assert laws.distance(theirs(x_BTD)[:, : LENGTH // 2], y_BTD[:, : LENGTH // 2]) > 1e-3 * laws.size(y_BTD)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_performer_learns_the_same(kernel: str) -> None:
    """Gradients of the last output, for which their stabiliser is ours: none reach for it."""
    theirs, mixer = performers(kernel, "parallel", torch.float64)
    x_BTD = laws.tokens(mixer, LENGTH).requires_grad_()
    up_BD = laws.draw(2, WIDTH, dtype=torch.float64, seed=9)
    got, want = (
        torch.autograd.grad(m(x_BTD)[:, -1], x_BTD, up_BD)[0] for m in (lambda x: mixer(x)[0], theirs)
    )
    assert_same("gradient of x", got, want, 1e-12)


@pytest.mark.parametrize("form", ["loop", "parallel"])
@torch.no_grad()
def test_hedgehog(form: str) -> None:
    """Their normalised linear attention over the two softmaxes; their own map takes one over both halves."""
    naive = fla("ops.linear_attn.naive")
    config = holdall.describe("hedgehog").configure(width=WIDTH, heads=HEADS, form=form, chunk=16)
    mixer = laws.build(config)
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = (u.unflatten(-1, (HEADS, -1)) for u in mixer.qkv(x_BTD).chunk(3, dim=-1))
    features = []
    for u_BTHK, map_HKF in ((q, mixer.map_q_HKF), (k, mixer.map_k_HKF)):
        u_BTHF = (u_BTHK.transpose(1, 2) @ map_HKF).transpose(1, 2)
        features.append(torch.cat((nn.Softmax(-1)(u_BTHF), nn.Softmin(-1)(u_BTHF)), dim=-1))
    want_BTHV, (s_BHFV, z_B1HF) = naive.naive_recurrent_linear_attn(
        *features, v, normalize=True, output_final_state=True
    )
    y_BTD, state = mixer(x_BTD)
    assert_same("output", y_BTD, mixer.out_proj(want_BTHV.flatten(2)), 1e-5)
    assert_same("state.s", state.s_BHFV, s_BHFV, 1e-5)
    assert_same("state.z", state.z_BHF, z_B1HF[:, 0], 1e-5)


@pytest.mark.claim("mixers/rebased.py", "the state keeps")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("heads", [1, 2])
@torch.no_grad()
def test_rebased(heads: int, form: str) -> None:
    """Their scores and their features; the norm over all heads is ours alone, and their eps is another."""
    naive, maps = fla("ops.rebased.naive"), fla("modules.feature_map")
    config = holdall.describe("rebased").configure(
        width=WIDTH, heads=heads, feature_dim=6, form=form, chunk=16
    )
    mixer = laws.build(config).double()
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = mixer.qkv(x_BTD).split(mixer.sizes, dim=-1)
    q_BHTK, k_BHTK, v_BHTV = (
        u.unflatten(-1, (heads, -1)).transpose(1, 2) for u in (mixer.ln_q(q), mixer.ln_k(k), v)
    )
    sums, divisors = (
        naive.naive_parallel_rebased(q_BHTK, k_BHTK, u, use_norm=False)
        for u in (v_BHTV, torch.ones_like(v_BHTV))
    )
    want_BHTV = sums / (divisors + 1e-12)
    y_BTD, state = mixer(x_BTD)
    assert_same("output", y_BTD, mixer.out_proj(want_BHTV.transpose(1, 2).flatten(2)), 1e-12)

    their_map = maps.RebasedFeatureMap(6 * heads, normalize=False).double()
    their_map.gamma.copy_(mixer.ln_k.weight)
    their_map.beta.copy_(mixer.ln_k.bias)
    k_BHTK = their_map(nn.functional.layer_norm(k, k.shape[-1:]), flatten=False)
    k_BHTK = k_BHTK.unflatten(-1, (heads, -1)).transpose(1, 2)
    squares = maps.RebasedFeatureMap(6, use_beta=False, normalize=False).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs about checkpoints, which they take of it
        k_BHTF = squares(k_BHTK)
    assert_same("state.s", state.s_BHFV, k_BHTF.mT @ v_BHTV, 1e-12)
    assert_same("state.z", state.z_BHF, k_BHTF.sum(2), 1e-12)


@pytest.mark.claim("mixers/performer.py", "their rows of P")
@torch.no_grad()
def test_performers_rows_are_uniform_and_the_packages_are_not() -> None:
    """E exp(p . x - |x|^2 / 2) is 1 for Gaussian p; theirs have a first entry that is never positive."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = orthogonal_rows(4000, 8).double()
        theirs = performer_pytorch().performer_pytorch.gaussian_orthogonal_random_matrix(4000, 8).double()
    assert (theirs[::8, 0] <= 0).all()
    assert 0.4 < (ours[::8, 0] <= 0).double().mean() < 0.6
    x_K = torch.tensor([0.5] * 8, dtype=torch.float64)

    def estimate(rows: torch.Tensor) -> float:
        return (rows @ x_K - x_K.square().sum() / 2).exp().mean().item()

    assert abs(estimate(ours) - 1) < 0.15  # four standard errors
    assert estimate(theirs) < 1 - 0.15


@pytest.mark.claim("mixers/performer.py", "they can redraw P")
@pytest.mark.claim("mixers/rfa.py", "the official code draws R")
@pytest.mark.parametrize(("name", "rows"), [("performer", "projection_FK"), ("rfa", "rows_HPK")])
def test_one_draw_stays_with_the_weights(name: str, rows: str) -> None:
    """A mixer that trains keeps its random rows, no optimizer has them, and they are saved."""
    mixer = holdall.build(name, width=WIDTH).train()
    before = mixer.state_dict()[rows].clone()
    for seed in range(2):
        mixer(laws.tokens(mixer, LENGTH, seed=seed))[0].sum().backward()
    laws.assert_bitwise("rows", mixer.get_buffer(rows), before)
    assert rows not in dict(mixer.named_parameters())


@pytest.mark.claim("mixers/hedgehog.py", "flash-linear-attention takes one softmax")
@torch.no_grad()
def test_flas_hedgehog_map_is_one_softmax() -> None:
    theirs = fla("modules.feature_map").HedgehogFeatureMap(4).double()
    u = laws.draw(3, 4, dtype=torch.float64)
    both = torch.cat((u, -u), dim=-1)
    assert_same("features", theirs(u), (2 * both).exp() / (2 * both).exp().sum(-1, keepdim=True), 1e-12)
    ours = holdall.build("hedgehog", width=4, heads=1).double()
    ours.qkv.weight.copy_(torch.eye(4, dtype=torch.float64).repeat(3, 1))
    _, state = ours(u[:, None])
    want = torch.cat((u.softmax(-1), (-u).softmax(-1)), dim=-1)
    assert_same("ours", state.z_BHF[:, 0], want, 1e-12)
