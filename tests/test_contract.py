"""Configs that are picky, a registry that helps, states that are values, and a package light to import."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

import holdall
from holdall import mixers
from holdall.contract import (
    Config,
    Mixer,
    MixerConfig,
    Paper,
    bytes_per_row,
    elements_per_row,
    forms,
    join_rows,
    load_states,
    recurrent_dtype,
    register,
    registry,
    save_states,
    select_rows,
)
from holdall.files import RunError

pytestmark = pytest.mark.quick

# ---------------------------------------------------------------------------------------------------- configs


@dataclass(frozen=True, kw_only=True)
class Inner(Config):
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Sample(Config):
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    kind: Literal["a", "b", 3] = "a"
    maybe: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "x")
    inner: Inner = Inner()
    layers: tuple[MixerConfig, ...] = ()

    def validate(self) -> None:
        if self.count < 0:
            raise ValueError(f"count {self.count} is negative")


@pytest.mark.parametrize(
    "fields",
    [
        {"count": True},
        {"count": 1.0},
        {"count": "1"},
        {"rate": True},
        {"rate": "0.5"},
        {"flag": 1},
        {"kind": "c"},
        {"kind": 3.0},
        {"kind": True},
        {"maybe": "none"},
        {"maybe": False},
        {"sizes": [1, 2]},
        {"sizes": (1, "2")},
        {"sizes": (1, True)},
        {"pair": (1,)},
        {"pair": (1, "x", "y")},
        {"pair": ("x", 1)},
        {"inner": {"depth": 2}},
        {"inner": None},
        {"layers": (Inner(),)},
    ],
    ids=str,
)
def test_an_ill_typed_field_is_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(TypeError, match=rf"Sample\.{name} = .* is not of type"):
        Sample(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"rate": 1}, {"kind": 3}, {"maybe": 4}, {"sizes": ()}, {"pair": (2, "y")}, {"inner": Inner(depth=3)}],
    ids=str,
)
def test_a_well_typed_field_is_kept_as_it_is(fields: dict[str, Any]) -> None:
    (name,) = fields
    assert getattr(Sample(**fields), name) == fields[name]


def test_values_are_checked_after_types() -> None:
    with pytest.raises(ValueError, match="count -1 is negative"):
        Sample(count=-1)


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample().count = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Sample(2)  # type: ignore[misc]


def test_a_config_goes_through_json_and_comes_back() -> None:
    layers = (
        holdall.describe("mamba").configure(width=16, state=4),
        holdall.describe("attention").configure(),
    )
    config = Sample(rate=2, kind=3, sizes=(4, 5, 6), pair=(7, "z"), inner=Inner(depth=8), layers=layers)
    plain = json.loads(json.dumps(config.to_dict()))
    assert Sample.from_dict(plain) == config
    assert plain["inner"] == {"depth": 8}
    assert plain["flag"] is False  # defaults are written out


def test_an_unknown_field_is_refused_with_the_closest_known_one() -> None:
    with pytest.raises(
        TypeError, match=r"Sample has no field 'cuont'. Did you mean 'count'\? Known: count, flag"
    ):
        Sample.from_dict({"cuont": 2})
    with pytest.raises(TypeError, match=r"Inner has no field 'dept'. Did you mean 'depth'\?"):
        Sample.from_dict({"inner": {"dept": 2}})


@pytest.mark.parametrize(
    "pair",
    [
        [1],
        [1, "x", "y"],
    ],
    ids=str,
)
def test_a_list_of_the_wrong_length_is_refused(pair: list[Any]) -> None:
    with pytest.raises(TypeError):
        Sample.from_dict({"pair": pair})


# -------------------------------------------------------------------------------------------- mixers' configs


@pytest.mark.parametrize("name", holdall.names())
def test_a_mixers_config_tells_by_itself_which_mixer_it_is(name: str) -> None:
    for options in holdall.describe(name).config.variants:
        config = holdall.describe(name).configure(width=32, **options)
        plain = json.loads(json.dumps(config.to_dict()))
        assert plain["name"] == name
        assert MixerConfig.from_dict(plain) == config
        assert type(config).from_dict(plain) == config
        assert config.options() == json.loads(json.dumps(options))  # tuples are lists there


def test_another_mixers_dictionary_is_refused() -> None:
    plain = holdall.describe("mamba").configure().to_dict()
    with pytest.raises(TypeError, match="'mamba' is not a AttentionConfig"):
        holdall.describe("attention").config.from_dict(plain)
    with pytest.raises(KeyError, match="Did you mean 'mamba'"):
        MixerConfig.from_dict({**plain, "name": "mmaba"})


WITH_KERNEL = [name for name in holdall.names() if "kernel" in holdall.describe(name).config.forms]


@pytest.mark.parametrize("name", WITH_KERNEL)
def test_a_kernel_that_can_run_nowhere_is_refused_when_it_is_built(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "HAS_TRITON", False)
    with pytest.raises(forms.KernelError, match="cannot run: Triton is not installed"):
        holdall.build(name, width=64, form="kernel")
    assert holdall.build(name, width=64).form != "kernel"


def test_a_form_is_one_that_the_mixer_has() -> None:
    with pytest.raises(ValueError, match=r"mamba has no form 'lop'. Did you mean 'loop'\?"):
        holdall.build("mamba", width=16, form="lop")
    with pytest.raises(ValueError, match="width = 0"):
        holdall.build("mamba", width=0)


@pytest.mark.parametrize("name", holdall.names())
def test_the_form_that_runs_is_resolved_once_and_shown(name: str) -> None:
    auto = holdall.build(name, width=16)
    assert auto.form == [form for form in type(auto.config).forms if form != "kernel"][-1]
    assert f"form={auto.form}" in repr(auto)
    for form in type(auto.config).forms:
        if form != "kernel":  # of which see tests/kernels/test_derivatives.py
            assert holdall.build(name, width=16, form=form).form == form


# --------------------------------------------------------------------------------------------------- registry


def test_names_build_and_describe() -> None:
    assert holdall.names() == sorted(holdall.names())
    assert {"attention", "linear-attention", "mamba"} <= set(holdall.names())
    mixer = holdall.build("mamba", width=16, state=4)
    assert isinstance(mixer, Mixer)
    assert (mixer.config.name, mixer.config.width) == ("mamba", 16)
    y_BTD, state = mixer(torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0)))
    assert y_BTD.shape == (1, 3, 16)
    assert isinstance(state, mixer.state_type)


@pytest.mark.parametrize("name", holdall.names())
def test_a_description_tells_what_there_is_to_know(name: str) -> None:
    entry = holdall.describe(name)
    text = str(entry)
    for part in (name, entry.summary, entry.paper.title, str(entry.paper.year), entry.state, *entry.options):
        assert part, f"{name} leaves something empty"
        assert part in text
    assert "width" not in entry.options


def test_a_wrong_name_gets_a_helpful_answer() -> None:
    with pytest.raises(
        KeyError, match=r"unknown mixer 'atention'. Did you mean 'attention'\? Known: attention, "
    ):
        holdall.describe("atention")
    with pytest.raises(TypeError, match=r"mamba has no option 'sate'. Did you mean 'state'\?"):
        holdall.build("mamba", width=16, sate=4)
    with pytest.raises(TypeError, match="state"):  # in which words, the type checker of the tests decides
        holdall.build("mamba", width=16, state="4")


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is registered here is gone afterwards."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


def enter(name: str) -> Any:
    return register(
        name, paper=Paper(title="T", authors="A", year=2026), state="D", training="N", inference="1"
    )


@pytest.mark.usefixtures("own_registry")
def test_a_name_belongs_to_one_class() -> None:
    @enter("mine")
    @dataclass(frozen=True, kw_only=True)
    class Mine(MixerConfig):
        """Mine, as a summary.

        And more that is not.
        """

    assert holdall.describe("mine").summary == "Mine, as a summary"
    assert Mine.name == "mine"
    enter("mine")(Mine)  # the same class again: a notebook cell that runs twice
    with pytest.raises(ValueError, match=r"mixer 'mine' is already registered, by .*Mine"):
        enter("mine")(type("Other", (MixerConfig,), {}))


MY_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from holdall.contract import MixerConfig, Paper, register

@register("mine", paper=Paper(title="T", authors="A", year=2026), state="D", training="N", inference="1")
@dataclass(frozen=True, kw_only=True)
class Mine(MixerConfig):
    "Mine."
    size: Size | None = 3
    shown: ClassVar[int] = 1

Size = int
"""


