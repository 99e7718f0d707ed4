"""Mixing matrices: equal to hand-derived ones in fp64, of the right rank, and named for what they are."""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdall
from holdall import cli
from holdall.analysis import gallery
from holdall.analysis.matrix import (
    dependence,
    exact_matrices,
    explained,
    inputs,
    jacobian,
    matrix_of,
    mixing_matrix,
    ranks,
    toeplitz_distance,
)
from holdall.commands import guarded, sweeps
from holdall.commands import matrix as shown
from holdall.contract import Mixer, MixerConfig
from holdall.files import RunError
from holdall.ops import diagonal_scan, linear_attention, short_conv

N, D = 12, 8
EPS = 1e-12


def built(name: str, **options) -> Mixer:
    torch.manual_seed(1)
    return holdall.build(name, width=D, **options).double()


def matrices(mixer: Mixer, x_BTD: Tensor, shown: int = 99) -> Tensor:
    """All heads or channels of the mixer's matrix, which must be exact."""
    found = mixing_matrix(mixer, x_BTD, shown=shown)
    assert found.kind == "exact"
    assert found.error < EPS
    return torch.from_numpy(found.values_STJ)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=EPS * float(other.abs().max()))


@pytest.fixture(name="x_BTD")
def make_x() -> Tensor:
    return inputs("random", N, D, scale=2.0, seed=3).x_BTD


# ------------------------------------------------------------------------------- against definitions


def test_attention_s_matrix_is_its_softmax_weights(x_BTD):
    mixer = built("attention", heads=2)
    q, k, _ = mixer.project.qkv(x_BTD)[0].unflatten(-1, (3, 2, 4)).unbind(1)
    score_HTJ = torch.einsum("thk,jhk->htj", q, k) / 2
    future = torch.ones(N, N, dtype=torch.bool).triu(1)
    found = mixing_matrix(mixer, x_BTD, shown=2)
    same(torch.from_numpy(found.values_STJ), score_HTJ.masked_fill(future, -torch.inf).softmax(-1).detach())
    assert (found.unit, found.count, found.source, found.causal) == ("head", 2, "full_attention", True)


def test_a_convolution_s_matrix_is_the_toeplitz_matrix_of_its_taps(x_BTD):
    mixer = built("base-conv", kernel=3)
    matrix_DTJ = torch.zeros(D, N, N, dtype=torch.float64)
    for lag in range(3):
        for t in range(lag, N):
            matrix_DTJ[:, t, t - lag] = mixer.weight_DW[:, 2 - lag].detach()
    same(matrices(mixer, x_BTD), matrix_DTJ)
    found = mixing_matrix(mixer, x_BTD)
    assert (found.unit, found.count, found.is_toeplitz, found.rank) == ("channel", D, True, 2)
    # in each row but the first two only three of t + 1 entries are there
    assert found.sparsity == pytest.approx(sum(t + 1 - 3 for t in range(2, N)) / (N * (N + 1) / 2))


def test_a_long_filter_s_matrix_is_toeplitz_too(x_BTD):
    mixer = built("base-conv", filter="long", max_length=N)
    taps_LD = mixer.filter(N).detach()
    lag_TJ = torch.arange(N)[:, None] - torch.arange(N)
    same(matrices(mixer, x_BTD), torch.where(lag_TJ >= 0, taps_LD.T[:, lag_TJ.clamp(min=0)], 0.0))


def test_retnet_s_matrix_is_decayed_scores_of_turned_queries_and_keys(x_BTD):
    mixer = built("retnet", heads=2)
    q, k = mixer.qkvg(x_BTD)[0, :, : 2 * D].unflatten(-1, (2, 2, 2, 2)).unbind(1)  # (T, H, pairs, 2)
    q, k = (torch.view_as_complex(u.contiguous()) for u in (q, k))
    lag_TJ = (torch.arange(N)[:, None] - torch.arange(N)).double()
    turn_PTJ = torch.exp(1j * torch.tensor([1.0, 1e-4], dtype=torch.float64)[:, None, None] * lag_TJ)
    score_HTJ = torch.einsum("thp,jhp,ptj->htj", q, k.conj(), turn_PTJ).real / math.sqrt(4)
    gamma_H = torch.tensor([1 - 1 / 32, 1 - 1 / 64]).double()
    same(matrices(mixer, x_BTD), (score_HTJ * gamma_H[:, None, None] ** lag_TJ).tril().detach())


