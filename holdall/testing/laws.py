"""The page of laws: what every registered mixer obeys, in every variant that its config lists.

    holdall laws my_mixer.py                                      # each law once, in words
    pytest --pyargs holdall.testing.laws --load my_mixer.py       # the same as tests, in more dtypes
    pytest --pyargs holdall.testing.laws -k "mamba and splits"    # one mixer, one law

A law is a plain function, `law_<name>(mixer)`: it returns if the mixer obeys and raises AssertionError if it
does not, so it can be called on any mixer. `LAWS` has all of them, with what a broken one means and where to
look; `judge` makes a sentence of it. A mixer that cannot obey a law names it in `refusals`, with the reason;
it is then expected to break the law, and it is an error if the law holds after all. test_laws.py, beside this
file, makes tests of them, and tests/test_laws_go_red.py plants a fault for each law and sees it go red.

Tolerances are earned, never picked. In fp32 and bf16 three answers are computed: the truth, which is the
loop in fp64; the loop in the dtype under test; and the mixer's. The mixer may err by twice as much as the
loop, plus two units in the last place of the largest value. In fp64, where there is no better truth, two ways
to the same number may differ by `SPREAD` units: far more than rounding can add up to over a hundred tokens,
far less than any wrong term. One processor may by luck lose nothing where another does, as in a difference of
equal terms, so a mixer that errs more is also held against loops whose every step errs by lot: see nudges.py.

Letters: B batch row, T time, D model width.
"""

import contextlib
import copy
import functools
import itertools
import math
import operator
import random
import sys
import tempfile
import unittest.mock
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import holdall
from holdall import errors
from holdall.contract import (
    Mixer,
    MixerConfig,
    State,
    StateError,
    elements_per_row,
    join_rows,
    load_states,
    map_state,
    save_states,
    select_rows,
    trim,
)
from holdall.contract.room import capacity_of, is_reserved, slot_names
from holdall.ops.recorded import no_graph_ends
from holdall.testing.nudges import Nudges

WIDTH = 16
LENGTHS = (1, 2, 63, 64, 65, 100)
"""One token, two, the sizes around a chunk, and one that is no multiple of anything."""
LONG = 300
"""More than any chunk or block that a form cuts its work into by default."""
SPREAD = 2.0**16
"""Units in the last place by which two ways to the same fp64 number may differ: 1.5e-11 of the largest."""

# ----------------------------------------------------------------------------------------- mixers and inputs


@dataclass(frozen=True)
class Case:
    """One registered mixer in one of its variants."""

    config: MixerConfig

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.config.options().items())
        return f"{self.config.name}[{options}]"

    @functools.lru_cache(maxsize=8)  # noqa: B019 - the few cases live as long as the session anyway
    def mixer(self, dtype: torch.dtype) -> Mixer:
        """Always with the same weights; torch's global random state is left alone."""
        return build(self.config).to(dtype)


def cases(names: Sequence[str] | None = None) -> list[Case]:
    """Every variant of the named mixers, of all registered ones if None."""
    entries = [holdall.describe(name) for name in (holdall.names() if names is None else names)]
    return [
        Case(entry.configure(width=WIDTH, **options))
        for entry in entries
        for options in entry.config.variants
    ]


def build(config: MixerConfig) -> Mixer:
    """A mixer whose parameters are all unlike: initial zeros and ones would hide wrong terms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = of_x_alone(config.build()).eval()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return mixer


def of_x_alone(mixer: Mixer) -> Mixer:
    """The mixer itself; one that reads tokens' ids takes the signs of x's first six channels for them, and
    one that reads what an earlier layer shares takes x, channels in reverse."""
    if mixer.reads_tokens:
        mixer.__class__ = _tokens_from_signs(type(mixer))  # type: ignore[arg-type]
    if mixer.reads_shared:
        mixer.__class__ = _shared_from_x(type(mixer))  # type: ignore[arg-type]
    return mixer


@functools.cache
def _tokens_from_signs(kind: type[Mixer]) -> type[Mixer]:
    class FromSigns(kind):  # type: ignore[misc, valid-type]
        def forward(self, x_BTD: Tensor, state: Any = None, **how: Any) -> tuple[Tensor, Any]:
            tokens_BT = sum((x_BTD[..., bit] > 0).long() << bit for bit in range(6))
            return kind.forward(self, x_BTD, state, tokens_BT=tokens_BT, **how)  # type: ignore[call-arg]

    return FromSigns


@functools.cache
def _shared_from_x(kind: type[Mixer]) -> type[Mixer]:
    class FromX(kind):  # type: ignore[misc, valid-type]
        def forward(self, x_BTD: Tensor, state: Any = None, **how: Any) -> tuple[Tensor, Any]:
            return kind.forward(self, x_BTD, state, shared_BTD=x_BTD.flip(-1), **how)  # type: ignore[call-arg]

    return FromX


def twin(mixer: Mixer, *, form: str | None = None, dtype: torch.dtype | None = None) -> Mixer:
    """Another mixer with the same weights, built from the same config: in another form, or dtype."""
    config = mixer.config if form is None else replace(mixer.config, form=form)
    with torch.random.fork_rng(devices=[]):
        other = of_x_alone(config.build()).to(dtype or dtype_of(mixer)).eval()
    other.load_state_dict(mixer.state_dict())
    return other


def loop_of(mixer: Mixer, dtype: torch.dtype) -> Mixer:
    """The definition of a mixer, with its weights."""
    assert "loop" in mixer.config.forms, (
        f"{mixer.config.name} has no form 'loop', so nothing says what is right"
    )
    return twin(mixer, form="loop", dtype=dtype)


def dtype_of(mixer: nn.Module) -> torch.dtype:
    return next(p.dtype for p in (*mixer.parameters(), *mixer.buffers()) if p.is_floating_point())


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers, from a generator of their own; the same in every dtype, up to its rounding."""
    real = torch.float64
    if dtype.is_complex:
        dtype, real = torch.complex128, torch.complex128
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=real).to(dtype)


def tokens(mixer: Mixer, length: int, *, batch: int = 2, seed: int = 0) -> Tensor:
    return draw(batch, length, mixer.config.width, dtype=dtype_of(mixer), seed=seed)


def read_in_pieces(
    mixer: Callable, x_BTD: Tensor, sizes: Sequence[int], state: Any = None
) -> tuple[Tensor, Any]:
    ys = []
    # whole tokens are handed on as they are: they may be a leaf, of which torch.compile is fond
    for piece in x_BTD.split(list(sizes), dim=1) if len(sizes) > 1 else [x_BTD]:
        try:
            y_BTD, state = mixer(piece, state)
        except StateError as error:
            raise AssertionError(f"what the mixer returned is no state of it: {error}") from error
        ys.append(y_BTD)
    return torch.cat(ys, dim=1), state


# ------------------------------------------------------------------------------------------------ tolerances


def largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def distance(got: Tensor, want: Tensor, measure: Callable[[Tensor], Any] = largest) -> float:
    """The largest difference, or another measure of all of them; NaN if there is one anywhere."""
    wide = torch.promote_types(got.dtype, torch.float64)
    return size(got.to(wide) - want.to(wide), measure)


def size(tensor: Tensor, measure: Callable[[Tensor], Any] = largest) -> float:
    return float(measure(tensor.detach())) if tensor.numel() else 0.0


def assert_close(name: str, got: Tensor, want: Tensor, bound: float | Iterable[float] | None = None) -> None:
    """Two ways to the same numbers differ by rounding only; whole numbers do not differ at all.

    bound: how much rounding explains, or several of which the largest counts: a later one is computed only if
    those before are exceeded.
    """
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, not {want.dtype}"
    if not differentiable(want):
        assert torch.equal(got, want), f"{name}: {got.tolist()}, not {want.tolist()}"
        return
    if bound is None:
        bound = spread(want)
    assert_explained(name, distance(got, want), bound if isinstance(bound, Iterable) else [bound])


