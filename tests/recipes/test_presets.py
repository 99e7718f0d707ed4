"""Named language models: published ones have their sizes, small ones equal sizes, and all of them learn."""

import dataclasses

import pytest
import torch

from holdall.model import ModelConfig
from holdall.recipes import lm_suite
from holdall.recipes.presets import FAMILIES, MLPS, SIZES, preset, presets, training
from holdall.training.devices import LanguageModelLoss
from holdall.training.language_models import PretrainConfig

GPT2 = 50257


def parameters(config: ModelConfig, *, embedding: bool = True) -> int:
    """Built layer by layer, one of each kind: the largest have over a billion."""
    counts: dict[object, int] = {}
    total = config.width
    for layer in config.layers:
        if layer not in counts:
            one = dataclasses.replace(config, vocab=2, layers=(layer,))
            with (
                torch.device("meta")
                if layer.name in ("attention", "base-conv", "mamba")
                else torch.device("cpu")
            ):
                counts[layer] = one.build().parameter_count() - 3 * config.width
        total += counts[layer]
    return total + embedding * config.vocab * config.width


def test_the_published_models_have_the_published_parameters() -> None:
    """Counted by hand, from the papers' and the repository's numbers."""

    def mamba(d: int) -> int:
        inner, rank = 2 * d, d // 16
        maps = d * 2 * inner + inner * (rank + 32) + rank * inner + inner + inner * d
        return maps + 16 * inner + inner + 5 * inner + d  # A, D, convolution, norm

    def based(d: int, depth: int, pairs: int) -> int:
        rest = 3 * d * 2 * d + 2 * d  # MLP and two norms
        taylor, window = 2 * d * 16 * 16 + 2 * d * d, 4 * d * d
        conv = d * 4 * d + 4 * d + 3 * 2 * d + 2 * d * d + d
        assert d != 1024 or conv == 6_302_720
        return depth * rest + pairs * (taylor + window) + (depth - 2 * pairs) * conv

    def jrt(d: int, depth: int, pairs: int) -> int:
        return based(d, depth, pairs) + pairs * (16 * 16 * d + d * d)  # keys and values of the prefix

    def attention(d: int, depth: int, inner: int) -> int:
        return depth * (4 * d * d + 3 * d * inner + 2 * d)

    expected = {
        "based-360m": 50264 * 1024 + based(1024, 27, 5) + 1024,
        "based-1b": 50264 * 1792 + based(1792, 36, 7) + 1792,
        "jrt-360m": 50264 * 1024 + jrt(1024, 26, 5) + 1024,
        "jrt-1b": 50264 * 1792 + jrt(1792, 36, 7) + 1792,
        "attention-360m": 50272 * 1024 + attention(1024, 24, 2816) + 1024,
        "attention-1b": 50272 * 1680 + attention(1680, 36, 4608) + 1680,
        "mamba-360m": 50272 * 1024 + 46 * mamba(1024) + 1024,
        "mamba-1b": 50272 * 2048 + 46 * mamba(2048) + 2048,
    }
    assert {name: parameters(preset(name, GPT2)) for name in expected} == expected
    millions = {name: round(count / 1e6) for name, count in expected.items()}
    assert millions == MILLIONS
    assert (expected["jrt-360m"], expected["jrt-1b"]) == (356_578_304, 1_375_143_168)


MILLIONS = {
    "based-360m": 363, "based-1b": 1349, "attention-360m": 360, "attention-1b": 1327, "mamba-360m": 358,
    "mamba-1b": 1319, "jrt-360m": 357, "jrt-1b": 1375,
}  # fmt: skip


def test_bases_layers_are_where_they_were() -> None:
    names = [layer.name for layer in preset("based-360m", GPT2).layers]
    assert [i for i, name in enumerate(names) if name == "taylor"] == [1, 6, 11, 16, 21]
    assert [i for i, name in enumerate(names) if name == "sliding-window"] == [2, 7, 12, 17, 22]
    assert names.count("base-conv") == 17
    names = [layer.name for layer in preset("based-1b", GPT2).layers]
    assert [i for i, name in enumerate(names) if name == "sliding-window"] == [2, 7, 12, 17, 22, 28, 34]
    assert preset("based-360m", GPT2).layers[2].window == 129
    based, jrt = (preset(name, GPT2).layers for name in ("based-1b", "jrt-1b"))
    changed = {(one.name, other.name) for one, other in zip(based, jrt, strict=True) if one != other}
    assert changed == {("taylor", "prefix-linear-attention")}
    assert {layer.prefix for layer in jrt if layer.name == "prefix-linear-attention"} == {1024}


