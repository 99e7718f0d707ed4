"""Prefix linear attention: its formula over all pairs, every cut after the prefix, and what a prefix is.

Letters: B row, T and S time, D width, H heads, K key dim, F features, V value dim.
"""

from dataclasses import replace

import pytest
import torch

from holdall.contract import join_rows, map_state
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttention, PrefixLinearAttentionConfig
from holdall.ops.begun import begun
from holdall.ops.linear_attention import FEATURE_MAPS, absorb_loop
from holdall.testing import laws

E = 12
CONFIG = PrefixLinearAttentionConfig(width=16, prefix=E, feature_dim=4, heads=2, chunk=8)
LOOP = replace(CONFIG, form="loop")
both_forms = pytest.mark.parametrize("config", [LOOP, CONFIG], ids=["loop", "parallel"])


def mixer_of(config: PrefixLinearAttentionConfig) -> PrefixLinearAttention:
    return laws.build(config).double()


@pytest.mark.parametrize("feature_map", ["taylor", "elu1"])
@pytest.mark.parametrize("length", [5, E, E + 1, 40])
@both_forms
def test_every_token_sees_the_prefix_beside_its_past(
    config: PrefixLinearAttentionConfig, length: int, feature_map: str
) -> None:
    mixer, phi = mixer_of(replace(config, feature_map=feature_map)), FEATURE_MAPS[feature_map].features
    x_BTD = laws.tokens(mixer, length)
    y_BTD, state = mixer(x_BTD)

    parts = (
        *mixer.qkv(x_BTD).split([8, 8, 16], dim=-1),
        *mixer.prefix_kv(x_BTD[:, :E]).split([8, 16], dim=-1),
    )
    q, k, v, prefix_k, prefix_v = (u.unflatten(-1, (2, -1)).transpose(1, 2) for u in parts)
    past_BHTS = (phi(q) @ phi(k).mT).tril()
    prefix_BHTE = phi(q) @ phi(prefix_k).mT
    total_BHT1 = past_BHTS.sum(-1, keepdim=True) + prefix_BHTE.sum(-1, keepdim=True)
    y_BHTV = (past_BHTS @ v + prefix_BHTE @ prefix_v) / total_BHT1
    laws.assert_close("output", y_BTD, mixer.out_proj(y_BHTV.transpose(1, 2).flatten(2)))
    laws.assert_close("s", state.s_BHFV, phi(k).mT @ v + phi(prefix_k).mT @ prefix_v)
    laws.assert_close("z", state.z_BHF, phi(k).sum(2) + phi(prefix_k).sum(2))


@both_forms
@torch.no_grad()
def test_any_split_after_the_prefix_gives_the_whole(config: PrefixLinearAttentionConfig) -> None:
    mixer = mixer_of(config)
    x_BTD = laws.tokens(mixer, 70)
    want = laws.named(*mixer(x_BTD))
    for sizes in ((E, 70 - E), (E, 1, 57), (E, *[1] * 58), (20, 50), (13, 20, 37), (69, 1)):
        got = laws.named(*laws.read_in_pieces(mixer, x_BTD, sizes))
        for name, tensor in want.items():
            laws.assert_close(f"{name} in pieces of {sizes}", got[name], tensor)


@both_forms
@torch.no_grad()
def test_causal_after_the_prefix_and_not_inside(config: PrefixLinearAttentionConfig) -> None:
    mixer = mixer_of(config)
    x_BTD = laws.tokens(mixer, 40)
    y_BTD, _ = mixer(x_BTD)
    for first in range(1, 40):
        other_BTD = x_BTD.clone()
        other_BTD[:, first] += 1
        change_BT = (mixer(other_BTD)[0] - y_BTD).abs().amax(-1)
        assert (change_BT[:, first:] > 1e-6).all(), f"token {first} is not seen by all after it"
        if first < E:
            assert (change_BT[:, :first] > 1e-6).all(), f"token {first} is not seen by all of the prefix"
        else:
            assert change_BT[:, :first].max() < 1e-12, f"token {first} is seen before it"


@pytest.mark.parametrize("first", [1, 5])
@both_forms
@torch.no_grad()
def test_a_first_call_shorter_than_the_prefix_ends_it(
    config: PrefixLinearAttentionConfig, first: int
) -> None:
    """As if the prefix had that length: nothing that comes later is read without direction."""
    x_BTD = laws.tokens(mixer_of(config), 30)
    y_BTD, state = laws.read_in_pieces(mixer_of(config), x_BTD, (first, 3, 27 - first))
    want_BTD, end = mixer_of(replace(config, prefix=first))(x_BTD)
    laws.assert_close("output", y_BTD, want_BTD)
    for name, tensor in laws.named(want_BTD, end).items():
        laws.assert_close(name, laws.named(y_BTD, state)[name], tensor)


