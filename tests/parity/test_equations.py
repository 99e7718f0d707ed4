"""Official implementations that no package offers: their equations once more, short and in fp64.

Each reference is written from what the official code computes, in loops over tokens where that is short, with
its quirks, and shares nothing with the mixers but the weights.

Letters: B row, T and S time, D width, H heads, K key dim, V value dim, F features, L taps, N modes, P pairs.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Mixer
from holdall.contract.forms import KernelError
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.cosformer import CosformerConfig
from holdall.mixers.hyena import HyenaConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.long_conv import LongConvConfig
from holdall.mixers.monarch_mixer import MonarchMixerConfig
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.testing import laws

DOUBLE = torch.float64
WIDTH, HEADS, LENGTH = 12, 2, 20
FORMS = pytest.mark.parametrize("form", ["loop", "parallel"])


def built(config) -> Mixer:
    return laws.build(config).double()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def per_head(u_BTE: Tensor, heads: int = HEADS) -> Tensor:
    """(B, H, T, K)."""
    return u_BTE.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(u_BHTV: Tensor) -> Tensor:
    return u_BHTV.transpose(1, 2).flatten(2)


def depthwise(x_BTD: Tensor, weight_DW: Tensor, bias_D: Tensor | float = 0.0) -> Tensor:
    """torch's Conv1d with zeros in front, whose last tap multiplies the token itself."""
    padded_BDT = F.pad(x_BTD.mT, (weight_DW.shape[1] - 1, 0))
    return F.conv1d(padded_BDT, weight_DW[:, None], groups=len(weight_DW)).mT + bias_D


def causal(filter_LD: Tensor, x_BTD: Tensor) -> Tensor:
    return torch.stack(
        [(filter_LD[: t + 1].flip(0) * x_BTD[:, : t + 1]).sum(1) for t in range(x_BTD.shape[1])], dim=1
    )


# ------------------------------------------------------------------------------------- attention