class BrokenLawError(AssertionError):
    """Numbers that differ by more than rounding explains."""

    def __init__(self, name: str, error: float, explained: float) -> None:
        super().__init__(f"{name}: off by {error:.3g}, and rounding explains {explained:.3g}")
        self.name, self.error, self.explained = name, error, explained


def assert_explained(name: str, error: float, bounds: Iterable[float]) -> None:
    tried = []
    for bound in bounds:
        if error <= bound:
            return
        tried.append(bound)
    raise BrokenLawError(name, error, max(tried))


def pieces_of(sizes: Sequence[int]) -> str:
    """The sizes of pieces in words."""
    alike = len(set(sizes)) == 1 and len(sizes) > 3
    return f"{len(sizes)} pieces of {sizes[0]}" if alike else f"pieces of {', '.join(map(str, sizes))}"


def assert_bitwise(name: str, got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, not {want.dtype}"
    assert torch.equal(got, want), f"{name} differs"


def spread(want: Tensor) -> float:
    """How far apart two ways to the same numbers in fp64 may end, where nothing cancels."""
    return SPREAD * torch.finfo(want.dtype).eps * size(want)


RUNS = 8
"""Nudged runs by which a result is judged that errs more than twice as much as plain PyTorch happens to."""


@dataclass(frozen=True)
class Plain:
    """A result of plain PyTorch, and the same result of runs that are nudged, one by one on demand."""

    tensor: Tensor
    nudged: Callable[[], Iterator[Tensor]]


def plainly(function: Callable, *args: Any, **how: Any) -> Any:
    """The results of a function in plain PyTorch, a tensor or several by name or in a row, each as `Plain`.

    The function is called again, with the same arguments, when a nudged run is asked for.
    """

    @functools.cache
    def again(seed: int) -> Any:
        with Nudges(seed):
            return function(*args, **how)

    def one(result: Any, *key: Any) -> Any:
        def nudged() -> Iterator[Tensor]:
            return (functools.reduce(operator.getitem, key, again(seed)) for seed in range(RUNS))

        return Plain(result, nudged) if isinstance(result, Tensor) else result

    results = function(*args, **how)
    if isinstance(results, dict):
        return {key: one(result, key) for key, result in results.items()}
    return one(results) if isinstance(results, Tensor) else [one(u, i) for i, u in enumerate(results)]


def earned(
    plain: Plain, truth: Tensor, units: float = 2, measure: Callable[[Tensor], Any] = largest
) -> Iterator[float]:
    """How far from the truth an answer may be: the largest of these, of which the first is mostly enough.

    That is twice as far as plain torch in that dtype, plus some units in the last place of the largest value;
    or, since what plain torch errs is luck where few numbers are added or large ones cancel, as far as a
    nudged run, which errs twice as much as the size of all terms on the way makes it (see `Nudges`), plus the
    same. Where nothing cancels these are about equal. A run that ends in infinities or NaN explains nothing.
    Errors of many elements may be measured together, by their norm.
    """
    floor = units * torch.finfo(plain.tensor.dtype).eps * size(truth, measure)
    yield 2 * distance(plain.tensor, truth, measure) + floor
    for tensor in plain.nudged():
        yield finite(distance(tensor, truth, measure)) + floor


def spread_of(plain: Plain) -> Iterator[float]:
    """How far apart two ways to a result in fp64 may end: the largest of these, as in `earned`.

    That is what `spread` allows; or, where terms cancel that are larger by 2^16 than their sum, twice the
    distance of a nudged run, since each of the two ways may err by that.
    """
    yield spread(plain.tensor)
    for tensor in plain.nudged():
        yield 2 * finite(distance(tensor, plain.tensor))


def finite(error: float) -> float:
    return error if math.isfinite(error) else 0.0


def assert_as_good_as_plain(
    name: str,
    got: Tensor,
    plain: Plain,
    truth: Tensor,
    units: float = 2,
    measure: Callable[[Tensor], Any] = largest,
) -> None:
    """`got` errs at most twice as much as `plain`, in the same dtype, both against the truth in fp64."""
    want = plain.tensor
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: {got.dtype}, not {want.dtype}"
    if not differentiable(want):
        assert torch.equal(got, want), f"{name}: {got.tolist()}, not {want.tolist()}"
        return
    assert_explained(name, distance(got, truth, measure), earned(plain, truth, units, measure))


def assert_right(name: str, got: Tensor, plain: Plain, truth: Tensor) -> None:
    """`got` equals the loop: in fp64 itself, otherwise measured against the loop in fp64."""
    if dtype_is_widest(got.dtype):
        assert_close(name, got, plain.tensor, spread_of(plain))
    else:
        assert_as_good_as_plain(name, got, plain, truth)


def dtype_is_widest(dtype: torch.dtype) -> bool:
    return dtype in (torch.float64, torch.complex128)


def widened(state: State) -> State:
    """The same numbers in fp64."""
    return map_state(
        state, lambda t: t.to(torch.promote_types(t.dtype, torch.float64)) if differentiable(t) else t
    )


def differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def named(y_BTD: Tensor, state: State | None) -> dict[str, Tensor]:
    """The output and the tensors of a state, by name."""
    fields = {} if state is None else dict(zip(type(state)._fields, state, strict=True))  # type: ignore
    return {"output": y_BTD, **{f"state.{name}": tensor for name, tensor in fields.items()}}


def outcome(mixer: Mixer, x_BTD: Tensor, state: State | None = None) -> dict[str, Tensor]:
    return named(*mixer(x_BTD, state))


def one_row(y_BTD: Tensor, state: State, row: int) -> dict[str, Tensor]:
    return {name: tensor[row] for name, tensor in named(y_BTD, state).items()}


class Rounding:
    """How far apart two ways through the same tokens may end, by name of output and state tensor.

    Below fp64 each way may be off by what the loop earns, so two ways may differ by twice that.
    """

    def __init__(
        self, mixer: Mixer, x_BTD: Tensor, state: State | None = None, run: Callable[..., Any] = outcome
    ) -> None:
        self.mixer, self.x_BTD, self.state, self.run = mixer, x_BTD, state, run

    @functools.cached_property
    def loop(self) -> tuple[dict[str, Plain], dict[str, Tensor]]:
        """What the loop gives in the dtype of the tokens, and in fp64."""
        wide = None if self.state is None else widened(self.state)
        return (
            plainly(self.run, loop_of(self.mixer, self.x_BTD.dtype), self.x_BTD, self.state),
            self.run(loop_of(self.mixer, torch.float64), self.x_BTD.double(), wide),
        )

    def bounds(self, part: str, want: Tensor) -> Iterator[float]:
        """One by one, as the loop is run only if two ways differ at all, or in fp64 by more than `spread`."""
        looped = "loop" in self.mixer.config.forms
        if not looped or dtype_is_widest(self.x_BTD.dtype):
            yield spread(want)
            if looped:
                yield from spread_of(self.loop[0][part])
        else:
            yield 0.0
            plain, truth = self.loop
            yield from (2 * bound for bound in earned(plain[part], truth[part]))

    def check(self, name: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
        assert list(got) == list(want), f"{name}: {list(got)}, not {list(want)}"
        for part, tensor in want.items():
            assert_close(f"{part} {name}", got[part], tensor, self.bounds(part, tensor))


# --------------------------------------------------------------------------------------------------- the laws


DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Law:
    """A law, and what to say of a mixer that breaks it."""

    name: str
    check: Callable[..., None]
    """Called on a mixer: raises AssertionError if it breaks the law."""
    says: str
    """The law in a sentence."""
    group: str
    broken: str
    """What it means if the law is broken."""
    look: str
    """Where the fault most often is."""
    dtypes: tuple[torch.dtype, ...]
    """In which it is tested; `holdall laws` takes the first."""
    short: bool
    """Whether a frontier checks it before it trains an added mixer."""

    def __call__(self, mixer: Mixer, *args: Any) -> None:
        self.check(mixer, *args)


LAWS: dict[str, Law] = {}
"""All laws, by name."""


def law(
    group: str,
    broken: str,
    look: str,
    *,
    dtypes: tuple[torch.dtype, ...] = (DOUBLE, SINGLE),
    short: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enter the function `law_<name>` into LAWS; the first sentence of its docstring is what the law says."""

    def enter(check: Callable[..., None]) -> Callable[..., None]:
        name = check.__name__.removeprefix("law_")
        says = (check.__doc__ or "").partition("\n")[0].rstrip(".")
        LAWS[name] = Law(name, check, says, group, broken, look, dtypes, short)
        return check

    return enter


CUTS = ((1,) * 65, (1, 64), (64, 1), (2, 63, 35), (63, 1, 1), (100,))


@law(
    "time",
    "what is read in pieces is not what is read at once",
    "what a call needs and the state lacks: the last tokens of a convolution, a position, a normaliser",
    short=True,
)
@torch.no_grad()
def law_splits(mixer: Mixer, cuts: Sequence[Sequence[int]] = CUTS, examples: int = 6) -> None:
    """Any split of a sequence into pieces gives the whole: outputs and final state."""

    def split(sizes: Sequence[int]) -> None:
        x_BTD = tokens(mixer, sum(sizes))
        pieces = named(*read_in_pieces(mixer, x_BTD, sizes))
        Rounding(mixer, x_BTD).check(
            f"in {pieces_of(sizes)} differs from the whole", pieces, named(*mixer(x_BTD))
        )

    for sizes in cuts:
        split(sizes)
    drawn = random.Random(0)
    for _ in range(examples):
        split([drawn.randint(1, 66) for _ in range(drawn.randint(2, 4))])


@law(
    "time",
    "the mixer sees the future",
    "masks, convolutions that are padded on both sides or circular, norms and means over time",
    short=True,
)
@torch.no_grad()
def law_causal(mixer: Mixer, length: int = 65, firsts: Sequence[int] = (1, 2, 32, 63, 64)) -> None:
    """Other tokens from t on change no output before t: by no more than a Fourier transform's rounding."""
    x_BTD = tokens(mixer, length)
    y_BTD, _ = mixer(x_BTD)
    rounding = Rounding(mixer, x_BTD)
    for first in firsts:
        other_BTD = x_BTD.clone()
        other_BTD[:, first:] = tokens(mixer, length, seed=1)[:, first:]
        early_BTD = mixer(other_BTD)[0]
        early_BTD[:, first:] = y_BTD[:, first:]  # rounding is relative to all of the output
        rounding.check(
            f"before token {first} changes when later tokens do", {"output": early_BTD}, {"output": y_BTD}
        )


@law(
    "time",
    "behind its prefix the mixer is not causal, or reads in pieces what it does not read at once",
    "the prefix read again by a later call, its sums added at another time, a mask one token off",
)
@torch.no_grad()
def law_prefix(mixer: Mixer, length: int = 65, firsts: Sequence[int] = (0, 1, 32, 64)) -> None:
    """Behind a prefix that is read in one call, any split gives the whole and no output sees later tokens.

    Of mixers that have a prefix; the others obey the laws of splits and of causality from their first token.
    """
    if not mixer.prefix:
        return
    prefix = mixer.prefix
    x_BTD = tokens(mixer, prefix + length)
    y_BTD, state = mixer(x_BTD)
    rounding, whole = Rounding(mixer, x_BTD), named(y_BTD, state)
    for rest in ((length,), (1,) * length, (2, length - 35, 33)):
        for sizes in ((prefix, *rest), (prefix + rest[0], *rest[1:])):
            pieces = named(*read_in_pieces(mixer, x_BTD, sizes))
            rounding.check(f"behind a prefix of {prefix}, in {pieces_of(sizes)}, differs", pieces, whole)
    for first in (prefix + after for after in firsts):
        other_BTD = x_BTD.clone()
        other_BTD[:, first:] = tokens(mixer, prefix + length, seed=1)[:, first:]
        early_BTD = mixer(other_BTD)[0]
        early_BTD[:, first:] = y_BTD[:, first:]
        rounding.check(
            f"before token {first}, behind a prefix of {prefix}, changes when later tokens do",
            {"output": early_BTD}, {"output": y_BTD},
        )  # fmt: skip


@law(
    "rows",
    "rows of a batch see each other",
    "means and norms over the batch, reshapes that mix rows, a state that is indexed by the wrong dimension",
    short=True,
)
@torch.no_grad()
def law_rows(mixer: Mixer, length: int = 65, more: int = 3) -> None:
    """Rows of a batch never see each other, and any rows of a state continue those rows."""
    x_BTD = tokens(mixer, length + more, batch=3)
    prompt_BTD, rest_BTD = x_BTD.split([length, more], dim=1)
    y_BTD, state = mixer(prompt_BTD)
    z_BTD, end = mixer(rest_BTD, state)
    rounding = Rounding(mixer, x_BTD)

    stranger_BTD = prompt_BTD.clone()
    stranger_BTD[1] = tokens(mixer, length, seed=1)[0]
    u_BTD, other = mixer(stranger_BTD)
    for row in (0, 2):
        rounding.check(
            f"of row {row} changes when another row does",
            one_row(u_BTD, other, row),
            one_row(y_BTD, state, row),
        )

    picked = [2, 0, 0]
    rounding.check(
        f"of rows {picked}, selected from a state, differs",
        named(*mixer(rest_BTD[picked], select_rows(state, picked))),
        named(z_BTD[picked], select_rows(end, picked)),
    )


@law(
    "rows",
    "a row depends on the lengths of its neighbours",
    "empty slots, which are zeros in front, that are taken for tokens; one position for all rows",
)
@torch.no_grad()
def law_joined_rows(mixer: Mixer, lengths: Sequence[int] = (5, 1, 66), more: int = 3) -> None:
    """Prompts of different lengths, each read alone, then joined and continued together: each as if alone."""
    x_BTD = tokens(mixer, max(lengths) + more, batch=len(lengths))
    alone, states = [], []
    for row, length in enumerate(lengths):
        _, state = mixer(x_BTD[row : row + 1, :length])
        states.append(state)
        alone.append(mixer(x_BTD[row : row + 1, length : length + more], state))
    rests = [x_BTD[row, length : length + more] for row, length in enumerate(lengths)]
    y_BTD, _ = together = mixer(torch.stack(rests), join_rows(states))
    last_BTD = tokens(mixer, 1, batch=len(lengths), seed=1)
    z_BTD, _ = mixer(last_BTD, together[1])
    rounding = Rounding(mixer, x_BTD)
    for row in range(len(lengths)):
        want_BTD, state = alone[row]
        rounding.check(
            f"of row {row}, joined with others, differs", {"output": y_BTD[row]}, {"output": want_BTD[0]}
        )
        want_BTD, _ = mixer(last_BTD[row : row + 1], state)
        rounding.check(
            f"of row {row}, some time after it was joined with others, differs",
            {"output": z_BTD[row]},
            {"output": want_BTD[0]},
        )


@law(
    "calls",
    "a call changes what it was given",
    "operations in place (add_, copy_) without inplace=True, results that are views of inputs: clone them",
    dtypes=(DOUBLE,),
)
@torch.no_grad()
def law_untouched(mixer: Mixer, lengths: Sequence[int] = (1, 65)) -> None:
    """A call leaves inputs, incoming state, parameters and buffers bit-identical."""
    _, state = mixer(tokens(mixer, 6))
    for length in lengths:
        x_BTD = tokens(mixer, length, seed=1)
        watched = {
            "x": x_BTD,
            **named(x_BTD, state),
            **dict(mixer.named_parameters()),
            **dict(mixer.named_buffers()),
        }
        before = {name: tensor.clone() for name, tensor in watched.items()}
        y_BTD, after = mixer(x_BTD, state)
        # what comes out is the caller's: writing there must not reach what went in
        for tensor in (y_BTD, *after):
            tensor.fill_(-1)
        for name, tensor in watched.items():
            assert_bitwise(f"{name} after {length} tokens", tensor, before[name])


@law(
    "calls",
    "a state that is given away leads to other numbers",
    "values of the state that are read after they were overwritten",
)
@torch.no_grad()
def law_inplace(mixer: Mixer, lengths: Sequence[int] = (1, 6, 65)) -> None:
    """A caller that gives its state away gets the same numbers."""
    x_BTD = tokens(mixer, 7 + max(lengths))
    _, state = mixer(x_BTD[:, :7])
    rounding = Rounding(mixer, x_BTD)
    for length in lengths:
        now_BTD = x_BTD[:, 7 : 7 + length]
        given_away = map_state(state, torch.clone)
        rounding.check(
            f"of {length} tokens with inplace=True differs",
            named(*mixer(now_BTD, given_away, inplace=True)),
            named(*mixer(now_BTD, state)),
        )


def in_place(
    mixer: Callable, x_BTD: Tensor, sizes: Sequence[int], state: Any, *, fixed: bool
) -> tuple[Tensor, Any]:
    """As `read_in_pieces`, in place, where a tensor of one size before and after is the same one.

    fixed: the state has a capacity, so all its tensors must be of one size.
    """
    ys = []
    for piece in x_BTD.split(list(sizes), dim=1):
        y_BTD, after = mixer(piece, state, inplace=True)
        for name, old, new in zip(type(state)._fields, state, after, strict=True):
            where = f"state.{name} in place, after {piece.shape[1]} tokens"
            assert not fixed or new.shape == old.shape, f"{where}: {tuple(new.shape)}, not {tuple(old.shape)}"
            assert new.shape != old.shape or new.data_ptr() == old.data_ptr(), f"{where}, is elsewhere"
        state = after
        ys.append(y_BTD)
    return torch.cat(ys, dim=1), state


def with_capacity(mixer: Mixer, batch: int, capacity: int) -> Any:
    """A state in which nothing was read, with arbitrary numbers in its empty slots."""
    state = mixer.init_state(batch, dtype=dtype_of(mixer), capacity=capacity)
    for name in slot_names(state) if is_reserved(state) else ():
        getattr(state, name).fill_(7)
    return state


def without_capacity(state: Any, like: State) -> State:
    """A state as it is without a capacity: the slots in use, as many as `like` has."""
    pairs = zip(trim(state), like, strict=True)
    return type(like)(*(t if t.shape == u.shape else t[:, t.shape[1] - u.shape[1] :] for t, u in pairs))


@law(
    "state",
    "a state moves in memory",
    "tensors of init_state that share memory, and what is done with inplace=True",
    dtypes=(DOUBLE,),
)
@torch.no_grad()
def law_addresses(mixer: Mixer, sizes: Sequence[int] = (1, 1, 7, 1, 2, 64)) -> None:
    """In place, all tensors of fixed size keep their addresses, and with a capacity that is all tensors."""
    x_BTD = tokens(mixer, sum(sizes))
    for capacity in (None, sum(sizes)):
        state = mixer.init_state(2, dtype=x_BTD.dtype, capacity=capacity)
        addresses = [tensor.data_ptr() for tensor in state if tensor.numel()]
        assert len(set(addresses)) == len(addresses), "two tensors of init_state share their memory"
        in_place(mixer, x_BTD, sizes, state, fixed=capacity is not None)


@law(
    "state",
    "a state with reserved slots gives other results",
    "slots that are not in use but are read, and one count for all rows",
)
@torch.no_grad()
def law_capacity(
    mixer: Mixer,
    cuts: Sequence[Sequence[int]] = ((1,) * 9, (1, 8), (2, 7, 1), (64, 1, 2)),
    lengths: Sequence[int] = (5, 1, 9),
    more: int = 3,
) -> None:
    """With a capacity and in place, any pieces give what they give without; what does not fit is refused.

    Rows of different lengths stay apart: each fills its own next slots, and nothing else is written.
    """
    for sizes in cuts:
        total = sum(sizes)
        x_BTD, how = tokens(mixer, total + more), f"with a capacity, in {pieces_of(sizes)}"
        prompt_BTD, rest_BTD = x_BTD.split([total, more], dim=1)
        rounding, (y_BTD, want) = Rounding(mixer, x_BTD), read_in_pieces(mixer, prompt_BTD, sizes)
        z_BTD, state = in_place(mixer, prompt_BTD, sizes, with_capacity(mixer, 2, total), fixed=True)
        rounding.check(f"{how}, differs", named(z_BTD, without_capacity(state, want)), named(y_BTD, want))
        if is_reserved(state):
            _assert_refused(mixer, rest_BTD, state)
        (y_BTD, want), wider = mixer(rest_BTD, want), mixer.with_room(state, total + more)
        z_BTD, state = in_place(mixer, rest_BTD, [more], wider, fixed=True)
        rounding.check(
            f"{how}, and more tokens, differs",
            named(z_BTD, without_capacity(state, want)),
            named(y_BTD, want),
        )

    x_BTD = tokens(mixer, max(lengths) + more, batch=len(lengths))
    rounding, alone, states = Rounding(mixer, x_BTD), [], []
    for row, length in enumerate(lengths):
        u_BTD = x_BTD[row : row + 1]
        alone.append(mixer(u_BTD[:, length : length + more], mixer(u_BTD[:, :length])[1])[0])
        start = with_capacity(mixer, 1, max(lengths) + more)
        states.append(in_place(mixer, u_BTD[:, :length], [length], start, fixed=True)[1])
    joined: Any = join_rows(states)
    before = map_state(joined, torch.clone)
    rests_BTD = torch.stack([x_BTD[row, length : length + more] for row, length in enumerate(lengths)])
    y_BTD, state = in_place(mixer, rests_BTD, [more], joined, fixed=True)
    for row, want_BTD in enumerate(alone):
        rounding.check(
            f"of row {row}, beside rows of other lengths, differs",
            {"output": y_BTD[row]},
            {"output": want_BTD[0]},
        )
    for name in slot_names(state) if is_reserved(state) else ():
        for row, length in enumerate(lengths):
            old_SX, new_SX = getattr(before, name)[row], getattr(state, name)[row]
            others = [slot for slot in range(len(old_SX)) if not length <= slot < length + more]
            assert_bitwise(f"state.{name} of row {row} in other slots", new_SX[others], old_SX[others])


def _assert_refused(mixer: Mixer, x_BTD: Tensor, state: Any) -> None:
    """Tokens beyond a state's capacity are refused by its number, and the state is left alone."""
    before, said = map_state(state, torch.clone), "nothing: they are taken"
    try:
        mixer(x_BTD, state, inplace=True)
    except StateError as error:
        said = str(error)
    full = f"capacity of {capacity_of(state)}"
    assert full in said, f"tokens beyond a {full}, which should be refused by that: {said}"
    for name, old, new in zip(type(state)._fields, before, state, strict=True):
        assert_bitwise(f"state.{name} after tokens that were refused", new, old)


@law(
    "compiler",
    "a CUDA graph changes or breaks the mixer",
    "counts on the host, and tensors that are made anew",
    dtypes=(SINGLE,),
)
@torch.no_grad()
def law_recorded(mixer: Mixer, length: int = 40, batch: int = 2) -> None:
    """On a GPU: one step, recorded as a CUDA graph, is replayed at every length and gives what calls give."""
    on_gpu, x_BTD = copy.deepcopy(mixer).cuda(), tokens(mixer, length, batch=batch)
    rounding, steps = Rounding(mixer, x_BTD), x_BTD.cuda().split(1, dim=1)

    def start() -> Any:
        return on_gpu.init_state(batch, dtype=x_BTD.dtype, device=steps[0].device, capacity=length)

    want_BTD, end = in_place(on_gpu, x_BTD.cuda(), [1] * length, start(), fixed=True)
    now_B1D, state = steps[0].clone(), start()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or chosen at the first calls is no part of a step
        for _ in range(2):
            on_gpu(now_B1D, state, inplace=True)
    torch.cuda.current_stream().wait_stream(side)
    with no_graph_ends(), torch.cuda.graph(graph):
        y_B1D, after = on_gpu(now_B1D, state, inplace=True)
    for name, old, new in zip(type(state)._fields, state, after, strict=True):
        assert new.data_ptr() == old.data_ptr(), f"state.{name} is elsewhere after a recorded step"

    # from the start, and from the middle of another state: rows come and go under a graph
    half = length // 2
    sizes = [1] * half if "splits" in mixer.refusals else [half]
    _, middle = in_place(on_gpu, x_BTD[:, :half].cuda(), sizes, start(), fixed=True)
    for first, values in ((0, start()), (half, middle)):
        for old, new in zip(state, values, strict=True):
            old.copy_(new)
        ys = []
        for x_B1D in steps[first:]:
            now_B1D.copy_(x_B1D)
            graph.replay()
            ys.append(y_B1D.clone())
        got, want = named(torch.cat(ys, dim=1), state), named(want_BTD[:, first:], end)
        got, want = ({name: t.cpu() for name, t in tensors.items()} for tensors in (got, want))
        rounding.check(f"replayed from token {first} differs", got, want)


@law(
    "time",
    "no state is not the same as init_state",
    "what forward assumes for state=None, and what want_state=False leaves out",
    short=True,
)
@torch.no_grad()
def law_fresh(mixer: Mixer, lengths: Sequence[int] = (1, 65)) -> None:
    """No state means init_state; and who does not want the next state gets the same outputs and None."""
    start = mixer.init_state(2, dtype=dtype_of(mixer))
    for length in lengths:
        x_BTD = tokens(mixer, length)
        rounding = Rounding(mixer, x_BTD)
        want = mixer(x_BTD)
        rounding.check(
            "from init_state differs from that without a state", named(*mixer(x_BTD, start)), named(*want)
        )
        for name, state in (("None", None), ("init_state", start)):
            y_BTD, after = mixer(x_BTD, state, want_state=False)
            assert after is None, f"want_state=False gave {type(after).__name__}"
            rounding.check(
                f"with want_state=False from {name} differs", {"output": y_BTD}, {"output": want[0]}
            )


@law(
    "time",
    "the form that runs does not compute what the loop does",
    "borders of chunks, the part of the incoming state, a term that only one of the forms has",
    short=True,
)
@torch.no_grad()
def law_definition(mixer: Mixer, lengths: Sequence[int] = (*LENGTHS, LONG)) -> None:
    """The form that runs gives the loop's outputs and final state, from nothing and from a state."""
    dtype = dtype_of(mixer)
    loop, truth = loop_of(mixer, dtype), loop_of(mixer, torch.float64)
    for length in lengths:
        x_BTD = tokens(mixer, length)
        _, state = loop(tokens(mixer, 5, seed=1))
        for start, wide_start in ((None, None), (state, widened(state))):
            got, plain = outcome(mixer, x_BTD, start), plainly(outcome, loop, x_BTD, start)
            assert got["output"].dtype == dtype, f"outputs are {got['output'].dtype} for {dtype} tokens"
            true = named(*truth(x_BTD.double(), wide_start))
            assert list(got) == list(plain), f"{list(got)}, not {list(plain)}"
            for part, of_loop in plain.items():
                come = "nothing" if start is None else "a state"
                assert_right(f"{part} of {length} tokens from {come} differs", got[part], of_loop, true[part])


def gradients(
    mixer: Mixer, x_BTD: Tensor, state: State, sizes: Sequence[int], *, call: Callable | None = None
) -> dict[str, Tensor]:
    """Outputs and final state; and pulled back from both together, gradients of parameters, tokens and state.

    `sizes` cuts the tokens into the pieces of as many calls, of the mixer itself if not of `call`.
    """
    x_BTD = x_BTD.detach().clone().requires_grad_()
    state = map_state(state, lambda t: t.detach().clone().requires_grad_(differentiable(t)))
    results = named(*read_in_pieces(mixer if call is None else call, x_BTD, sizes, state))
    ends = {name: tensor for name, tensor in results.items() if differentiable(tensor)}
    for name, end in ends.items():
        assert end.requires_grad, f"{name} is cut off from what it was computed from"
    # drawn by explicit shape: randn_like follows strides, and two forms may lay out their results differently
    ups = [draw(*t.shape, dtype=t.dtype, seed=3 + i) for i, t in enumerate(ends.values())]
    wanted = {**dict(mixer.named_parameters()), "x": x_BTD, **named(x_BTD, state)}
    wanted = {name: t for name, t in wanted.items() if t.requires_grad and name != "output"}
    grads = torch.autograd.grad(list(ends.values()), list(wanted.values()), ups, allow_unused=True)
    for (name, t), grad in zip(wanted.items(), grads, strict=True):
        results[f"gradient of {name}"] = torch.zeros_like(t) if grad is None else grad
    return {name: tensor.detach() for name, tensor in results.items()}


@law(
    "gradients",
    "gradients are not the loop's",
    "detach() and .data, writes in place, a backward of your own",
    dtypes=(DOUBLE,),
)
def law_gradients(mixer: Mixer, lengths: Sequence[int] = (1, 65, LONG)) -> None:
    """Gradients of every parameter, of the tokens and of the incoming state equal the loop's."""
    dtype = dtype_of(mixer)
    loop, truth = loop_of(mixer, dtype), loop_of(mixer, torch.float64)
    with torch.no_grad():
        _, state = loop(tokens(mixer, 6, seed=1))
    for length in lengths:
        x_BTD = tokens(mixer, length)
        got, plain = (
            gradients(mixer, x_BTD, state, [length]),
            plainly(gradients, loop, x_BTD, state, [length]),
        )
        true = got if dtype == torch.float64 else gradients(truth, x_BTD.double(), widened(state), [length])
        for name, of_loop in plain.items():
            assert_right(f"{name} of {length} tokens differs", got[name], of_loop, true[name])


@law(
    "gradients",
    "gradients do not flow through the state",
    "detach() or no_grad() where a state comes in or goes out",
    dtypes=(DOUBLE,),
)
def law_gradients_through_state(mixer: Mixer, sizes: Sequence[int] = (33, 1, 66)) -> None:
    """Gradients flow through the state: over several calls they are what they are over one."""
    length = sum(sizes)
    x_BTD = tokens(mixer, length)
    with torch.no_grad():
        _, state = mixer(tokens(mixer, 6, seed=1))
    whole = gradients(mixer, x_BTD, state, [length])
    pieces = gradients(mixer, x_BTD, state, sizes)
    rounding = Rounding(mixer, x_BTD, state, lambda loop, u_BTD, s: gradients(loop, u_BTD, s, [length]))
    rounding.check(f"in {pieces_of(sizes)} differs", pieces, whole)


@law(
    "state",
    "the reported state size is not what is carried",
    "state_elements(n); a state that is a view keeps all of its source alive: clone it",
    dtypes=(DOUBLE,),
    short=True,
)
@torch.no_grad()
def law_state_size(mixer: Mixer, lengths: Sequence[int] = (*LENGTHS, LONG)) -> None:
    """state_elements(n) counts what is really carried after n tokens, however they were cut."""
    for length in (0, *lengths):
        x_BTD = tokens(mixer, max(length, 1))
        if length == 0:
            states = [mixer.init_state(2, dtype=x_BTD.dtype)]
        else:
            half = length // 2
            cuts = [[length], [half, length - half]] if half else [[length]]
            states = [read_in_pieces(mixer, x_BTD, cut)[1] for cut in cuts]
        for state in states:
            assert isinstance(state, mixer.state_type), (
                f"{type(state).__name__}, not {mixer.state_type.__name__}"
            )
            for name, tensor in named(x_BTD, state).items():
                assert tensor.shape[0] == 2, f"{name} of shape {tuple(tensor.shape)} has no row for each of 2"
            carried, claimed = elements_per_row(state), mixer.state_elements(length)
            assert carried == claimed, f"{carried} elements are carried after {length} tokens, not {claimed}"
            for name, tensor in zip(mixer.state_type._fields, state, strict=True):  # type: ignore[attr-defined]
                # a view of a larger tensor would keep all of that alive: for a prompt, its activations
                held, counted = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
                assert held == counted, (
                    f"state.{name} holds on to {held} bytes for {counted} after {length} tokens"
                )


@law(
    "state",
    "a state has the wrong dtype",
    "recurrent_dtype(dtype) in init_state, and the dtype of what forward returns",
    dtypes=(SINGLE, HALF),
)
@torch.no_grad()
def law_state_dtype(mixer: Mixer) -> None:
    """State tensors have the dtypes of init_state, and a recurrence is at least fp32 beside bf16 activations.

    A tensor is a recurrence if its size is fixed and it still knows the first token after more tokens than
    twice its slots, some of which may be behind a convolution that has slots of its own; any other is a
    cache, which has the activations' dtype or a wider one.
    """
    dtype = dtype_of(mixer)
    _, short = mixer(tokens(mixer, 2))
    longest = max((tensor.shape[1] for tensor in short if tensor.ndim > 1), default=0)
    x_BTD = tokens(mixer, 2 * max(longest, 4) + 1)
    other_BTD = torch.cat((tokens(mixer, 1, seed=1), x_BTD[:, 1:]), dim=1)
    (_, state), (_, other) = mixer(x_BTD), mixer(other_BTD)
    start = mixer.init_state(2, dtype=dtype)
    names = mixer.state_type._fields  # type: ignore[attr-defined]
    for name, first, early, now, after in zip(names, start, short, state, other, strict=True):
        assert first.dtype == now.dtype, f"state.{name} starts as {first.dtype} and becomes {now.dtype}"
        if not differentiable(now):
            continue
        least = dtype
        if early.shape == now.shape and not torch.equal(now, after):
            least = torch.promote_types(dtype, torch.float32)
        real = now.real.dtype if now.is_complex() else now.dtype
        assert torch.promote_types(real, least) == real, (
            f"state.{name} is {now.dtype}; it should be {least} at least"
        )


@law("state", "tokens that were taken back leave a trace", "_rolled_back, and rollback_limit")
@torch.no_grad()
def law_rollback(mixer: Mixer, lengths: Sequence[int] = (1, 5, 65)) -> None:
    """Tokens that were read and taken back are as good as never read; more than the limit are refused.

    Of what they were nothing is left, to the bit: others in their place, even NaN, lead to the same outputs
    and, once twice the limit of tokens have followed, to the same state, which then has the bits of a row
    that never read any, but for a mixer whose `rollback_rounds`. Until then outputs may differ from that
    row's by rounding, as the state was written meanwhile. Reading the same ones again gives the state that
    they gave. Each row is taken back by its own count; a state with room as one without.
    """
    limit = mixer.rollback_limit
    _assert_not_taken_back(mixer, limit + 1)
    if limit:
        mixer.rollback(mixer(tokens(mixer, limit))[1], limit)
    most = min(limit, 8)  # of a limit that is larger no state of a fixed size depends
    for length, count in itertools.product(lengths, sorted({1, most}) if limit else ()):
        prompt_BTD, rest_BTD = tokens(mixer, length + 2 * most).split([length, 2 * most], dim=1)
        drafts = [tokens(mixer, count, seed=1), torch.full_like(tokens(mixer, count), torch.nan)]
        _, state = mixer(prompt_BTD)
        after = [mixer(draft_BTD, state)[1] for draft_BTD in drafts]
        given = map_state(after[0], torch.clone)
        back = [mixer.rollback(tensors, count) for tensors in after]
        how = f"{count} tokens taken back of {length + count}"
        for name, old, new in zip(type(state)._fields, given, after[0], strict=True):
            assert_bitwise(f"state.{name}, as it was given, with {how}", new, old)

        def continued(start: State, rest_BTD: Tensor = rest_BTD) -> dict[str, Tensor]:
            return named(*read_in_pieces(mixer, rest_BTD, [1] * rest_BTD.shape[1], start))

        one, other, never = continued(back[0]), continued(back[1]), continued(state)
        for name, want in never.items():
            assert_bitwise(f"{name} after {how}, of one kind or another", one[name], other[name])
            if name != "output" and not mixer.rollback_rounds:
                assert_bitwise(f"{name} after {how}, long after", one[name], want)
        rounded = never if mixer.rollback_rounds else {"output": never["output"]}
        found = {name: one[name] for name in rounded}
        Rounding(mixer, rest_BTD, state).check(f"after {how} differs", found, rounded)

        again = named(*mixer(drafts[0], back[0]))
        first = named(again["output"], after[0])
        if mixer.rollback_rounds:
            Rounding(mixer, drafts[0], state).check(f"after {how} and read again differs", again, first)
        else:
            for name, want in first.items():
                assert_bitwise(f"{name} after {how} and read again", again[name], want)

        counts_B, kept = torch.tensor([count, 0]), map_state(after[0], torch.clone)
        roomy = mixer.with_room(after[0], length + count)
        if is_reserved(roomy):
            nan, none = (mixer.with_room(each, length + count + 2 * most) for each in (after[1], state))
            for name, want in continued(none).items():
                got = continued(mixer.rollback(nan, count))[name]
                assert_bitwise(f"{name} with room after {how}, which were NaN", got, want)
        both = join_rows([select_rows(back[0], [0]), select_rows(after[0], [1])])
        for own in (kept, roomy):
            mixed = mixer.rollback(own, counts_B, inplace=True)
            for name, old, new in zip(type(own)._fields, own, mixed, strict=True):  # type: ignore[union-attr]
                assert new.data_ptr() == old.data_ptr(), f"state.{name} is elsewhere, rolled back in place"
            for name, new, want in zip(type(state)._fields, trim(mixed), both, strict=True):
                for row in range(2):
                    how = f"row {row}, {counts_B.tolist()} tokens back"
                    assert_bitwise(f"state.{name} of {how}", new[row], want[row])


def _assert_not_taken_back(mixer: Mixer, count: int) -> None:
    """So many tokens cannot be taken back, and the mixer says so by name."""
    _, state = mixer(tokens(mixer, count + 1))
    try:
        mixer.rollback(state, count)
        said = "nothing: it takes them back"
    except StateError as error:
        said = str(error)
    limit = f"rollback_limit is {mixer.rollback_limit}"
    assert mixer.config.name in said, f"{count} tokens, where its {limit}, are refused by its name: {said}"
    assert limit in said, f"{count} tokens are refused by the {limit}: {said}"


@law("state", "a ring of tokens changes the outputs", "the part of the ring in the output")
@torch.no_grad()
def law_replay(mixer: Mixer, cuts: Sequence[Sequence[int]] = ((1,) * 20, (7, 1, 2, 33, 3), (65,))) -> None:
    """With a ring a mixer's outputs are those without one, of the same weights, however a text is cut."""
    if not getattr(mixer.config, "replay", 0):
        return
    plain = replace(mixer.config, replay=0).build().to(dtype_of(mixer)).eval()  # type: ignore[call-arg]
    plain.load_state_dict(mixer.state_dict())
    for sizes in cuts:
        x_BTD = tokens(mixer, sum(sizes))
        want_BTD, _ = plain(x_BTD)
        y_BTD, _ = read_in_pieces(mixer, x_BTD, sizes)
        outputs = {"output": y_BTD}, {"output": want_BTD}
        Rounding(mixer, x_BTD).check(f"with a ring, in {pieces_of(sizes)}, differs", *outputs)


@law(
    "state",
    "a state does not survive a file",
    "what a mixer remembers in itself instead of in its state",
    dtypes=(DOUBLE,),
)
@torch.no_grad()
def law_saved(mixer: Mixer, lengths: Sequence[int] = (1, 65), batches: Sequence[int] = (1, 2)) -> None:
    """A state is bit-identical when read from a file, and another copy of the mixer continues from it."""
    elsewhere = copy.deepcopy(mixer)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        for length, batch in itertools.product(lengths, batches):
            x_BTD, more_BTD = tokens(mixer, length, batch=batch), tokens(mixer, 3, batch=batch, seed=1)
            states = [mixer(u_BTD)[1] for u_BTD in (x_BTD, more_BTD)]
            try:
                save_states(states, file)
                loaded = load_states(file, [elsewhere, elsewhere])
            except (RuntimeError, ValueError) as error:  # RuntimeError: two tensors share their memory
                raise AssertionError(f"a state cannot be saved and loaded: {error}") from error
            for state, back in zip(states, loaded, strict=True):
                for name, tensor in named(x_BTD, state).items():
                    assert_bitwise(f"{name} from a file", named(x_BTD, back)[name], tensor)
                got, want = named(*elsewhere(more_BTD, back)), named(*mixer(more_BTD, state))
                for name, tensor in want.items():
                    assert_bitwise(f"{name} after a state from a file", got[name], tensor)
            for stack in ([elsewhere], [elsewhere] * 3):
                with contextlib.suppress(ValueError):
                    load_states(file, stack)
                    raise AssertionError(f"states of two layers were taken for those of {len(stack)}")


@law(
    "calls",
    "a wrong state is taken",
    "forward is wrapped by the check of Mixer: leave it in place, and let init_state give the true shapes",
    dtypes=(SINGLE,),
)
@torch.no_grad()
def law_state_border(mixer: Mixer) -> None:
    """A state of other rows, sizes, dtype or kind is refused by name, and never broadcast or cast.

    So are no tokens and tokens of another width. No rows are no rows of output and of state.
    """
    x_BTD = tokens(mixer, 5, batch=3)
    _, state = mixer(x_BTD)
    start = mixer.init_state(1, dtype=x_BTD.dtype)
    wrong = {
        "3 rows for 1 of tokens": (x_BTD[:1], state),
        "1 row for 3 of tokens": (x_BTD, select_rows(state, [0])),
        "no rows for 3 of tokens": (x_BTD, select_rows(state, [])),
        "a tuple that lacks the last field": (x_BTD, tuple(state)[:-1]),
        "another kind": (x_BTD, KeyValuePair(*(state * 2)[:2])),
        "no tokens": (x_BTD[:, :0], state),
        "another width": (x_BTD[..., :-1], state),
        "no time": (x_BTD[:, 0], state),
    }
    grows = mixer.state_elements(5) > mixer.state_elements(0)
    for field, tensor in state._asdict().items():
        own = getattr(start, field)
        others = {
            "1 row": tensor[:1],
            "another dimension": tensor[None].expand(3, *tensor.shape),
            "another dtype": tensor.to({DOUBLE: SINGLE, torch.long: torch.int}.get(tensor.dtype, DOUBLE)),
        }
        first = 2 if own.ndim > 1 and own.shape[1] == 0 and (grows or 0 in own.shape[2:]) else 1
        for dim in range(first, tensor.ndim):
            for length in {0, 1, tensor.shape[dim] + 1} - {tensor.shape[dim]}:
                shape = [*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]]
                others[f"shape {shape}"] = tensor.new_zeros(shape)
        for what, other in others.items():
            wrong[f"{field} of {what}"] = x_BTD, state._replace(**{field: other})
    for what, (u_BTD, other) in wrong.items():
        try:
            mixer(u_BTD, other)
            said = "nothing: it is taken"
        except ValueError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{what} ends in {type(error).__name__}: {error}") from error
        assert mixer.config.name in said, f"{what}, which should be refused by the mixer's name: {said}"
    for before in (None, select_rows(state, [])):
        y_BTD, after = mixer(x_BTD[:0], before)
        assert y_BTD.shape == x_BTD[:0].shape, f"no rows give outputs of {tuple(y_BTD.shape)}"
        assert all(len(tensor) == 0 for tensor in after), "no rows give rows of state"


class KeyValuePair(NamedTuple):
    """A state that no mixer has."""

    k_BK: Tensor
    v_BV: Tensor


@law(
    "dtypes",
    "autocast breaks the mixer",
    "dtypes that are taken from parameters instead of from activations",
    dtypes=(SINGLE,),
)
def law_autocast(mixer: Mixer, sizes: Sequence[int] = (1, 20, 13)) -> None:
    """Under autocast a mixer errs as in that dtype, in pieces too; gradients have their parameters' dtypes.

    States are as wide as `init_state` has them beside the same tokens.
    """
    x_BTD = tokens(mixer, sum(sizes)).requires_grad_()
    start = mixer.init_state(len(x_BTD), dtype=x_BTD.dtype)
    for dtype in (torch.bfloat16, torch.float16):
        try:
            with torch.autocast(x_BTD.device.type, dtype):
                whole, pieces = mixer(x_BTD), read_in_pieces(mixer, x_BTD, sizes)
            ends = [y for y in (whole[0], *whole[1]) if y.requires_grad]
            grads = torch.autograd.grad([y.float().square().mean() for y in ends], list(mixer.parameters()),
                                        allow_unused=True)  # fmt: skip
        except RuntimeError as error:
            raise AssertionError(f"under autocast to {dtype}: {error}") from error
        for field, first, now in zip(type(start)._fields, start, whole[1], strict=True):  # type: ignore[attr-defined]
            assert now.dtype == first.dtype, f"state.{field} is {now.dtype} under autocast, not {first.dtype}"
        for (name, parameter), grad in zip(mixer.named_parameters(), grads, strict=True):
            good = grad is None or (grad.dtype == parameter.dtype and grad.isfinite().all())
            assert good, f"gradient of {name} under autocast is {grad.dtype}, or not finite"
        with torch.no_grad():
            loop = loop_of(mixer, dtype)
            plain = plainly(lambda x_BTD: named(*loop(x_BTD)), x_BTD.to(dtype))  # noqa: B023 - called here
            truth = named(*loop_of(mixer, torch.float64)(x_BTD.double()))
            rounding = Rounding(twin(mixer, dtype=dtype), x_BTD.to(dtype))
            got, cut = (
                {n: t.to(plain[n].tensor.dtype) for n, t in named(*ends).items()} for ends in (whole, pieces)
            )
            for part, tensor in plain.items():
                assert_as_good_as_plain(f"{part} under autocast differs", got[part], tensor, truth[part])
            if "splits" not in mixer.refusals:
                rounding.check("in pieces under autocast differs", cut, got)


@law(
    "dtypes",
    "values overflow in fp16",
    "a readout that is narrowed before it is normalised",
    dtypes=(SINGLE,),
)
@torch.no_grad()
def law_fp16(mixer: Mixer, length: int = 60, scales: Sequence[float] = (40.0, 200.0)) -> None:
    """In fp16 nothing overflows on the way to outputs that fp32 has moderate, in the loop neither.

    All tokens are large, or the first one alone, which a recurrence then remembers beside the small ones.
    """
    small = copy.deepcopy(mixer).to(torch.float16)
    full, x_BTD = twin(small, dtype=SINGLE), tokens(small, length, batch=1)
    for each, scale in itertools.product((small, loop_of(small, torch.float16)), scales):
        for large_BTD in (scale * x_BTD, torch.cat((scale * x_BTD[:, :1], x_BTD[:, 1:] / 10), dim=1)):
            if size(full(large_BTD.float())[0]) < 1000:
                for name, tensor in named(*each(large_BTD)).items():
                    assert tensor.isfinite().all(), f"{name} is not finite in fp16, for tokens of {scale:g}"


@law(
    "dtypes",
    "the mixer errs more in bf16 than its loop does",
    "sums and cumulative products in bf16 that should be in fp32",
    dtypes=(SINGLE,),
)
@torch.no_grad()
def law_bf16(mixer: Mixer, lengths: Sequence[int] = (1, 65)) -> None:
    """In bf16 a mixer errs at most twice as much as its loop in bf16, both against the loop in fp64."""
    small = copy.deepcopy(mixer).to(torch.bfloat16)
    law_definition(small, lengths)


@law(
    "gradients",
    "second derivatives are wrong",
    "a backward of your own that treats what it saved as constants",
    dtypes=(DOUBLE,),
)
def law_second_derivative(mixer: Mixer, length: int = 20) -> None:
    """The gradient of a gradient is the loop's, or refused by name: never wrong in silence."""

    def second(mixer: Mixer) -> dict[str, Tensor]:
        leaves = {"x": tokens(mixer, length).requires_grad_(), **dict(mixer.named_parameters())}
        y_BTD, _ = mixer(leaves["x"], want_state=False)
        up_BTD, ways = draw(*y_BTD.shape, dtype=y_BTD.dtype, seed=3), []
        first = torch.autograd.grad(
            y_BTD, list(leaves.values()), up_BTD, create_graph=True, materialize_grads=True
        )
        # along one direction: what of the first does not depend on anything adds nothing
        for i, grad in enumerate(first):
            ways.append((grad * draw(*grad.shape, dtype=grad.dtype, seed=4 + i)).sum())
        along = torch.stack(ways).sum()
        if not along.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        grads = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, grads, strict=True))

    want = second(loop_of(mixer, dtype_of(mixer)))
    try:
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other attentions refuse
            got = second(mixer)
    except RuntimeError as error:
        if "is differentiated twice" in str(error):
            return
        raise AssertionError(f"cannot be differentiated twice: {error}") from error
    for name, grad in want.items():
        assert_close(f"second derivative by {name} differs", got[name], grad)