@pytest.mark.claim("mixers/prefix_linear_attention.py", "rows of different lengths")
@both_forms
@torch.no_grad()
def test_rows_that_start_beside_rows_that_go_on(config: PrefixLinearAttentionConfig) -> None:
    """Each row knows whether it had its prefix."""
    mixer = mixer_of(config)
    x_BTD = laws.tokens(mixer, 30)
    _, begun = mixer(x_BTD[:1, :9])
    joined = join_rows([begun, mixer.init_state(1, dtype=torch.float64)])
    y_BTD, _ = mixer(torch.stack((x_BTD[0, 9:], x_BTD[1, :21])), joined)
    laws.assert_close("the row that goes on", y_BTD[:1], mixer(x_BTD[:1, 9:], begun)[0])
    laws.assert_close("the row that starts", y_BTD[1:], mixer(x_BTD[1:, :21])[0])


@both_forms
@torch.no_grad()
def test_rows_that_are_promised_to_have_begun_read_no_prefix(config: PrefixLinearAttentionConfig) -> None:
    """The same bits, from three projections instead of five; without a state the promise says nothing."""
    mixer = mixer_of(config)
    x_BTD, read = laws.tokens(mixer, 30), list[int]()
    mixer.prefix_kv.register_forward_hook(lambda *call: read.append(1))
    _, state = mixer(x_BTD[:, :9])
    want = laws.named(*mixer(x_BTD[:, 9:], state))
    assert read == [1, 1]
    with begun():
        got = laws.named(*mixer(x_BTD[:, 9:], state))
        assert read == [1, 1]
        for name, tensor in want.items():
            laws.assert_bitwise(name, got[name], tensor)
        mixer(x_BTD)
    assert read == [1, 1, 1]


@pytest.mark.parametrize("length", [5, E, 40])
@pytest.mark.parametrize("feature_map", ["taylor", "elu1"])
@both_forms
@torch.no_grad()
def test_the_whole_is_the_prefix_without_queries_and_then_the_row_causally(
    config: PrefixLinearAttentionConfig, feature_map: str, length: int
) -> None:
    """How it is prefilled: the sums of the prefix are a state, from which the whole row is read causally."""
    mixer = mixer_of(replace(config, feature_map=feature_map))
    x_BTD = laws.tokens(mixer, length)
    k, v = (u.unflatten(-1, (2, -1)) for u in mixer.prefix_kv(x_BTD[:, :E]).split([8, 16], dim=-1))
    start = mixer.init_state(2, dtype=torch.float64)
    sums = absorb_loop(k, v, *start[:2], feature_map=FEATURE_MAPS[feature_map])
    with begun():  # the prefix is in the sums, and no row is to read it again
        got = laws.named(*mixer(x_BTD, start._replace(s_BHFV=sums[0], z_BHF=sums[1])))
    for name, tensor in laws.named(*mixer(x_BTD)).items():
        laws.assert_close(name, got[name], tensor)


@torch.no_grad()
def test_after_the_prefix_it_is_linear_attention() -> None:
    """The same queries, keys and values continue from the same sums: there is one state."""
    mixer = mixer_of(replace(CONFIG, feature_map="elu1"))
    plain = LinearAttentionConfig(width=16, feature_map="elu1", feature_dim=4, heads=2).build().double()
    plain.load_state_dict({n: w for n, w in mixer.state_dict().items() if not n.startswith("prefix_kv")})
    x_BTD = laws.tokens(mixer, 40)
    _, state = mixer(x_BTD[:, :20])
    y_BTD, end = mixer(x_BTD[:, 20:], state)
    want_BTD, want = plain(x_BTD[:, 20:], map_state(state, torch.clone)[:2])
    laws.assert_close("output", y_BTD, want_BTD)
    laws.assert_close("s", end.s_BHFV, want.s_BHFV)
    laws.assert_close("z", end.z_BHF, want.z_BHF)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"prefix": 0}, "prefix = 0"), ({"heads": 3}, "not a multiple of heads 3"), ({"chunk": 0}, "chunk = 0")],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixLinearAttentionConfig(width=16, **options)
