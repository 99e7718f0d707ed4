"""The laws as tests, for pytest: every mixer in every variant, and each law in every dtype that it names.

    pytest --pyargs holdall.testing.laws                          # the whole registry
    pytest --pyargs holdall.testing.laws --load my_mixer.py       # a mixer in a file of your own

The plugin (pytest_holdall.py) takes this file for laws.py, and gives tests their cases.
"""

import shutil
from collections.abc import Callable

import pytest
import torch

import holdall
from holdall.contract import Mixer, did_you_mean
from holdall.testing.laws import (
    DOUBLE,
    HALF,
    LAWS,
    SINGLE,
    Case,
    breaks,
    build,
    cases,
    law_compiled,
    law_recorded,
    law_sound,
    law_state_dtype,
)


def hold(mixer: Mixer, law: Callable[..., None], *args: object) -> None:
    """Hold a mixer to a law; where it refuses the law by name, see that the law fails indeed."""
    name = law.__name__.removeprefix("law_")
    if name not in mixer.refusals:
        law(mixer, *args)
        return
    if not breaks(mixer, law, *args):
        pytest.fail(f"{mixer.config.name} refuses the law '{name}' and yet obeys it: take the refusal away")
    pytest.xfail(f"{mixer.config.name} refuses the law '{name}': {mixer.refusals[name]}")


def of_dtypes(*dtypes: torch.dtype) -> list[str]:
    """The names of the laws that are tested in these dtypes."""
    apart = ("compiled", "recorded", "sound")  # which have tests of their own below
    return [name for name, law in LAWS.items() if law.dtypes == dtypes and name not in apart]


quick = pytest.mark.quick
both = pytest.mark.parametrize(
    "dtype", [pytest.param(DOUBLE, id="fp64", marks=quick), pytest.param(SINGLE, id="fp32")]
)


@both
@pytest.mark.parametrize("law", of_dtypes(DOUBLE, SINGLE))
def test_law(case: Case, law: str, dtype: torch.dtype) -> None:
    hold(case.mixer(dtype), LAWS[law].check)


@pytest.mark.parametrize(
    "law",
    [
        pytest.param(law, marks=quick if law in ("untouched", "gradients", "state_size", "saved") else ())
        for law in of_dtypes(DOUBLE)
    ],
)
def test_law_in_fp64(case: Case, law: str) -> None:
    hold(case.mixer(DOUBLE), LAWS[law].check)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "bf16"])
def test_law_state_dtype(case: Case, dtype: torch.dtype) -> None:
    hold(case.mixer(dtype), law_state_dtype)


@pytest.mark.parametrize("law", of_dtypes(SINGLE))
def test_law_in_fp32(case: Case, law: str) -> None:
    hold(case.mixer(SINGLE), LAWS[law].check)


@pytest.mark.gpu
def test_law_recorded(case: Case) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and PyTorch sees none")
    hold(case.mixer(SINGLE), law_recorded)


def test_law_sound(case: Case) -> None:
    hold(case.mixer(SINGLE), law_sound, 2000)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "length"), [(SINGLE, 100_000), (HALF, 16_384)], ids=["fp32", "bf16"])
def test_law_sound_at_great_length(case: Case, dtype: torch.dtype, length: int) -> None:
    if any(square in holdall.describe(case.config.name).training for square in ("N²", "N^2")):
        pytest.skip("quadratic in the length")
    hold(case.mixer(dtype), law_sound, length)


# torch's own, while it traces an autograd function
traced = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")


@pytest.mark.compile
@traced
def test_law_compiled(one_case: Case) -> None:
    """Of each mixer one variant: to compile takes seconds, and the others differ little to the compiler."""
    hold(one_case.mixer(DOUBLE), law_compiled)


@pytest.mark.compile
@pytest.mark.full
@traced
def test_law_compiled_in_every_variant(case: Case) -> None:
    hold(case.mixer(DOUBLE), law_compiled)


@pytest.mark.compile
@pytest.mark.full
@traced
def test_law_compiled_over_chunks(case: Case) -> None:
    hold(case.mixer(DOUBLE), law_compiled, "aot_eager", 130)


@pytest.mark.compile
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
# torch's own, while it imports the compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", ["attention", "base-conv", "taylor", pytest.param("mamba", marks=pytest.mark.full)]
)
def test_law_compiled_by_inductor(name: str) -> None:
    """One of each family: what is traced in one graph, inductor has so far always been able to compile."""
    # with the vector instructions of this processor, like all other tests: a process decides on them once,
    # and programs that it keeps on disk for others would not compile where another had decided differently
    hold(cases([name])[0].mixer(DOUBLE), law_compiled, "inductor", 6)


def test_the_registry_is_right_about_causality(case: Case) -> None:
    """It speaks of the defaults; a variant that sees the future refuses the law by name, or fails it."""
    entry = holdall.describe(case.config.name)
    assert entry.causal == ("causal" not in build(entry.configure()).refusals)


def test_some_variant_has_chunks_that_the_laws_lengths_cross(case: Case) -> None:
    entry = holdall.describe(case.config.name)
    if "chunk" in entry.options:
        chunks = [options.get("chunk", entry.options["chunk"]) for options in entry.config.variants]
        assert min(chunks) <= 32, f"{entry.name}: no variant has a chunk of 32 or less, only {chunks}"


def test_refusals_name_laws_and_give_reasons(case: Case) -> None:
    for law, reason in case.mixer(DOUBLE).refusals.items():
        assert law in LAWS, f"{case} refuses '{law}', which is no law. {did_you_mean(law, LAWS)}"
        assert reason.strip(), f"{case} refuses '{law}' without a reason"


def test_there_is_something_to_hold_to_the_laws() -> None:
    assert len(cases()) > len(holdall.names()) > 0