@pytest.mark.usefixtures("own_registry")
def test_a_users_own_file_may_import_the_files_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a mixer that is imported there is the one that is loaded from its file, and no other."""
    (tmp_path / "beside_mine.py").write_text(MY_FILE)
    recipe = tmp_path / "my_recipe.py"
    recipe.write_text("import json\nfrom beside_mine import Mine\nsize = Mine(width=8).size\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('hides a package')")
    before = list(sys.path)
    monkeypatch.delitem(sys.modules, "beside_mine", raising=False)
    try:
        assert mixers.run_file(recipe).size == 3
        assert mixers.load(tmp_path / "beside_mine.py") == ["mine"]
        assert sys.path == before
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "beside_mine.py").write_text(MY_FILE.replace("class Mine", "class Others"))
        with pytest.raises(RunError, match="mixer 'mine' is already registered"):
            mixers.load(tmp_path / "other" / "beside_mine.py")
        recipe.write_text("import not_beside_mine\n")
        with pytest.raises(RunError, match=r"my_recipe.py, line 1: .*No module named 'not_beside_mine'"):
            mixers.run_file(recipe)
        assert sys.path == before
    finally:
        sys.modules.pop("beside_mine", None)


@pytest.mark.usefixtures("own_registry")
def test_a_users_own_file_is_read_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "my_mixer.py"
    file.write_text(MY_FILE)
    assert mixers.load(file) == ["mine"]
    assert holdall.describe("mine").configure(size=4).to_dict() == {
        "name": "mine",
        "width": 64,
        "form": "auto",
        "size": 4,
    }
    assert mixers.load(file) == ["mine"]


@pytest.mark.usefixtures("own_registry")
def test_a_file_without_a_mixer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.py"):
        mixers.load(tmp_path / "nothing.py")
    file = tmp_path / "empty.py"
    file.write_text("x = 1")
    with pytest.raises(ValueError, match=r"empty\.py registered no mixer"):
        mixers.load(file)
    file.write_text("1 / 0")
    with pytest.raises(RunError, match=r"empty\.py, line 1: ZeroDivisionError: .*\n    1 / 0") as raised:
        mixers.load(file)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert not (tmp_path / "__pycache__").exists()  # or a file edited within a second would not be read
    assert "holdall_loaded_empty" not in {name for name in sys.modules if sys.modules[name] is None}


# ----------------------------------------------------------------------------------------------------- states


class Grows(NamedTuple):
    past_BPD: Tensor
    seen_B: Tensor


def grown(*lengths: int, value: float = 1.0) -> Grows:
    (length,) = set(lengths)
    return Grows(torch.full((len(lengths), length, 2), value), torch.tensor(lengths))


def test_rows_are_selected_as_copies_and_may_repeat() -> None:
    state = Grows(torch.arange(6.0).view(3, 1, 2), torch.tensor([5, 6, 7]))
    picked = select_rows(state, [2, 0, 0])
    assert picked.past_BPD[:, 0, 0].tolist() == [4, 0, 0]
    assert picked.seen_B.tolist() == [7, 5, 5]
    picked.past_BPD.zero_()
    assert state.past_BPD.sum() == 15
    assert isinstance(select_rows(state, torch.tensor([1])), Grows)


def test_rows_are_joined_with_zeros_in_front_of_the_shorter() -> None:
    joined = join_rows([grown(1), grown(3, 3, value=2.0)])
    assert joined.past_BPD[:, :, 0].tolist() == [[0, 0, 1], [2, 2, 2], [2, 2, 2]]
    assert joined.seen_B.tolist() == [1, 3, 3]


def test_rows_are_selected_by_a_mask_a_slice_or_from_the_end_as_those_of_a_tensor() -> None:
    state = Grows(torch.arange(6.0).view(3, 1, 2), torch.tensor([5, 6, 7]))
    kept = select_rows(state, slice(1, None))
    state.past_BPD.zero_()
    assert (kept.past_BPD.tolist(), kept.seen_B.tolist()) == ([[[2, 3]], [[4, 5]]], [6, 7])  # a copy
    for rows in ([True, False, True], torch.tensor([True, False, True]), [0, 2], [-3, -1], slice(0, 9, 2)):
        assert select_rows(state, rows).seen_B.tolist() == [5, 7], rows
    for rows in ([], [False] * 3, torch.tensor([], dtype=torch.long), slice(0)):
        assert select_rows(state, rows).past_BPD.shape == (0, 1, 2), rows
    wrong = ([[0, 1]], [0.0, 1.0], 1)
    for rows in ([3], [-4], [True, False], *map(torch.tensor, wrong)):
        with pytest.raises(ValueError, match=r"rows|mask"):
            select_rows(state, rows)


def test_states_of_different_kinds_are_not_joined() -> None:
    one, two = grown(1), grown(3)
    other = KeyValues(*two)
    for wrong in (
        other,
        two._replace(past_BPD=two.past_BPD.double()),
        two._replace(past_BPD=two.past_BPD[..., :1]),
        two._replace(seen_B=two.seen_B.repeat(2)),
        tuple(two)[:1],
    ):
        with pytest.raises(ValueError, match="state 1 cannot be joined with the first"):
            join_rows([one, wrong])
    with pytest.raises(ValueError, match="no state to join"):
        join_rows([])


class KeyValues(NamedTuple):
    past_BPD: Tensor
    seen_B: Tensor


def test_elements_and_bytes_are_of_one_row() -> None:
    assert elements_per_row(grown(3, 3)) == 7
    assert bytes_per_row(grown(3, 3)) == 6 * 4 + 8


@pytest.mark.parametrize(
    ("activations", "state"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
     (torch.float64, torch.float64)],
)  # fmt: skip
def test_recurrent_dtype_is_at_least_fp32(activations: torch.dtype, state: torch.dtype) -> None:
    assert recurrent_dtype(activations) == state


def test_a_stack_of_states_is_saved_and_loaded_by_layer(tmp_path: Path) -> None:
    stack = [holdall.build(name, width=16) for name in ("mamba", "attention")]
    x_BTD = torch.ones(2, 3, 16)
    states = [mixer(x_BTD)[1] for mixer in stack]
    file = tmp_path / "state.safetensors"
    with torch.no_grad():
        save_states(states, file)
    for got, want in zip(load_states(file, stack), states, strict=True):
        assert type(got) is type(want)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"layer 0 needs .*KeyValueCache.* but the file holds .*MambaState"):
        load_states(file, stack[::-1])
    with pytest.raises(ValueError, match="layer 2 needs"):
        load_states(file, [*stack, stack[0]])
    with pytest.raises(ValueError, match="more than 1 layers"):
        load_states(file, stack[:1])


def test_a_file_that_is_no_state_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a state file of Holdall"):
        load_states(file, [])


# --------------------------------------------------------------------------------------- mixers as objects


@pytest.mark.parametrize("name", holdall.names())
def test_every_mixer_is_pickled_and_copied(name: str) -> None:
    entry = holdall.describe(name)
    for options in entry.config.variants:
        mixer = entry.configure(width=16, **options).build()
        x_BTD = torch.ones(2, 3, 16)
        ids = {"tokens_BT": torch.zeros(2, 3, dtype=torch.long)} if mixer.reads_tokens else {}
        with torch.no_grad():
            want = mixer(x_BTD, **ids)
            for other in (pickle.loads(pickle.dumps(mixer)), copy.deepcopy(mixer)):
                y_BTD, state = other(x_BTD, pickle.loads(pickle.dumps(want[1])), **ids)
                assert torch.equal(y_BTD, mixer(x_BTD, want[1], **ids)[0]), options
                assert type(state) is type(want[1])


def test_autocast_calls_hooks_once_and_leaves_fp64_as_it_is() -> None:
    mixer, calls = holdall.build("gla", width=16), []
    mixer.register_forward_hook(lambda *_: calls.append(1))
    x_BTD = torch.ones(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, _ = mixer(x_BTD)
        wide_BTD, state = mixer.double()(x_BTD.double())
    assert len(calls) == 2
    assert (y_BTD.dtype, wide_BTD.dtype) == (torch.bfloat16, torch.float64)
    assert torch.equal(wide_BTD, mixer(x_BTD.double())[0])
    assert all(tensor.dtype == torch.float64 for tensor in state)


def test_a_state_is_the_same_kind_in_and_out_of_autocast() -> None:
    mixer, x_BTD = holdall.build("attention", width=16), torch.ones(2, 3, 16)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            _, state = mixer(x_BTD)
        y_BTD, state = mixer(x_BTD, state)
        assert {tensor.dtype for tensor in state} == {torch.float32, torch.long}
        with torch.autocast("cpu", torch.bfloat16):
            z_BTD, _ = mixer(x_BTD, state)
    assert (y_BTD.dtype, z_BTD.dtype) == (torch.float32, torch.bfloat16)


def test_token_ids_of_another_shape_are_refused() -> None:
    mixer = holdall.build("repeat-attention", width=16)
    with pytest.raises(ValueError, match=r"tokens_BT has shape \(2, 4\), where repeat-attention needs"):
        mixer(torch.ones(2, 3, 16), tokens_BT=torch.zeros(2, 4, dtype=torch.long))


# ------------------------------------------------------------------------------------------------- the import


def test_import_is_light() -> None:
    """Names and versions come without torch: a command line that only prints its help starts at once."""
    code = "import sys, holdall; sys.exit(' '.join({'torch', 'numpy', 'matplotlib'} & {*sys.modules}) or 0)"
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert time.perf_counter() - start < 1
