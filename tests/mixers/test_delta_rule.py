"""DeltaNet, Gated DeltaNet, Kimi Delta Attention, RWKV-7: where they start, and what their options mean.

Letters: B row, T time, D width, H heads, K key dim, V value dim.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import holdall
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.mixers.kimi_delta_attention import KimiDeltaConfig
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.ops.delta_rule import unit_length
from holdall.testing import laws

DOUBLE = torch.float64
NAMES = ["delta-net", "gated-delta-net", "kimi-delta-attention", "rwkv-7"]


def mixer_of(name: str, **options: Any):
    return laws.build(holdall.describe(name).configure(width=16, **options)).double()


# -------------------------------------------------------------------------------------------- the delta rule


@pytest.mark.parametrize("negative_eigenvalues", [False, True])
@torch.no_grad()
def test_delta_net_replaces_what_a_key_held(negative_eigenvalues: bool) -> None:
    """With beta at its end, what is then held under the key is the value, or the mirror of what was held."""
    mixer = mixer_of("delta-net", heads=1, kernel=0, negative_eigenvalues=negative_eigenvalues)
    x_BTD = laws.tokens(mixer, 9)
    before = mixer(x_BTD[:, :8])[1].s_BHKV[:, 0]
    # one more token with a beta of 1, or 2, to the last digit
    mixer.beta_proj.weight.copy_(1e4 * x_BTD[:1, 8])
    x_BTD[1, 8] = x_BTD[0, 8]
    _, state = mixer(x_BTD[:, 8:], mixer(x_BTD[:, :8])[1]._replace(s_BHKV=before[:, None]))
    _, k_BD, v_BD = F.silu(mixer.qkv(x_BTD[:, 8])).chunk(3, dim=-1)
    k_BD = unit_length(k_BD, eps=0.0)
    held_BV, was_BV = (torch.einsum("bkv,bk->bv", s, k_BD) for s in (state.s_BHKV[:, 0], before))
    want_BV = 2 * v_BD - was_BV if negative_eigenvalues else v_BD
    laws.assert_close(
        "held", held_BV, want_BV, 1e-4 * laws.size(want_BV)
    )  # keys are 1e-6 short of unit length


@torch.no_grad()
def test_keys_of_elu1_sum_to_one() -> None:
    """From nothing, with one token, the state is beta k v^T: its sum over the key dimensions is beta v."""
    mixer = mixer_of("delta-net", key_map="elu1", kernel=0)
    x_BTD = laws.tokens(mixer, 1)
    _, state = mixer(x_BTD)
    v_BHV = F.silu(mixer.qkv(x_BTD[:, 0])).chunk(3, dim=-1)[2].unflatten(-1, (2, -1))
    beta_BH = mixer.beta_proj(x_BTD[:, 0]).sigmoid()
    laws.assert_close("sum", state.s_BHKV.sum(2), beta_BH[..., None] * v_BHV)


@pytest.mark.parametrize(("name", "dims"), [("gated-delta-net", 1), ("kimi-delta-attention", 8)])
@torch.no_grad()
def test_what_is_forgotten_is_gone_before_the_key_is_read(name: str, dims: int) -> None:
    """A decay that underflows leaves beta k v^T, as from nothing: what was held is not even corrected."""
    mixer = mixer_of(name, kernel=2)
    x_BTD = laws.tokens(mixer, 5)
    _, state = mixer(x_BTD[:, :4])
    start = state._replace(s_BHKV=torch.zeros_like(state.s_BHKV))
    dt_bias = mixer.dt_bias_HK if dims > 1 else mixer.dt_bias
    kept = mixer(x_BTD[:, 4:], state)[1].s_BHKV
    dt_bias += 1e6
    forgot = mixer(x_BTD[:, 4:], state)[1].s_BHKV
    laws.assert_close("all forgotten", forgot, mixer(x_BTD[:, 4:], start)[1].s_BHKV)
    assert laws.distance(kept, forgot) > 1e-2 * laws.size(kept)


@torch.no_grad()
def test_value_heads_share_the_keys_of_a_head() -> None:
    """With equal decays, betas and values, value heads of one head hold the same, those of others do not."""
    mixer = mixer_of("gated-delta-net", value_heads=4, value_ratio=1)
    for parameter in (mixer.A_log, mixer.dt_bias):
        parameter.fill_(parameter[0].item())
    ab, v = mixer.ab_proj.weight.view(2, 4, -1), mixer.qkv.weight[32:].view(4, 8, -1)
    taps = mixer.conv_weight_EW[32:].view(4, 8, -1)
    for rows, dim in ((ab, 1), (v, 0), (taps, 0)):
        rows.copy_(rows.narrow(dim, 0, 1).expand_as(rows))
    s_BHKV = mixer(laws.tokens(mixer, 20))[1].s_BHKV
    laws.assert_close("same head", s_BHKV[:, 1::2], s_BHKV[:, 0::2])
    assert laws.distance(s_BHKV[:, 0], s_BHKV[:, 2]) > 1e-2 * laws.size(s_BHKV)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["loop", "parallel"])
def test_tokens_of_zeros_have_finite_gradients(name: str, form: str) -> None:
    """Their keys have no direction and their outputs no size."""
    mixer = laws.twin(mixer_of(name), form=form)
    x_BTD = torch.zeros(2, 20, 16, dtype=DOUBLE, requires_grad=True)
    y_BTD, state = mixer(x_BTD)
    wanted = [x_BTD, *mixer.parameters()]
    for grad in torch.autograd.grad(y_BTD.sum() + state.s_BHKV.sum(), wanted, allow_unused=True):
        assert grad is None or grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------- starts


def assert_between(tensor: Tensor, low: float, high: float) -> None:
    """All of it is, and it comes near both ends."""
    margin = 0.05 * (high - low)
    assert low - 1e-6 <= tensor.min() < low + margin
    assert high - margin < tensor.max() <= high + 1e-6


@pytest.mark.claim("mixers/gated_delta_net.py", "exp(A_log) is drawn")
@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (GatedDeltaNetConfig(width=1024, heads=256), (1e-4, 16)),
        (KimiDeltaConfig(width=1024, heads=256), (1, 16)),
    ],
)
def test_decays_start_from_the_published_numbers(config: Any, rate: tuple[float, float]) -> None:
    torch.manual_seed(0)
    mixer = config.build()
    assert_between(mixer.A_log.exp(), *rate)
    dt_bias = mixer.dt_bias if isinstance(config, GatedDeltaNetConfig) else mixer.dt_bias_HK
    assert dt_bias.numel() == (256 if isinstance(config, GatedDeltaNetConfig) else 1024)
    dt = F.softplus(dt_bias)
    assert_between(dt.log10(), -3, -1)
    assert abs(dt.log10().mean() + 2) < 0.1  # log-uniform


@pytest.mark.claim("mixers/delta_net.py", "convolutions start")
@pytest.mark.claim("mixers/gated_delta_net.py", "convolutions start")
@pytest.mark.claim("mixers/kimi_delta_attention.py", "convolutions start")
@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize("kernel", [2, 4])
def test_convolutions_start_as_torchs_do(name: str, kernel: int) -> None:
    torch.manual_seed(0)
    mixer = holdall.describe(name).configure(width=128, kernel=kernel).build()
    assert_between(mixer.conv_weight_EW, -(kernel**-0.5), kernel**-0.5)


def test_rwkv_7_starts_from_the_published_numbers() -> None:
    torch.manual_seed(0)
    first, second, last = (RWKV7Config(width=128, heads=2, layer=i, layers=4).build() for i in (0, 1, 3))
    for mixer, power, scale in ((first, 1.0, 1.0), (second, 1.71922, 0.75), (last, 2.0, 0.25)):
        n = torch.arange(128) / 127
        z = ((torch.arange(128) % 64) - 31.5) / 31.5
        z = z * z.abs()
        laws.assert_close("w0", mixer.w0.detach(), -6 + 6 * n**power + 0.5 + 2.5 * z, 1e-5)
        laws.assert_close("a0", mixer.a0.detach(), -0.19 + 0.3 * z + 0.4 * (n - 0.5), 1e-5)
        laws.assert_close("k_k", mixer.k_k.detach(), 0.71 - 0.1 * (n - 0.5), 1e-5)
        for row, factor in zip(mixer.mix_ZD, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            want = 1 - (torch.arange(128) / 128) ** (factor * scale)
            laws.assert_close("mix", row.detach(), want, 1e-5)
    assert (first.k_a == 1.02).all()
    assert (first.r_k == -0.04).all()
    assert first.norm_weight_D[0].item() == pytest.approx(0.25**0.7)
    assert last.norm_weight_D[0].item() == 1
    for layer, gain in ((first.receptance, 0.5), (first.key, 0.05), (first.value, 0.5)):
        assert_between(layer.weight, -gain * 128**-0.5, gain * 128**-0.5)
    for zero in (first.out_proj.weight, first.norm_bias_D, first.w1, first.a1, first.g1):
        assert not zero.any()
    assert [first.w1.shape[1], first.a1.shape[1], first.g1.shape[1]] == [32, 32, 64]
    for up_RD in (first.w2, first.a2, first.g2):
        laws.assert_close("orthogonal", up_RD @ up_RD.T, 0.01 * torch.eye(up_RD.shape[0]), 1e-6)
    wide_RD = RWKV7Config(width=16).build().w2  # of 32 rows, more than channels
    laws.assert_close("orthogonal", wide_RD.T @ wide_RD, 0.02 * torch.eye(16), 1e-6)
    assert RWKV7Config(width=768, heads=12).ranks == (64, 64, 128)
    torch.manual_seed(0)
    mixing = RWKV7Config(width=128, heads=2, layer=1, layers=4, value_rank=32).build()
    laws.assert_close("v0", mixing.v0.detach(), 0.73 - 0.4 * (torch.arange(128) / 127 - 0.5), 1e-5)
    assert not mixing.v1.any()
    laws.assert_close("orthogonal", mixing.v2 @ mixing.v2.T, 0.01 * torch.eye(32), 1e-6)
    torch.manual_seed(0)
    without = RWKV7Config(width=128, heads=2, layer=1, layers=4).build()
    for name, weight in without.named_parameters():  # drawn first, so that a seed gives the same as before
        assert torch.equal(weight, mixing.get_parameter(name)), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"heads": 3}, {"heads": 0}, {"chunk": 0}], ids=str)
def test_configs_that_do_not_fit_are_refused(name: str, options: dict[str, int]) -> None:
    ((field, value),) = options.items()
    with pytest.raises(ValueError, match=f"{field}( =)? {value}"):
        holdall.describe(name).configure(width=16, **options)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("delta-net", {"kernel": 1}, "kernel = 1"),
        ("gated-delta-net", {"kernel": 1}, "kernel = 1"),
        ("gated-delta-net", {"value_heads": 3}, "value_heads 3"),
        ("gated-delta-net", {"value_ratio": 0}, "value_ratio = 0"),
        ("gated-delta-net", {"head_dim": -1}, "head_dim"),
        ("kimi-delta-attention", {"kernel": 1}, "kernel = 1"),
        ("kimi-delta-attention", {"head_dim": -1}, "head_dim"),
        ("kimi-delta-attention", {"chunk": 17}, "chunk = 17"),
        ("rwkv-7", {"chunk": 17}, "chunk = 17"),
        ("rwkv-7", {"heads": 16}, "heads 16"),
        ("rwkv-7", {"decay_rank": -1}, "decay_rank = -1"),
        ("rwkv-7", {"value_rank": -1}, "value_rank = -1"),
        ("rwkv-7", {"eps": 0.0}, "eps = 0.0"),
        ("rwkv-7", {"key_eps": -1e-6}, "key_eps = -1e-06"),
        ("rwkv-7", {"layer": 2, "layers": 2}, "layer 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        holdall.describe(name).configure(width=16, **options)


def test_without_a_convolution_no_inputs_are_kept() -> None:
    config = DeltaNetConfig(width=16, kernel=0)
    assert config.build().state_elements(100) == 16 * 16 // 2
    assert DeltaNetConfig(width=16).build().state_elements(100) == 16 * 16 // 2 + 3 * 3 * 16