@law(
    "time",
    "values overflow over a long text",
    "exponentials and cumulative products that grow, where a difference of logarithms is needed",
    dtypes=(SINGLE,),
)
@torch.no_grad()
def law_sound(mixer: Mixer, length: int = 2000) -> None:
    """Nothing overflows or turns into NaN over a long text."""
    for name, tensor in named(*mixer(tokens(mixer, length, batch=1))).items():
        assert tensor.isfinite().all(), f"{name} is not finite after {length} tokens"


@law(
    "calls",
    "the same call gives another result",
    "random numbers in forward, and attributes that a call changes",
    dtypes=(DOUBLE,),
)
def law_deterministic(mixer: Mixer, length: int = 65) -> None:
    """The same call gives bit-identical outputs, state and gradients."""
    x_BTD, start = tokens(mixer, length), mixer.init_state(2, dtype=dtype_of(mixer))
    first, second = (gradients(mixer, x_BTD, start, [length]) for _ in range(2))
    for name, tensor in first.items():
        assert_bitwise(f"{name} in a second call", second[name], tensor)


@law(
    "gradients",
    "copies cannot be trained as one",
    "branches on values, .item(), parameters kept outside of the module",
    dtypes=(DOUBLE,),
)
def law_vmapped(mixer: Mixer, length: int = 65) -> None:
    """Copies with weights of their own run as one under vmap, and learn the same: populations train so."""
    stage, *copies = (copy.deepcopy(mixer) for _ in range(3))
    with torch.no_grad():
        for i, parameter in enumerate(copies[1].parameters()):
            parameter.add_(0.1 * draw(*parameter.shape, dtype=parameter.dtype, seed=i))
    x_NBTD = torch.stack([tokens(mixer, length, seed=i) for i in range(2)])
    up_NBTD = draw(*x_NBTD.shape, dtype=x_NBTD.dtype, seed=3)
    parameters, buffers = torch.func.stack_module_state(copies)

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x_BTD: Tensor) -> Tensor:
        return torch.func.functional_call(stage, (parameters, buffers), (x_BTD,), {"want_state": False})[0]

    try:
        # of PyTorch's attentions only this one runs side by side on a CPU; the others would be looped over
        with sdpa_kernel(SDPBackend.MATH):
            y_NBTD = torch.func.vmap(one)(parameters, buffers, x_NBTD)
        grads = torch.autograd.grad(y_NBTD, list(parameters.values()), up_NBTD, allow_unused=True)
    except RuntimeError as error:
        raise AssertionError(f"cannot be vmapped: {error}") from error
    # a module listed under two names is not put back as it was, and spoils whatever runs next
    for (name, parameter), before in zip(stage.named_parameters(), mixer.parameters(), strict=True):
        assert not torch._C._functorch.is_batchedtensor(parameter), f"{name} stays behind vmapped"
        assert_bitwise(f"{name} after vmap", parameter, before)
    for i, alone in enumerate(copies):
        y_BTD, _ = alone(x_NBTD[i], want_state=False)
        own = torch.autograd.grad(y_BTD, list(alone.parameters()), up_NBTD[i], allow_unused=True)
        assert_close(f"output of copy {i} differs", y_NBTD[i], y_BTD)
        for (name, parameter), got, want in zip(alone.named_parameters(), grads, own, strict=True):
            want = torch.zeros_like(parameter) if want is None else want
            assert_close(
                f"gradient of {name} of copy {i} differs",
                torch.zeros_like(want) if got is None else got[i],
                want,
            )