def test_mamba_s_matrix_is_semiseparable(x_BTD):
    mixer = built("mamba", state=3, expand=1)
    u_BTD = mixer.in_proj(x_BTD)[..., :D]
    u_BDT = F.conv1d(F.pad(u_BTD.mT, (3, 0)), mixer.conv_weight_EW[:, None], mixer.conv_bias_E, groups=D)
    dt, b, c = mixer.x_proj(F.silu(u_BDT.mT))[0].split([1, 3, 3], dim=-1)
    dt_TD, a_DN = F.softplus(mixer.dt_proj(dt)), -mixer.A_log.exp()
    expected_DTJ = torch.zeros(D, N, N, dtype=torch.float64)
    for t in range(N):
        for j in range(t + 1):
            decay_DN = torch.exp(dt_TD[j + 1 : t + 1].sum(0)[:, None] * a_DN)
            expected_DTJ[:, t, j] = (decay_DN * b[j] * c[t]).sum(-1) * dt_TD[j]
    same(matrices(mixer, x_BTD), expected_DTJ.detach())
    found = mixing_matrix(mixer, x_BTD)
    assert (found.rank, found.full_rank, found.beside) == (3, N // 2, ("short_conv",))


def test_normalised_weights_of_linear_attention_sum_to_one(x_BTD):
    weights_STJ = matrices(built("linear-attention", feature_map="elu1", feature_dim=3), x_BTD)
    same(weights_STJ.sum(-1), torch.ones(1, N, dtype=torch.float64))
    assert (weights_STJ >= 0).all()


@pytest.mark.parametrize(
    ("name", "options", "rank"),
    [
        ("linear-attention", {"feature_map": "elu1", "feature_dim": 3}, 3),
        ("linear-attention", {"feature_map": "elu1", "feature_dim": 3, "heads": 2}, 3),
        ("taylor", {"feature_dim": 3}, 10),  # 1 + 3 + 3 * 4 / 2 features
        ("sliding-window", {"window": 5}, 4),
        ("mamba", {"state": 2}, 2),
        ("attention", {}, 16),
    ],
)
def test_no_more_rank_than_state_passes_from_past_to_future(name, options, rank):
    found = mixing_matrix(built(name, **options), inputs("random", 32, D, scale=2.0).x_BTD)
    assert (found.rank, found.full_rank) == (rank, 16)
    assert 1 <= found.rank_1 <= rank


@pytest.mark.parametrize("name", holdall.names())
def test_every_mixer_has_a_matrix(name):
    entry = holdall.describe(name)
    found = matrix_of(entry.configure(width=32), length=16, shown=2)
    assert np.isfinite(found.values_STJ).all()
    assert found.values_STJ.shape == (min(2, found.count), 16, 16)
    assert found.error < 1e-9
    assert found.causal == entry.causal or not entry.causal
    assert found.kind == "jacobian" or found.source


# ------------------------------------------------------------------------------------ mixers of one's own


class Nothing(NamedTuple):
    empty_B0: Tensor


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MixerConfig):
    def build(self) -> Mixer:
        raise NotImplementedError


class Toy(Mixer):
    """A mixer that is one function of x_BTD."""

    def __init__(self, function) -> None:
        super().__init__(ToyConfig(width=D))
        self.function = function
        self.weight_DD = nn.Parameter(torch.randn(D, D, dtype=torch.float64))

    def forward(self, x_BTD, state=None, *, inplace=False, want_state=True):
        return self.function(self, x_BTD), None

    def init_state(self, batch, *, dtype, device=None):
        return Nothing(torch.zeros(batch, 0))

    def state_elements(self, context_len):
        return D