@pytest.mark.parametrize("size", SIZES)
def test_small_models_of_all_families_have_equal_parameters(size: str) -> None:
    target = {"15m": 15.42e6, "40m": 40.67e6}[size]
    assert len(FAMILIES) == len(MLPS) == 19
    for family in FAMILIES:
        config = preset(f"{family}-{size}", 257)
        assert config.vocab == 264
        assert parameters(config, embedding=False) == pytest.approx(target, rel=0.035), family


def test_jrt_is_based_with_half_of_the_context_as_prefix() -> None:
    for context_len in (1024, 2048):
        based, jrt = (preset(f"{name}-40m", 257, context_len=context_len).layers for name in ("based", "jrt"))
        changed = [(one, other) for one, other in zip(based, jrt, strict=True) if one != other]
        assert {one.name for one, _ in changed} == {"taylor"}
        assert {other.prefix for _, other in changed} == {context_len // 2}


def test_the_suite_is_of_the_first_seventeen_families() -> None:
    """Its results are published: a new family does not join it by itself."""
    families = lm_suite.suite().families
    assert len(families) == 17
    assert set(FAMILIES) - set(families) == {"jrt", "gated-delta-net"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_with_all_its_weights(family: str) -> None:
    """On a narrow model, in both precisions: every parameter gets a gradient, which DDP insists on."""
    layers = FAMILIES[family](128, 4, 32)
    config = ModelConfig(vocab=16, width=128, layers=layers, mlp=32, mlp_kind="swiglu", norm="rms")
    model, rows = config.build(), torch.randint(16, (2, 21))
    found = {}
    for dtype in (None, torch.bfloat16):
        model.zero_grad()
        loss = LanguageModelLoss(model, dtype, recompute=False)(rows)
        loss.backward()
        assert [name for name, w in model.named_parameters() if w.grad is None] == []
        assert all(w.grad.isfinite().all() for w in model.parameters())
        found[dtype] = loss.item()
    assert found[torch.bfloat16] == pytest.approx(found[None], rel=0.01)


COMPILED = ("attention", "based", "griffin", "h3", "mamba")
"""Kinds of models; the mixers of all the others are compiled alone by the laws."""


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch hides it itself
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[pytest.mark.full] * (family not in COMPILED)) for family in FAMILIES],
)
def test_each_family_is_compiled_whole_and_once_for_each_kind_of_layer(family: str) -> None:
    layers = FAMILIES[family](128, 4, 32)
    model = ModelConfig(vocab=16, width=128, layers=layers, mlp=32, mlp_kind="swiglu", norm="rms").build()
    rows = torch.randint(16, (2, 21))
    plain = LanguageModelLoss(model, torch.bfloat16, recompute=False)(rows).item()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for block in model.blocks:
        block.compile(dynamic=False, backend="aot_eager")
    loss = LanguageModelLoss(model, torch.bfloat16, recompute=False)(rows)
    loss.backward()
    assert loss.item() == pytest.approx(plain, rel=1e-3)
    assert not counters["graph_break"]
    kinds = {(layer.name, getattr(layer, "filter", "")) for layer in layers}
    assert counters["stats"]["unique_graphs"] == len(kinds)


def test_names_and_trainings_fit() -> None:
    assert len(presets()) == len(set(presets())) == 8 + 2 * 19 + 1
    with pytest.raises(KeyError, match="Did you mean 'based-360m'"):
        preset("based-350m", 257)
    assert training("jrt-360m") == {"steps": 60_000, "warmup": 600}
    assert training("jrt-15m") == training("based-15m")
    for name in presets():
        PretrainConfig(model=preset("based-mini", 257), **training(name))