@law(
    "compiler",
    "torch.compile changes or breaks the mixer",
    "graph breaks: branches on values, .item(), printing",
    dtypes=(DOUBLE,),
)
def law_compiled(mixer: Mixer, backend: str = "aot_eager", length: int = 20) -> None:
    """torch.compile takes all of a mixer in one graph, from nothing and from a state, and back."""
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend=backend)
    x_BTD = tokens(mixer, length)
    with torch.no_grad():
        _, state = mixer(tokens(mixer, 6, seed=1))
        want = named(*mixer(x_BTD))
    try:
        with torch.no_grad():
            got = named(*compiled(x_BTD))
        trained = gradients(mixer, x_BTD, state, [length], call=compiled)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise AssertionError(f"cannot be compiled as one graph: {error}") from error
    Rounding(mixer, x_BTD).check(f"compiled by {backend} differs", got, want)
    for name, tensor in gradients(mixer, x_BTD, state, [length]).items():
        assert_close(f"{name} compiled by {backend} differs", trained[name], tensor)


# ------------------------------------------------------------------------------------------------- judgement


@dataclass(frozen=True)
class Verdict:
    """What came of holding one variant of a mixer to one law."""

    law: Law
    case: Case
    status: Literal["holds", "broken", "refused", "skipped"]
    says: str = ""
    """What is broken, in a sentence with its numbers; or why the law is refused, or was skipped."""
    error: float | None = None
    """How far apart numbers are that should be equal."""
    explained: float | None = None
    """How far apart rounding may have brought them."""