def softmax_attention(mixer: Mixer, x_BTD: Tensor, past: int, hidden: float) -> Tensor:
    """Token t sees itself and `past` tokens before; `hidden` is added to the scores of all others.

    The halves of the `rotary` dimensions of a head make pairs, turned by t 10000^(-2i / dimensions).
    """
    q, k, v = (per_head(u, mixer.config.heads) for u in linear(mixer.project.qkv, x_BTD).chunk(3, dim=-1))
    dims = int(mixer.config.rotary * q.shape[-1])
    turned = [q.clone(), k.clone()]
    for t in range(x_BTD.shape[1]):
        for i in range(dims // 2):
            cos, sin = (f(t * 10000 ** (-2 * i / dims)) for f in (math.cos, math.sin))
            for u, into in zip((q, k), turned, strict=True):
                one, two = u[:, :, t, i], u[:, :, t, i + dims // 2]
                into[:, :, t, i] = one * cos - two * sin
                into[:, :, t, i + dims // 2] = two * cos + one * sin
    lag_TT = torch.arange(x_BTD.shape[1])[:, None] - torch.arange(x_BTD.shape[1])
    bias_TT = torch.where((lag_TT < 0) | (lag_TT > past), hidden, 0.0)
    score_BHTS = turned[0] @ turned[1].mT / q.shape[-1] ** 0.5 + bias_TT
    return linear(mixer.out_proj, joined(score_BHTS.softmax(-1) @ v))


@pytest.mark.claim("mixers/attention.py", "Weights", "Deviations: none")
@pytest.mark.parametrize("form", ["loop", "blockwise", "parallel"])
@pytest.mark.parametrize(("rotary", "bias", "hidden"), [(0.0, True, -1e4), (0.5, False, -math.inf)])
@torch.no_grad()
def test_attention_is_zoologys_and_flash_attentions(
    rotary: float, bias: bool, hidden: float, form: str
) -> None:
    mixer = built(AttentionConfig(width=32, heads=HEADS, rotary=rotary, bias=bias, block=8, form=form))
    x_BTD = laws.tokens(mixer, LENGTH)
    laws.assert_close("y", mixer(x_BTD)[0], softmax_attention(mixer, x_BTD, LENGTH, hidden))


@pytest.mark.claim("mixers/sliding_window.py", "Zoology's SlidingAttn", "Based's SlidingAttention")
@pytest.mark.claim("mixers/sliding_window.py", "Deviations: none")
@pytest.mark.parametrize(
    ("options", "past", "hidden"),
    [
        ({"window": 5 + 1}, 5, -1e4),  # Zoology's block_size 5: as many past tokens, and the token itself
        ({"window": 8 // 2 + 1, "heads": 2, "rotary": 1.0, "bias": False}, 8 // 2, -math.inf),  # Based's 8
    ],
    ids=["zoology", "based"],
)
@FORMS
@torch.no_grad()
def test_the_windows_of_zoology_and_based(options: dict, past: int, hidden: float, form: str) -> None:
    mixer = built(SlidingWindowConfig(width=16, form=form, **options))
    x_BTD = laws.tokens(mixer, LENGTH)
    laws.assert_close("y", mixer(x_BTD)[0], softmax_attention(mixer, x_BTD, past, hidden))


# ------------------------------------------------------------------------------------- linear attention


def summed(q_BHTF: Tensor, k_BHTF: Tensor, v_BHTV: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of linear attention token by token, and its two sums at the end."""
    s_BHFV, z_BHF = 0, 0
    ys = []
    for q, k, v in zip(q_BHTF.unbind(2), k_BHTF.unbind(2), v_BHTV.unbind(2), strict=True):
        s_BHFV, z_BHF = s_BHFV + k[..., None] * v[..., None, :], z_BHF + k
        ys.append((q[..., None] * s_BHFV).sum(2) / ((q * z_BHF).sum(-1) + eps)[..., None])
    return torch.stack(ys, dim=2), s_BHFV, z_BHF


def elu_plus_one(u: Tensor) -> Tensor:
    return F.elu(u) + 1


def squared(u: Tensor) -> Tensor:
    return u**2 / 2**0.5


@pytest.mark.claim("mixers/linear_attention.py", "fast-transformers'", "Zoology's proj_q")
@pytest.mark.parametrize(
    ("phi", "options"),
    [
        (elu_plus_one, {"feature_map": "elu1", "bias": True, "eps": 1e-6}),  # fast-transformers
        (elu_plus_one, {"feature_map": "elu1"}),  # Zoology
        (squared, {"feature_map": "square"}),
    ],
)
@FORMS
@torch.no_grad()
def test_linear_attention_is_fast_transformers_and_zoologys(phi, options: dict, form: str) -> None:
    config = LinearAttentionConfig(width=WIDTH, heads=HEADS, feature_dim=5, chunk=8, form=form, **options)
    mixer = built(config)
    mixer.qkv.weight[:20] *= 0.01  # features so small that the squares' eps shows
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = (per_head(u) for u in linear(mixer.qkv, x_BTD).split([10, 10, WIDTH], dim=-1))
    y_BHTV, s_BHFV, z_BHF = summed(phi(q), phi(k), v, 1e-6 if config.bias else 1e-12)
    y_BTD, state = mixer(x_BTD)
    laws.assert_close("y", y_BTD, linear(mixer.out_proj, joined(y_BHTV)))
    laws.assert_close("s", state.s_BHFV, s_BHFV)
    laws.assert_close("z", state.z_BHF, z_BHF)


@pytest.mark.claim("mixers/linear_attention.py", "both always normalise")
@torch.no_grad()
def test_the_identitys_normaliser_changes_its_sign() -> None:
    """Outputs then are no averages of the values, and may be of any size."""
    for feature_map, sound in (("elu1", True), ("identity", False)):
        mixer = built(LinearAttentionConfig(width=WIDTH, feature_map=feature_map))
        mixer.out_proj.weight.copy_(torch.eye(WIDTH))
        x_BTD = laws.tokens(mixer, 300)
        largest_value = laws.size(mixer.qkv(x_BTD)[..., -WIDTH:])
        assert (laws.size(mixer(x_BTD)[0]) <= largest_value) == sound
        assert (laws.size(mixer(x_BTD)[0]) > 10 * largest_value) != sound


@pytest.mark.claim("mixers/taylor.py", "Weights", "the map keeps the symmetric half")
@pytest.mark.claim("mixers/prefix_linear_attention.py", "the Taylor map keeps")
@FORMS
@torch.no_grad()
def test_the_symmetric_half_gives_the_outputs_of_the_whole_outer_product(form: str) -> None:
    mixer = built(TaylorConfig(width=WIDTH, heads=HEADS, feature_dim=16, chunk=8, form=form))
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = (per_head(u) for u in linear(mixer.qkv, x_BTD).split([32, 32, WIDTH], dim=-1))

    def phi(u: Tensor) -> Tensor:
        outer = (u[..., None] * u[..., None, :]).flatten(-2)
        return torch.cat((u[..., :1] ** 0, u / 16**0.25, outer / (2**0.5 * 16**0.5)), dim=-1)

    y_BHTV, whole_BHFV, _ = summed(phi(q), phi(k), v, 1e-12)
    y_BTD, state = mixer(x_BTD)
    laws.assert_close("y", y_BTD, linear(mixer.out_proj, joined(y_BHTV)))
    assert (whole_BHFV.shape[2], state.s_BHFV.shape[2]) == (273, 153)


@pytest.mark.parametrize("replay", [0, 2])
@FORMS
@torch.no_grad()
def test_taylors_decay_is_that_of_values_alone(form: str, replay: int) -> None:
    """A = phi(q) . phi(k) gamma^(t - j) (W_d x_t) of all pairs, over the sum without the latter two."""
    options = {"feature_dim": 4, "decay": 1.5, "decay_proj": True, "replay": replay}
    mixer = built(TaylorConfig(width=WIDTH, heads=HEADS, chunk=8, form=form, **options))
    x_BTD = laws.tokens(mixer, LENGTH)
    q, k, v = (per_head(u) for u in linear(mixer.qkv, x_BTD).split([8, 8, WIDTH], dim=-1))
    s_BHTS, t_T = q @ k.mT / 2, torch.arange(LENGTH, dtype=DOUBLE)
    a_BHTS = (1 + s_BHTS + s_BHTS**2 / 2).tril()
    keep_H11 = (1 - 2.0 ** -(1.5 + torch.arange(HEADS, dtype=DOUBLE)))[:, None, None]
    decayed_BHTS = a_BHTS * keep_H11 ** (t_T[:, None] - t_T).clamp(min=0)
    y_BHTV = decayed_BHTS @ v / (a_BHTS.sum(-1, keepdim=True) + 1e-12)
    y_BHTV = y_BHTV * linear(mixer.decay_proj, x_BTD).mT[..., None]
    want_BTD = linear(mixer.out_proj, joined(y_BHTV))
    laws.assert_close("y", mixer(x_BTD)[0], want_BTD)
    laws.assert_close("y by tokens", laws.read_in_pieces(mixer, x_BTD, [1] * LENGTH)[0], want_BTD)


def test_what_taylors_decay_has_not_is_refused_by_name() -> None:
    config = TaylorConfig(width=WIDTH, decay=3.0)
    assert "decay = 3.0 forgets" in config.kernel_refusal(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(KernelError, match=r"decay = 3\.0 forgets"):
        TaylorConfig(width=WIDTH, decay=3.0, form="kernel").build()
    with pytest.raises(ValueError, match="state_dtype 'fp16' has no decay"):
        TaylorConfig(width=WIDTH, decay=3.0, replay=16, state_dtype="fp16")


@pytest.mark.claim("mixers/cosformer.py", "Weights", "in the official code M is")
@FORMS
@torch.no_grad()
def test_cosformer_is_the_official_one_at_max_length(form: str) -> None:
    mixer = built(CosformerConfig(width=WIDTH, heads=HEADS, max_length=LENGTH, chunk=8, form=form))

    def official(x_BTD: Tensor) -> Tensor:
        q, k, v = (per_head(u) for u in linear(mixer.qkv, x_BTD).chunk(3, dim=-1))
        theta_T1 = math.pi / 2 * torch.arange(1, x_BTD.shape[1] + 1, dtype=DOUBLE)[:, None] / x_BTD.shape[1]
        q, k = (torch.cat((u.relu() * theta_T1.sin(), u.relu() * theta_T1.cos()), dim=-1) for u in (q, k))
        a_BHTS = (q @ k.mT).tril()
        y_BHTV = a_BHTS @ v / a_BHTS.sum(-1, keepdim=True).clamp_min(1e-6)
        return linear(mixer.out_proj, joined(y_BHTV))

    x_BTD = laws.tokens(mixer, LENGTH)
    y_BTD, half = mixer(x_BTD)[0], LENGTH // 2
    laws.assert_close("y", y_BTD, official(x_BTD))
    laws.assert_close("y of the first half", mixer(x_BTD[:, :half])[0], y_BTD[:, :half])
    assert laws.distance(official(x_BTD[:, :half]), y_BTD[:, :half]) > 1e-3 * laws.size(y_BTD)


# ------------------------------------------------------------------------------------- retention, rwkv


@pytest.mark.claim("mixers/rwkv_7.py", "the epsilon of GroupNorm")
@FORMS
@torch.no_grad()
def test_rwkv_7_with_heads_of_another_size(form: str) -> None:
    """All of the official first layer but for the norm's epsilon, 1e-5 per dimension of a head."""
    mixer = built(RWKV7Config(width=16, heads=2, decay_rank=3, a_rank=5, form=form))
    mixer.value.weight *= 0.01  # outputs so small that the norm's epsilon shows
    x_BTD = laws.tokens(mixer, LENGTH)
    d_BTD = F.pad(x_BTD, (0, 0, 1, -1)) - x_BTD
    x_r, x_w, x_k, x_v, x_a, x_g = (x_BTD + d_BTD * mix_D for mix_D in mixer.mix_ZD)
    r, k, v = linear(mixer.receptance, x_r), linear(mixer.key, x_k), linear(mixer.value, x_v)
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.w0 + torch.tanh(x_w @ mixer.w1) @ mixer.w2))
    a = torch.sigmoid(mixer.a0 + x_a @ mixer.a1 @ mixer.a2)
    g = torch.sigmoid(x_g @ mixer.g1) @ mixer.g2
    kk = F.normalize((k * mixer.k_k).unflatten(-1, (2, 8)), dim=-1)
    r, w, k, v, a = (u.unflatten(-1, (2, 8)) for u in (r, w, k * (1 + (a - 1) * mixer.k_a), v, a))
    s_BHVK, ys = torch.zeros(2, 2, 8, 8, dtype=DOUBLE), []
    for t in range(LENGTH):
        read_BHV = torch.einsum("bhvk,bhk->bhv", s_BHVK, kk[:, t])
        s_BHVK = s_BHVK * w[:, t, :, None] - read_BHV[..., None] * (kk * a)[:, t, :, None]
        s_BHVK = s_BHVK + v[:, t, :, :, None] * k[:, t, :, None]
        o_BHV = torch.einsum("bhvk,bhk->bhv", s_BHVK, r[:, t])
        o_BD = F.group_norm(o_BHV.flatten(1), 2, mixer.norm_weight_D, mixer.norm_bias_D, eps=8 * 1e-5)
        bonus_BHV = (r[:, t] * k[:, t] * mixer.r_k.view(2, 8)).sum(-1, keepdim=True) * v[:, t]
        ys.append(o_BD + bonus_BHV.flatten(1))
    y_BTD, state = mixer(x_BTD)
    laws.assert_close("y", y_BTD, linear(mixer.out_proj, torch.stack(ys, dim=1) * g))
    laws.assert_close("state", state.s_BHKV.mT, s_BHVK)


# ------------------------------------------------------------------------------------- convolutions


def time_features(length: int, max_length: int, bands: int) -> Tensor:
    """[t / (L - 1), Re and Im of exp(-i f 2 pi t / L)] for `bands` frequencies f from 1e-4 to bands - 1."""
    rows = []
    for t in range(length):
        f_F = torch.linspace(1e-4, bands - 1, bands, dtype=DOUBLE)
        turn_F = torch.exp(-1j * f_F * 2 * math.pi * t / max_length)
        rows.append(torch.cat((torch.tensor([t / (max_length - 1)], dtype=DOUBLE), turn_F.real, turn_F.imag)))
    return torch.stack(rows)


@pytest.mark.claim("mixers/base_conv.py", "Zoology's BaseConv, short")
@pytest.mark.parametrize("activation", ["none", "silu"])
@FORMS
@torch.no_grad()
def test_base_conv_is_zoologys(activation: str, form: str) -> None:
    mixer = built(BaseConvConfig(width=WIDTH, kernel=4, activation=activation, form=form))
    x_BTD = laws.tokens(mixer, LENGTH)
    act = F.silu if activation == "silu" else torch.clone
    c_BTD = act(depthwise(x_BTD, mixer.weight_DW, mixer.bias_D))
    laws.assert_close("y", mixer(x_BTD)[0], c_BTD * act(linear(mixer.projection, x_BTD)) + x_BTD)


@pytest.mark.claim("mixers/base_conv.py", "Zoology's BaseConv, long", "beyond `max_length` L, where Zoology")
@pytest.mark.parametrize("max_length", [LENGTH + 9, LENGTH, LENGTH - 9])
@FORMS
@torch.no_grad()
def test_base_convs_long_filter_is_zoologys(max_length: int, form: str) -> None:
    config = BaseConvConfig(width=WIDTH, filter="long", max_length=max_length, hidden=5, form=form)
    mixer = built(config)
    x_BTD, z_LZ = laws.tokens(mixer, LENGTH), time_features(LENGTH, max_length, 1)
    filter_LD = linear(mixer.filter.fc2, linear(mixer.filter.fc1, z_LZ).relu())
    c_BTD = causal(filter_LD, x_BTD) + x_BTD
    laws.assert_close("y", mixer(x_BTD)[0], c_BTD * linear(mixer.projection, x_BTD) + x_BTD)


def hyena_filter(filter_: nn.Module, length: int, max_length: int, bands: int) -> Tensor:
    """Three layers, each followed by sin(freq * .), a last one without bias, and a window that falls."""
    h = z_LZ = time_features(length, max_length, bands)
    for layer in filter_.hidden:
        h = torch.sin(filter_.frequency_H * linear(layer, h))
    h_LE = linear(filter_.last, h)
    delta_E = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, h_LE.shape[1], dtype=DOUBLE)
    return h_LE * torch.exp(-z_LZ[:, :1] * delta_E.abs())


@pytest.mark.claim("mixers/hyena.py", "Weights", "beyond `max_length`")
@pytest.mark.parametrize("whose", ["safari", "zoology"])
@pytest.mark.parametrize("max_length", [LENGTH + 9, LENGTH - 9])
@FORMS
@torch.no_grad()
def test_hyena_of_order_2_is_safaris_and_zoologys(whose: str, max_length: int, form: str) -> None:
    mixer = built(HyenaConfig(width=WIDTH, max_length=max_length, bands=2, hidden=5, form=form))
    x_BTD = laws.tokens(mixer, LENGTH)
    blocks = [0, 1, 2] if whose == "safari" else [1, 0, 2]  # of Zoology's rows, in the order of ours
    theirs = [
        u.unflatten(0, (3, WIDTH))[blocks].flatten(0, 1)
        for u in (mixer.in_proj.weight, mixer.in_proj.bias, mixer.short_weight_UW, mixer.short_bias_U)
    ]
    u_BTU = depthwise(x_BTD @ theirs[0].T + theirs[1], theirs[2], theirs[3])
    if whose == "safari":
        after, before, v = u_BTU.chunk(3, dim=-1)
    else:
        before, after, v = u_BTU.chunk(3, dim=-1)
    v = v * before
    v = causal(hyena_filter(mixer.filter, LENGTH, max_length, 2), v) + mixer.skip_E * v
    laws.assert_close("y", mixer(x_BTD)[0], linear(mixer.out_proj, v * after))


@pytest.mark.claim("mixers/monarch_mixer.py", "Weights", "beyond `max_length`")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("max_length", [LENGTH + 9, LENGTH - 9])
@FORMS
@torch.no_grad()
def test_monarch_mixer_is_m2s(residual: bool, max_length: int, form: str) -> None:
    config = MonarchMixerConfig(
        width=WIDTH, max_length=max_length, bands=2, hidden=5, residual=residual, form=form
    )
    mixer = built(config)
    x_BTD = laws.tokens(mixer, LENGTH)
    u_BTU = depthwise(linear(mixer.in_proj, x_BTD), mixer.short_weight_UW, mixer.short_bias_U)
    x1, x2, v = u_BTU.chunk(3, dim=-1)
    v = v * x1
    y = (causal(hyena_filter(mixer.filter, LENGTH, max_length, 2), v) + mixer.skip_D * v) * x2
    if residual:
        filter_LD = hyena_filter(mixer.residual_filter, LENGTH, max_length, 2)
        y = y + causal(filter_LD, x_BTD) + mixer.residual_skip_D * x_BTD
    laws.assert_close("y", mixer(x_BTD)[0], linear(mixer.out_proj, y))


@pytest.mark.claim("mixers/hyena.py", "the features of time are fixed")
@pytest.mark.claim("mixers/monarch_mixer.py", "the features of time are fixed")
@pytest.mark.parametrize("config", [HyenaConfig, MonarchMixerConfig])
def test_filters_learn_layers_and_frequencies_only(config: type) -> None:
    filter_ = config(width=WIDTH).build().filter
    layers = [f"hidden.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert set(filter_.state_dict()) == {*layers, "last.weight", "frequency_H"}


@pytest.mark.claim("mixers/long_conv.py", "Weights", "Zoology's transform is")
@pytest.mark.parametrize("max_length", [LENGTH - 9, LENGTH + 1, LENGTH + 2, 3 * LENGTH])
@FORMS
@torch.no_grad()
def test_long_conv_is_zoologys_but_for_what_wraps_around(max_length: int, form: str) -> None:
    mixer = built(LongConvConfig(width=WIDTH, max_length=max_length, form=form))
    x_BTD = laws.tokens(mixer, LENGTH)
    filter_DL = mixer.filter_LD.T  # as Zoology holds it

    def zoologys(x_BTD: Tensor) -> Tensor:
        taps_DL = F.pad(filter_DL, (0, 2 * LENGTH))
        ys = [
            sum(taps_DL[:, (t - j) % (2 * LENGTH)] * x_BTD[:, j] for j in range(LENGTH))
            for t in range(LENGTH)
        ]
        return x_BTD + torch.stack(ys, dim=1)

    y_BTD = mixer(x_BTD)[0]
    if max_length <= LENGTH + 1:
        laws.assert_close("y", y_BTD, zoologys(x_BTD))
    else:
        assert laws.distance(y_BTD, zoologys(x_BTD)) > 1e-3
        later_BTD = x_BTD.clone()
        later_BTD[:, -1] += 1
        assert laws.distance(zoologys(later_BTD)[:, 0], zoologys(x_BTD)[:, 0]) > 1e-3
        laws.assert_close("first", mixer(later_BTD)[0][:, 0], y_BTD[:, 0])
