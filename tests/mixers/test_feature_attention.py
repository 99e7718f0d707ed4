"""Linear attentions with feature maps of their own, each against its formula over all pairs of tokens.

The formulas are written once more here, quadratic and in fp64, without any state.

Letters: B row, T and S time, D width, H heads, K dimensions of a head, F features.
"""

import pytest
import torch
from torch import Tensor

import holdall
from holdall.contract import Mixer
from holdall.mixers import performer
from holdall.mixers.hedgehog import Hedgehog
from holdall.mixers.performer import Performer, orthogonal_rows
from holdall.mixers.rebased import Rebased
from holdall.mixers.rfa import Rfa
from holdall.testing import laws

LENGTH, WIDTH, HEADS = 50, 16, 2
DOUBLE = torch.float64


def built(name: str, **options: object) -> Mixer:
    """In fp64, with all parameters unlike."""
    return laws.build(holdall.describe(name).configure(width=WIDTH, **options)).double()


def per_head(mixer: Mixer, x_BTD: Tensor) -> list[Tensor]:
    """Queries, keys and values, (B, H, T, K)."""
    return [u.unflatten(-1, (HEADS, -1)).transpose(1, 2) for u in mixer.qkv(x_BTD).chunk(3, dim=-1)]


def mixed(mixer: Mixer, weight_BHTS: Tensor, v_BHSK: Tensor, divisor_BHT1: Tensor) -> Tensor:
    """Values weighted causally, then the projection that ends the mixer."""
    return mixer.out_proj((weight_BHTS.tril() @ v_BHSK / divisor_BHT1).transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------------------------- performer


@torch.no_grad()
def test_performer_is_its_formula_with_the_maximum_of_the_keys_so_far() -> None:
    mixer = built("performer", features=12, chunk=16)
    assert isinstance(mixer, Performer)
    x_BTD = 3 * laws.tokens(mixer, LENGTH)
    q, k, v = per_head(mixer, x_BTD)
    u, w, p = q / (WIDTH / HEADS) ** 0.25, k / (WIDTH / HEADS) ** 0.25, mixer.projection_FK
    ratio = 12**-0.5
    phi_q = ratio * ((u @ p.T - (u @ p.T).amax(-1, keepdim=True) - u.square().sum(-1, True) / 2).exp() + 1e-4)
    ys = []
    for t in range(LENGTH):
        seen = w[:, :, : t + 1]
        peak = (seen @ p.T).amax((-1, -2), keepdim=True)
        phi_k = ratio * ((seen @ p.T - peak - seen.square().sum(-1, keepdim=True) / 2).exp() + 1e-4)
        a = phi_q[:, :, t, None] @ phi_k.mT
        divisor = (phi_q[:, :, t] * (phi_k.sum(2) + 1e-6)).sum(-1)
        ys.append((a @ v[:, :, : t + 1])[:, :, 0] / divisor[..., None])
    want_BTD = mixer.out_proj(torch.stack(ys, dim=2).transpose(1, 2).flatten(2))
    laws.assert_close("output", mixer(x_BTD)[0], want_BTD)


@torch.no_grad()
def test_performers_features_estimate_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is added to features the stabilisers cancel, and many features are softmax attention."""
    monkeypatch.setitem(performer.KEY_EPS, "softmax", 0.0)
    mixer = built("performer", features=40_000)
    x_BTD = 0.5 * laws.tokens(mixer, LENGTH)
    q, k, v = per_head(mixer, x_BTD)
    weight = (q @ k.mT / (WIDTH / HEADS) ** 0.5).exp().tril()
    want_BTD = mixed(mixer, weight, v, weight.sum(-1, keepdim=True))
    even_BTD = mixed(mixer, torch.ones_like(weight), v, torch.arange(1.0, LENGTH + 1)[:, None])
    error, spread = ((y_BTD - want_BTD).square().mean().sqrt() for y_BTD in (mixer(x_BTD)[0], even_BTD))
    assert error < 0.1 * spread, f"off by {error:.3g}, where a mean of the values is off by {spread:.3g}"


@torch.no_grad()
def test_one_loud_key_takes_no_digits_from_what_is_read_in_fp32() -> None:
    """Its maximum shrinks all that was summed, exactly; nothing overflows, and nothing is divided by zero."""
    mixer = built("performer", features=12, chunk=16)
    x_BTD = laws.tokens(mixer, LENGTH)
    x_BTD[:, 20] *= 1e4
    y_BTD, state = laws.twin(mixer, dtype=torch.float32)(x_BTD.float())
    plain = laws.plainly(laws.outcome, laws.loop_of(mixer, torch.float32), x_BTD.float())
    truth = laws.loop_of(mixer, DOUBLE)
    assert y_BTD.isfinite().all()
    laws.assert_as_good_as_plain("output", y_BTD, plain["output"], truth(x_BTD)[0])
    assert (state.peak_BH > 100).all()


def test_random_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rows = orthogonal_rows(4000, 8).double()
    gram = rows[:8] @ rows[:8].T
    assert laws.distance(gram, gram.diagonal().diag()) < 1e-5
    squares = rows.square().sum(-1)
    assert abs(squares.mean().item() - 8) < 0.3  # chi squared of 8: mean 8, variance 16
    assert abs(squares.var().item() - 16) < 2
    assert laws.distance(rows.T @ rows / 4000, torch.eye(8, dtype=DOUBLE)) < 0.1
    # of 500 blocks; LAPACK's own orthogonal matrices have diagonals of about -1 on average
    assert laws.size(rows.unflatten(0, (500, 8)).mean(0)) < 0.25


def test_performer_takes_as_many_features_as_published() -> None:
    assert holdall.build("performer", width=128, heads=2).state_elements(9) == 266 * 130 + 128 + 4


# ------------------------------------------------------------------------------------------------ hedgehog


@pytest.mark.claim("mixers/hedgehog.py", "Weights", "LoLCATs turns")
@torch.no_grad()
def test_hedgehog_is_its_formula() -> None:
    mixer = built("hedgehog", feature_dim=5, chunk=16)
    assert isinstance(mixer, Hedgehog)
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = per_head(mixer, x_BTD)

    def phi(u: Tensor, map_HKF: Tensor) -> Tensor:
        e = (u @ map_HKF).exp()
        return torch.cat((e / e.sum(-1, keepdim=True), (1 / e) / (1 / e).sum(-1, keepdim=True)), dim=-1)

    a = (phi(q, mixer.map_q_HKF) @ phi(k, mixer.map_k_HKF).mT).tril()
    laws.assert_close("output", mixer(x_BTD)[0], mixed(mixer, a, v, a.sum(-1, keepdim=True) + 1e-12))


def test_hedgehogs_maps_start_as_the_identity_and_stay_so_in_a_model() -> None:
    from holdall.model import ModelConfig

    layer = holdall.describe("hedgehog").configure(width=WIDTH)
    model = ModelConfig(vocab=8, width=WIDTH, layers=(layer,)).build()
    for mixer in (layer.build(), model.blocks[0].mixer):
        for map_HKF in (mixer.map_q_HKF, mixer.map_k_HKF):
            laws.assert_bitwise("map", map_HKF.detach(), torch.eye(WIDTH // 2).expand(2, -1, -1))


def test_hedgehogs_features_are_floored_where_softmax_underflows() -> None:
    mixer = laws.build(holdall.describe("hedgehog").configure(width=WIDTH))
    with torch.no_grad():
        mixer.map_k_HKF.mul_(1e4)
    _, state = mixer(laws.tokens(mixer, 1))
    assert (state.z_BHF >= 1e-12).all()
    assert (state.z_BHF < 1e-9).any()


# ----------------------------------------------------------------------------------------------------- rfa


def angles(mixer: Rfa, u_BHTK: Tensor) -> Tensor:
    """Those of the random waves at each unit vector, (B, H, T, P)."""
    unit = u_BHTK / (u_BHTK.square().sum(-1, keepdim=True).sqrt() + 1e-3)
    return unit @ (mixer.rows_HPK * mixer.sigma_HK[:, None] / mixer.config.tau).mT


@pytest.mark.claim("mixers/rfa.py", "Weights", "it has no gate")
@pytest.mark.parametrize("gate", [False, True])
@torch.no_grad()
def test_rfa_is_its_formula(gate: bool) -> None:
    """In cosines of differences, which the sines and cosines of each are there to separate."""
    mixer = built("rfa", frequencies=12, tau=0.8, gate=gate, chunk=16)
    assert isinstance(mixer, Rfa)
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = per_head(mixer, x_BTD)
    weight = 0.01 * (angles(mixer, q)[:, :, :, None] - angles(mixer, k)[:, :, None]).cos().sum(-1).tril()
    if gate:
        g_BHT = torch.sigmoid(mixer.gate(x_BTD)).transpose(1, 2)
        for t in range(LENGTH):
            for s in range(t + 1):
                weight[:, :, t, s] *= (1 - g_BHT[:, :, s]) * g_BHT[:, :, s + 1 : t + 1].prod(-1)
    sums = weight.sum(-1, keepdim=True)
    floor = 0.012 if gate else 1.0
    assert (sums < floor).any()
    assert (sums > floor).any()
    laws.assert_close("output", mixer(x_BTD)[0], mixed(mixer, weight, v, sums.clamp(min=floor)))


@torch.no_grad()
def test_rfas_features_estimate_a_gaussian_of_the_distance() -> None:
    mixer = holdall.build("rfa", width=WIDTH, frequencies=40_000, tau=0.8).double()
    assert isinstance(mixer, Rfa)
    q, k, _ = per_head(mixer, laws.tokens(mixer, 10))
    q_BTHF, k_BTHF = (mixer.features(u.transpose(1, 2)) for u in (q, k))
    unit_q, unit_k = (torch.nn.functional.normalize(u, dim=-1) for u in (q, k))
    kernel = (-torch.cdist(unit_q, unit_k).square() / (2 * 0.8**2)).exp()
    estimate = torch.einsum("bthf,bshf->bhts", q_BTHF, k_BTHF) / 400
    assert laws.distance(estimate, kernel) < 0.03


def test_a_gate_close_to_one_keeps_the_digits_of_what_it_lets_in() -> None:
    """1 - g in fp32 is 0 for a gate of 20, and the token would be lost."""
    mixer = laws.build(holdall.describe("rfa").configure(width=WIDTH, gate=True))
    with torch.no_grad():
        mixer.gate.weight.zero_()
        mixer.gate.bias.fill_(20.0)
    x_BTD = laws.tokens(mixer, 1)
    z_BHF, truth_BHF = mixer(x_BTD)[1].z_BHF, laws.loop_of(mixer, DOUBLE)(x_BTD.double())[1].z_BHF
    assert laws.size(truth_BHF) > 1e-10
    assert laws.distance(z_BHF, truth_BHF) < 1e-5 * laws.size(truth_BHF)


def test_rfa_starts_as_published_and_stays_so_in_a_model() -> None:
    from holdall.model import ModelConfig

    layer = holdall.describe("rfa").configure(width=WIDTH)
    model = ModelConfig(vocab=8, width=WIDTH, layers=(layer,)).build()
    bound = (2**-0.5) * (6 / (2 * WIDTH)) ** 0.5
    for mixer in (layer.build(), model.blocks[0].mixer):
        assert 0.9 * bound < laws.size(mixer.qkv.weight) <= bound
        assert (mixer.sigma_HK == 1).all()
        assert (mixer.out_proj.bias == 0).all()


# ------------------------------------------------------------------------------------------------ cosformer


@pytest.mark.claim("mixers/cosformer.py", "beyond M")
@pytest.mark.parametrize("max_length", [LENGTH, 20])
@torch.no_grad()
def test_cosformer_is_its_formula(max_length: int) -> None:
    """In the cosine of the distance; positions beyond max_length stay there."""
    mixer = built("cosformer", max_length=max_length, chunk=16)
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = per_head(mixer, x_BTD)
    place = torch.arange(1, LENGTH + 1, dtype=DOUBLE).clamp(max=max_length)
    weight = (q.relu() @ k.relu().mT * torch.cos(torch.pi / 2 * (place[:, None] - place) / max_length)).tril()
    want_BTD = mixed(mixer, weight, v, weight.sum(-1, keepdim=True).clamp(min=1e-6))
    laws.assert_close("output", mixer(x_BTD)[0], want_BTD)


@pytest.mark.claim("mixers/cosformer.py", "beyond M")
@torch.no_grad()
def test_far_beyond_its_length_cosformer_still_averages_values() -> None:
    """Were distances beyond max_length weighed by their cosine, divisors would cross zero."""
    mixer = holdall.build("cosformer", width=WIDTH, max_length=20)
    x_BTD = laws.tokens(mixer, 3000)
    v_BTD = mixer.qkv(x_BTD)[..., -WIDTH:]
    mixer.out_proj.weight.copy_(torch.eye(WIDTH))
    mixer.out_proj.bias.zero_()
    assert laws.size(mixer(x_BTD)[0]) <= laws.size(v_BTD) * 1.001


# -------------------------------------------------------------------------------------------------- rebased


@pytest.mark.claim("mixers/rebased.py", "Weights")
@torch.no_grad()
def test_rebased_is_its_formula() -> None:
    """Norms are over both heads at once, squares over all pairs."""
    mixer = built("rebased", heads=HEADS, feature_dim=5, chunk=16)
    assert isinstance(mixer, Rebased)
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = mixer.qkv(x_BTD).split([10, 10, WIDTH], dim=-1)

    def normed(u: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
        u = (u - u.mean(-1, keepdim=True)) / (u.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return (u * norm.weight + norm.bias).unflatten(-1, (HEADS, 5)).transpose(1, 2)

    a = ((normed(q, mixer.ln_q) @ normed(k, mixer.ln_k).mT) ** 2 / 5).tril()
    v = v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    laws.assert_close("output", mixer(x_BTD)[0], mixed(mixer, a, v, a.sum(-1, keepdim=True) + 1e-12))


def test_rebaseds_state_is_the_symmetric_half() -> None:
    assert holdall.build("rebased", width=64).state_elements(1) == 136 * 65


# ---------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("performer", {"heads": 3}, "not a multiple"),
        ("performer", {"features": -1}, "features = -1"),
        ("performer", {"chunk": 0}, "chunk = 0"),
        ("hedgehog", {"heads": 3}, "not a multiple"),
        ("hedgehog", {"feature_dim": -1}, "feature_dim = -1"),
        ("rfa", {"heads": 3}, "not a multiple"),
        ("rfa", {"frequencies": 0}, "frequencies = 0"),
        ("rfa", {"tau": 0.0}, "tau = 0.0"),
        ("rfa", {"floor": -1.0}, "floor = -1.0"),
        ("cosformer", {"heads": 3}, "not a multiple"),
        ("cosformer", {"max_length": 0}, "max_length = 0"),
        ("rebased", {"heads": 3}, "not a multiple"),
        ("rebased", {"feature_dim": 0}, "feature_dim = 0"),
    ],
)
def test_configs_that_do_not_fit_say_so(name: str, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        holdall.describe(name).configure(width=WIDTH, **options)