def tanh_of_sum(mixer: Toy, x_BTD: Tensor) -> Tensor:
    return torch.tanh(x_BTD.cumsum(1) @ mixer.weight_DD.T / 4)


def test_a_mixer_that_calls_no_op_gets_its_jacobian(x_BTD):
    torch.manual_seed(0)
    mixer = Toy(tanh_of_sum)
    found = mixing_matrix(mixer, x_BTD)
    slope_TD = 1 - tanh_of_sum(mixer, x_BTD)[0].square()
    norm_T = (slope_TD[..., None] * mixer.weight_DD / 4).square().sum((1, 2)).sqrt()
    same(torch.from_numpy(found.values_STJ[0]), norm_T[:, None].expand(N, N).tril().detach())
    assert (found.kind, found.source, found.of, found.causal) == ("jacobian", "", "Jacobian", True)
    # one sum of D numbers is all that passes from the past to the future
    assert (found.rank, found.full_rank, found.state) == (D, N // 2 * D, D)


def test_the_jacobian_is_autograd_s_and_does_not_hang_on_how_it_is_cut(x_BTD, monkeypatch):
    mixer = built("hyena", max_length=N)
    whole = torch.autograd.functional.jacobian(lambda x: mixer(x)[0], x_BTD)[0, :, :, 0]  # T D J E
    monkeypatch.setattr("holdall.analysis.matrix.TOKENS_AT_ONCE", 7 * N)
    norm_TJ, block = jacobian(mixer, x_BTD)
    same(norm_TJ, whole.square().sum((1, 3)).sqrt())
    half = N // 2
    same(block, whole[half:, :, :half].flatten(2).flatten(0, 1))


def test_the_jacobian_can_be_asked_for(x_BTD):
    found = mixing_matrix(built("attention"), x_BTD, jacobian=True)
    assert (found.kind, found.unit, found.count) == ("jacobian", "mixer", 1)


def test_a_large_block_has_no_rank(x_BTD, monkeypatch):
    monkeypatch.setattr("holdall.analysis.matrix.BLOCK", N // 2 * D - 1)
    found = mixing_matrix(Toy(tanh_of_sum), x_BTD)
    assert (found.rank, found.rank_1, found.rank_text) == (None, None, "-")


def short(mixer: Toy, x_BTD: Tensor) -> Tensor:
    taps_DW = torch.ones(D, 3, dtype=x_BTD.dtype)
    return short_conv.short_conv(x_BTD, taps_DW, None, torch.zeros(len(x_BTD), 2, D, dtype=x_BTD.dtype))[0]


def test_a_convolution_beside_unseen_mixing_is_not_the_matrix(x_BTD):
    hidden = Toy(lambda mixer, x: short(mixer, x) + tanh_of_sum(mixer, x))
    assert [each.source for each in exact_matrices(hidden, x_BTD)] == ["short"]
    assert mixing_matrix(hidden, x_BTD).kind == "jacobian"
    assert mixing_matrix(Toy(short), x_BTD).kind == "exact"
    # two convolutions of three taps reach four tokens back, which no single one does
    twice = Toy(lambda mixer, x: short(mixer, short(mixer, x)))
    found = exact_matrices(twice, x_BTD)
    assert explained(dependence(twice, x_BTD), found)
    assert not explained(dependence(twice, x_BTD), found[:1])


def squared(u_BTD: Tensor, power: float) -> Tensor:
    """Not linear, though its argument looks like values; what it calls is."""
    return leaky(u_BTD.sign() * u_BTD.abs() ** power)


def leaky(b_BTX: Tensor) -> Tensor:
    return diagonal_scan.diagonal_scan(torch.full_like(b_BTX, 0.5), b_BTX, torch.zeros_like(b_BTX[:, 0]))


def test_what_is_not_linear_is_not_exact_but_what_it_calls_may_be(x_BTD):
    found = mixing_matrix(Toy(lambda mixer, x: squared(x, 2.0)), x_BTD)
    assert (found.kind, found.source) == ("exact", "leaky")  # and not diagonal_scan, which leaky calls
    lag_TJ = (torch.arange(N)[:, None] - torch.arange(N)).double()
    same(torch.from_numpy(found.values_STJ[0]), (0.5**lag_TJ).tril())
    assert (found.unit, found.count, found.rank) == ("head", 1, 1)  # one for all channels
    assert mixing_matrix(Toy(lambda mixer, x: squared(x, 1.0)), x_BTD).source == "squared"


@pytest.mark.parametrize("held", ["name", "attribute", "partial"])
def test_it_does_not_matter_how_a_mixer_holds_a_function(held, x_BTD):
    def call(mixer: Toy, x_BTD: Tensor) -> Tensor:
        q = x_BTD[:, :, None]
        functions = {
            "name": linear_attention.linear_attention,
            "attribute": getattr(mixer, "attend", None),
            "partial": functools.partial(linear_attention.linear_attention, chunk=5),
        }
        return functions[held](q, q, q, None, want_state=False)[0].flatten(2)

    mixer = Toy(call)
    mixer.attend = linear_attention.linear_attention
    same(matrices(mixer, x_BTD)[0], (x_BTD[0] @ x_BTD[0].T).tril())


def test_a_matrix_with_a_future_is_not_causal(x_BTD):
    found = mixing_matrix(Toy(lambda mixer, x: x + x.flip(1)), x_BTD)
    assert (found.kind, found.causal) == ("jacobian", False)
    expected_TJ = math.sqrt(D) * (torch.eye(N) + torch.eye(N).flip(1)).double()
    same(torch.from_numpy(found.values_STJ[0]), expected_TJ)
    assert not mixing_matrix(Toy(lambda mixer, x: x.roll(-1, dims=1)), x_BTD).causal  # one token ahead


def running_sum(v_BTHV: Tensor) -> Tensor:
    return v_BTHV.cumsum(1)


def running_product(b_BTD: Tensor, v_BTD: Tensor) -> Tensor:
    """Linear in both; v are the values."""
    return (b_BTD * v_BTD).cumsum(1)


def test_values_are_told_from_what_else_is_linear(x_BTD):
    mixer = Toy(lambda mixer, x: running_product(x.sin(), x))
    expected_DTJ = x_BTD[0].sin().T[:, None].expand(D, N, N).tril()
    same(matrices(mixer, x_BTD), expected_DTJ)


def test_heads_that_share_a_matrix_are_one(x_BTD):
    found = mixing_matrix(
        Toy(lambda mixer, x: running_sum(x.unflatten(-1, (2, 4))).flatten(2)), x_BTD, shown=4
    )
    assert (found.source, found.unit, found.count, found.of) == ("running_sum", "head", 1, "exact")
    same(torch.from_numpy(found.values_STJ), torch.ones(1, N, N, dtype=torch.float64).tril())


def test_rank_to_one_percent_is_that_of_the_closest_block():
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double())
    sizes = torch.tensor([1.0, 0.5, 0.02, 0.005, 0.0], dtype=torch.float64)
    block = turn @ sizes.diag() @ turn.T
    # without the last two it is off by 0.45%, without the last three by 1.8%
    assert ranks(block[None], block[None]) == {"rank": 4, "rank_1": 3, "full_rank": 5}


def test_mixers_that_read_tokens_are_given_them(x_BTD):
    class Reader(Toy):
        reads_tokens = True

        def forward(self, x_BTD, state=None, *, tokens_BT, inplace=False, want_state=True):
            assert tokens_BT.shape == x_BTD.shape[:2]
            return (x_BTD * tokens_BT[..., None]).cumsum(1), None

    found = mixing_matrix(Reader(None), x_BTD, torch.arange(N)[None] + 1)
    expected_TJ = math.sqrt(D) * torch.arange(1.0, N + 1, dtype=torch.float64).expand(N, N).tril()
    same(torch.from_numpy(found.values_STJ[0]), expected_TJ)
    by_number = mixing_matrix(Reader(None), x_BTD)
    assert by_number.values_STJ[0, -1, -1] == pytest.approx(math.sqrt(D) * (N - 1))


def test_numbers_that_are_not_finite_are_an_error(x_BTD):
    with pytest.raises(ValueError, match="NaN or infinite"):
        mixing_matrix(Toy(lambda mixer, x: x.cumsum(1) / 0), x_BTD)


def test_toeplitz_distance_is_relative_to_the_nearest():
    toeplitz_TJ = torch.tensor([[1.0, 2, 3], [4, 1, 2], [5, 4, 1]]).double()
    assert toeplitz_distance(toeplitz_TJ[None]) < 1e-15
    off_TJ = toeplitz_TJ.clone()
    off_TJ[0, 0] += 3.0  # the diagonal is then 4, 1, 1 around its mean 2
    expected = math.sqrt(6) / float(off_TJ.norm())
    assert toeplitz_distance(torch.stack((toeplitz_TJ, off_TJ))) == pytest.approx(expected)


def test_inputs_say_which_tokens_are_alike():
    x_BTD, tokens_BT, names = inputs("repeats", 64, D, seed=5)
    alike_TJ = torch.tensor([[a == b for b in names] for a in names])
    assert torch.equal((x_BTD[0][:, None] == x_BTD[0]).all(-1), alike_TJ)
    assert torch.equal(tokens_BT[0][:, None] == tokens_BT[0], alike_TJ)
    assert names[0].startswith("key")
    assert names[1].startswith("value")
    constant_BTD, *_ = inputs("constant", 5, D, scale=3.0)
    assert (constant_BTD == constant_BTD[:, :1]).all()
    random_BTD, tokens_BT, names = inputs("random", 1000, D, scale=3.0)
    assert (len(tokens_BT.unique()), names) == (1000, ())
    assert float(random_BTD.std()) == pytest.approx(3.0, rel=0.05)
    with pytest.raises(ValueError, match="unknown input"):
        inputs("nothing", 4, D)


# -------------------------------------------------------------------------------- folder and command


def test_folder_gives_back_what_was_put_in(tmp_path, x_BTD):
    matrix = mixing_matrix(built("retnet"), x_BTD, shown=2, label="a/b, c = 1")
    saved = gallery.Gallery(
        command="holdall matrix",
        length=N,
        width=D,
        input="random",
        tokens=tuple("abcdefghijkl"),
        matrices=(matrix,),
        failures={"x": "y"},
        environment={"torch": "0"},
    )
    gallery.save(saved, tmp_path)
    loaded = gallery.load(tmp_path)
    assert np.array_equal(loaded.matrices[0].values_STJ, matrix.values_STJ)
    assert {**vars(loaded), "matrices": 0} == {**vars(saved), "matrices": 0}
    assert {**vars(loaded.matrices[0]), "values_STJ": 0} == {**vars(matrix), "values_STJ": 0}
    (tmp_path / "matrix.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(RunError, match="format"):
        gallery.load(tmp_path)
    with pytest.raises(RunError, match="holdall matrix"):
        gallery.load(tmp_path / "nowhere")


BROKEN = '''
from dataclasses import dataclass
from holdall.contract import MixerConfig, Paper, register
from holdall.mixers.base_conv import BaseConv, BaseConvConfig

@register("broken-conv", paper=Paper(title="", authors="", year=2026), state="", training="", inference="")
@dataclass(frozen=True, kw_only=True)
class BrokenConfig(BaseConvConfig):
    """Broken."""

    def build(self):
        return Broken(self)

class Broken(BaseConv):
    def forward(self, x_BTD, state=None, **more):
        raise ArithmeticError("it broke\\nhere")
'''


@pytest.fixture
def registry(monkeypatch):
    """Mixers that a test registers are gone after it."""
    from holdall.contract import registry

    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def command(*names, out, **options):
    settings = {"length": 16, "width": 8, "input": "repeats", "scale": 1.0, "heads": 1, "jacobian": False}
    settings |= {"seed": 0, "load": (), "dark": False, "command": "holdall matrix", **options}
    return guarded(lambda: shown.matrix(names, out=out, **settings))


def test_command_names_what_fails_and_draws_the_rest(tmp_path, registry, capsys):
    (tmp_path / "mine.py").write_text(BROKEN)
    names = ("retnet:heads=4", "broken-conv", "base-conv")
    assert command(*names, out=tmp_path / "out", load=(tmp_path / "mine.py",)) == 1
    printed = capsys.readouterr().out
    assert "broken-conv has no matrix: ArithmeticError: it broke\n" in printed
    made = gallery.load(tmp_path / "out")
    assert [each.label for each in made.matrices] == ["retnet, heads = 4", "base-conv"]
    assert made.failures == {"broken-conv": "ArithmeticError: it broke"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"matrix.{kind}" for kind in ("html", "json", "npz", "png")
    ]


def test_the_seed_decides_and_a_report_can_be_made_again(tmp_path):
    taps = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # what the process did before does not matter
        assert command("base-conv", out=tmp_path / "again", seed=seed) == 0
        taps.append(gallery.load(tmp_path / "again").matrices[0].values_STJ)
    assert np.array_equal(taps[0], taps[1])
    assert not np.allclose(taps[0], taps[2])
    page = (tmp_path / "again" / "matrix.html").read_bytes()
    (tmp_path / "again" / "matrix.html").unlink()
    assert sweeps.report([tmp_path / "again"], None) == 0
    assert (tmp_path / "again" / "matrix.html").read_bytes() == page


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (("atention",), {}, "Did you mean 'attention'"),
        (("attention:heads=3",), {}, "multiple of heads"),
        (("attention:heads",), {}, "option=value"),
    ],
)
def test_what_a_user_can_mend_is_one_line(names, options, says, tmp_path, capsys):
    assert command(*names, out=tmp_path, **options) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_command_line_reaches_it(tmp_path, monkeypatch):
    words = ["holdall", "matrix", "retnet", "attention:heads=2", "--length", "8", "--heads", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 0
    made = gallery.load(tmp_path)
    assert [each.values_STJ.shape for each in made.matrices] == [(2, 8, 8), (2, 8, 8)]
    assert made.command.startswith("holdall matrix retnet attention:heads=2")


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", ["attention", "sliding-window"])
def test_heads_that_share_values_have_the_matrices_of_heads_with_values_of_their_own(
    name: str, kv_heads: int
) -> None:
    shared = holdall.describe(name).configure(width=16, heads=4, kv_heads=kv_heads, rotary=1.0)
    alone = dataclasses.replace(shared, kv_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        few, many = shared.build().double(), alone.build().double()
    weights = few.state_dict()
    for kind in ("weight", "bias"):
        q, k, v = weights[f"project.qkv.{kind}"].split([16, 4 * kv_heads, 4 * kv_heads])
        k, v = (
            each.unflatten(0, (kv_heads, 4)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1)
            for each in (k, v)
        )
        weights[f"project.qkv.{kind}"] = torch.cat((q, k, v))
    many.load_state_dict(weights)
    x_BTD = torch.randn(1, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, want = mixing_matrix(few, x_BTD, shown=4), mixing_matrix(many, x_BTD, shown=4)
    assert (got.kind, got.unit, got.count) == ("exact", "head", 4)
    np.testing.assert_allclose(got.values_STJ, want.values_STJ, rtol=0, atol=1e-6)