def judge(case: Case, law: Law) -> Verdict:
    """Hold a mixer to a law in the first of the law's dtypes. Its own errors are a broken law, too."""
    if law.name == "recorded" and not torch.cuda.is_available():
        return Verdict(law, case, "skipped", "needs a GPU")
    try:
        mixer = case.mixer(law.dtypes[0])
        if reason := mixer.refusals.get(law.name):
            if breaks(mixer, law):
                return Verdict(law, case, "refused", reason)
            return Verdict(
                law, case, "broken", "the mixer refuses this law and yet obeys it: take the refusal away"
            )
        law(mixer)
    except BrokenLawError as fault:
        measured = f"by {fault.error:.2g} where rounding explains {fault.explained:.2g}"
        return Verdict(
            law, case, "broken", f"{fault.name}: {law.broken}, {measured}", fault.error, fault.explained
        )
    except AssertionError as fault:
        return Verdict(law, case, "broken", f"{fault}: {law.broken}")
    except Exception as error:  # whatever a user's own forward may raise
        where = errors.loaded_line(error)
        first = str(error).partition("\n")[0]
        says = f"{type(error).__name__}{f' in {where}' if where else ''}: {first}"
        return Verdict(law, case, "broken", says)
    return Verdict(law, case, "holds")


def breaks(mixer: Mixer, law: Callable[..., None], *args: Any) -> bool:
    """Whether a mixer breaks a law that it refuses, or declines to be asked."""
    # what breaks a law is far larger than rounding, which nudged runs would measure for seconds
    plain_bounds = unittest.mock.patch.object(sys.modules[__name__], "RUNS", 0)
    with plain_bounds:
        try:
            law(mixer, *args)
        except (AssertionError, NotImplementedError):
            return True
    return False
