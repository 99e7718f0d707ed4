"""The matrix that a sequence mixer applies along the sequence, for one given input.

    o_t = sum_j M_tj v_j        what a mixer's output takes from each token's value

Softmax attention's M holds its weights, a convolution's is Toeplitz, a window's is banded, and a recurrence
with a state of n numbers per value channel has M[t:, :t] of rank <= n for every t (it is semiseparable): the
state is all that passes from the past to the future, so that rank is the memory which the matrix needs.

Two kinds, and every result says which it is:

    exact       The shared maths (holdall.ops, and functions in the mixer's own file) takes values as an
                argument named by its shape, v_BTHV, x_BTD, u_BTD or b_BTX. One forward pass is watched; each
                such function is called again on impulses, value 1 at one token j, and answers with column j
                of M. That it is linear in its values is not believed but checked: M v plus what it answers
                to zeros must give the recorded output to rounding. Where a mixer has several (a short
                convolution, then a scan), the one that couples the most pairs of tokens is its matrix, of
                equals the last; the others are named beside it. And if some output depends on a token that
                none of them couples it with, even in a chain, then the mixer mixes in a way that is not
                seen here, and none of them is its matrix. What happens to the function's output afterwards,
                a gate, a norm, a mask, is not in it.
    jacobian    For all other mixers: G_tj = || d y_t / d x_j ||, Frobenius, of the whole mixer with its
                gates, projections and skips.

Letters: T output token, J input token, X all channels, D model width, S matrices shown.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from holdall.analysis.gallery import MixingMatrix
from holdall.contract import Mixer, MixerConfig
from holdall.tasks.mqar import MQAR

INPUTS = ("random", "repeats", "constant")
VALUES = re.compile(r"[vxub]_([A-Z]*T[A-Z0-9]*)")
"""Arguments that may hold values: v, x, u or b, and shape letters with time among them."""
LETTERS = "vxub"
"""In this order: linear attention without a norm is linear in its keys too, but v are the values."""
ROUNDING = 1e-9
"""Two fp64 numbers that are the same on paper differ by less than this share of the largest beside them."""
TOKENS_AT_ONCE = 1 << 14
"""Of the rows that go through a mixer together for its Jacobian: bounds the memory."""
BLOCK = 1024
"""Side of the largest block of a Jacobian whose rank is computed."""


# ----------------------------------------------------------------------------------------------- inputs


class Input(NamedTuple):
    """One row of embedded tokens in fp64, their ids, and a name for each (none where no two are alike)."""

    x_BTD: Tensor
    tokens_BT: Tensor
    names: tuple[str, ...]


def inputs(kind: str, length: int, width: int, *, scale: float = 1.0, seed: int = 0) -> Input:
    """An input for a mixer.

    kind: "random", all tokens unlike; "repeats", a row of associative recall from few tokens: key-value
        pairs, then questions among filler; "constant", one token again and again, which shows what
        position alone does.
    scale: the standard deviation of the numbers of an embedding.
    """
    names: list[str] = []
    if kind == "random":
        tokens_T = torch.arange(length)
    elif kind == "repeats":
        pairs = max(1, length // 16)
        task = MQAR(vocab=2 * pairs + 2, length=length, pairs=pairs, power=1, filler="random")
        tokens_T = task.generate(1, seed).tokens[0]
        names = [f"key {i}" if i <= pairs else f"value {i - pairs}" for i in tokens_T.tolist()]
    elif kind == "constant":
        tokens_T, names = torch.zeros(length, dtype=torch.long), ["the token"] * length
    else:
        raise ValueError(f"unknown input '{kind}'; known: {', '.join(INPUTS)}")
    generator = torch.Generator().manual_seed(seed)
    embedding_ED = torch.randn(int(tokens_T.max()) + 1, width, generator=generator, dtype=torch.float64)
    return Input(scale * embedding_ED[tokens_T][None], tokens_T[None], tuple(names))


# --------------------------------------------------------------------------------------------- one mixer


def matrix_of(
    config: MixerConfig,
    *,
    length: int,
    kind: str = "random",
    scale: float = 1.0,
    seed: int = 0,
    label: str = "",
    shown: int = 1,
    jacobian: bool = False,
) -> MixingMatrix:
    """The matrix of a freshly built mixer for an input of `inputs`; the seed decides both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = config.build().double()
        x_BTD, tokens_BT, _ = inputs(kind, length, config.width, scale=scale, seed=seed)
        return mixing_matrix(mixer, x_BTD, tokens_BT, label=label, shown=shown, jacobian=jacobian)


def mixing_matrix(
    mixer: Mixer,
    x_BTD: Tensor,
    tokens_BT: Tensor | None = None,
    *,
    label: str = "",
    shown: int = 1,
    jacobian: bool = False,
) -> MixingMatrix:
    """The matrix of `mixer` for the one row of x_BTD; both in fp64, so that rounding is told from structure.

    Args:
        tokens_BT: the tokens' ids, for mixers that read them; None if no two are alike.
        shown: how many heads or channels to keep, spread evenly.
        jacobian: take the Jacobian even where the exact matrix is known.

    Raises:
        ValueError: the matrix holds numbers that are not finite.
    """
    mixer = mixer.eval()
    found = [] if jacobian else exact_matrices(mixer, x_BTD, tokens_BT)
    label = label or mixer.config.name
    if not found or not explained(dependence(mixer, x_BTD, tokens_BT), found):
        return _jacobian_matrix(mixer, x_BTD, tokens_BT, label)
    best = max(reversed(found), key=lambda each: each.couplings)
    beside = tuple(dict.fromkeys(each.source for each in found if each is not best))
    matrix_TJX = best.matrix_TJX
    _check_finite(matrix_TJX)
    count = matrix_TJX.shape[2]
    places = np.linspace(0, count - 1, min(shown, count)).round().astype(int).tolist()
    matrices_XTJ = matrix_TJX.permute(2, 0, 1)
    return MixingMatrix(
        label=label,
        kind="exact",
        source=best.source + " (real part)" * matrix_TJX.is_complex(),
        beside=beside,
        unit=best.unit,
        count=count,
        shown=tuple(places),
        values_STJ=matrices_XTJ[places].real.numpy(),
        state=mixer.state_elements(x_BTD.shape[1] // 2),
        error=best.error,
        **_describe(matrices_XTJ),
        **ranks(lower_left(matrices_XTJ), matrices_XTJ),
    )


def _outputs(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None) -> Tensor:
    """What the mixer makes of x_BTD; the tokens' ids are the same in all rows."""
    if not mixer.reads_tokens:
        return mixer(x_BTD)[0]
    if tokens_BT is None:
        tokens_BT = torch.arange(x_BTD.shape[1])[None]
    return mixer(x_BTD, tokens_BT=tokens_BT.expand(len(x_BTD), -1))[0]


def _check_finite(matrix: Tensor) -> None:
    if not matrix.isfinite().all():
        raise ValueError("its matrix holds numbers that are not finite")


# ------------------------------------------------------------------------------------------------- exact


@dataclass(frozen=True, kw_only=True, eq=False)
class Exact:
    """One function's matrix: (T, J, X) with the heads or channels last."""

    source: str
    unit: Literal["head", "channel"]
    matrix_TJX: Tensor
    error: float

    def coupled(self, share: float) -> Tensor:
        """Which pairs of different tokens are coupled, by more than this share of the largest entry."""
        size_TJ = self.matrix_TJX.abs().amax(-1)
        return (size_TJ > share * size_TJ.max()).fill_diagonal_(False)

    @functools.cached_property
    def couplings(self) -> int:
        return int(self.coupled(ROUNDING).sum())


@dataclass(eq=False)
class Call:
    """A call of a function that may be linear in one of its arguments, as it was seen."""

    function: FunctionType
    arguments: dict[str, Any]
    parent: Call | None
    output: Any = None


def exact_matrices(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> list[Exact]:
    """The matrices of all functions that couple tokens and are linear in their values, in the order of calls.

    A function that is not linear as a whole may call one that is; one that is linear hides what it calls.
    """
    length, linear = x_BTD.shape[1], set[int]()
    calls = watch(mixer, x_BTD, tokens_BT)
    found: list[Exact] = []
    for call in calls:  # callers before what they call
        if id(call.parent) in linear:
            linear.add(id(call))
            continue
        for name in sorted(_value_arguments(call.function), key=lambda name: LETTERS.index(name[0])):
            exact = _exact(call, name, length)
            if exact is not None:
                linear.add(id(call))
                if exact.couplings:
                    found.append(exact)
                break
    return found


def explained(depends_TJ: Tensor, found: Sequence[Exact]) -> bool:
    """Whether every dependence of an output on a token runs along couplings that were found.

    A coupling may be far fainter than the dependence that it has to explain: gates and projections lie
    between them. Only what is zero to rounding explains nothing.
    """
    step_TJ = torch.eye(len(depends_TJ), dtype=torch.float64)
    for each in found:
        step_TJ += each.coupled(1e-14)
    reached_TJ = torch.linalg.matrix_power(step_TJ, len(found)) > 0
    return not (depends_TJ & ~reached_TJ).any()


def dependence(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> Tensor:
    """Which outputs depend on which tokens, (T, J): the slope of each output in one random direction."""
    length = x_BTD.shape[1]
    rows_RTD = x_BTD.expand(length, -1, -1).clone().requires_grad_()
    y_RTD = _outputs(mixer, rows_RTD, tokens_BT)
    place_R = torch.arange(length)
    direction_D = torch.randn(y_RTD.shape[2], generator=torch.Generator().manual_seed(0), dtype=y_RTD.dtype)
    (slope_RJD,) = torch.autograd.grad((y_RTD[place_R, place_R] @ direction_D).sum(), rows_RTD)
    size_TJ = slope_RJD.abs().amax(-1)
    return size_TJ > 1e-6 * size_TJ.max()


def watch(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> list[Call]:
    """The calls of one forward pass in which values may be mixed, in the order in which they began.

    Functions are recognised by their code as the interpreter enters and leaves them, so it does not matter
    how a mixer holds them: by name, as an attribute, inside a partial.
    """
    known = _functions(mixer)
    calls: list[Call] = []
    open_calls: list[tuple[FrameType, Call]] = []

    def see(frame: FrameType, event: str, result: Any) -> None:
        function = known.get(frame.f_code)
        if function is None:
            return
        if event == "call":
            names = inspect.signature(function).parameters
            arguments = {name: frame.f_locals[name] for name in names}
            call = Call(function, arguments, open_calls[-1][1] if open_calls else None)
            calls.append(call)
            open_calls.append((frame, call))
        elif event == "return" and open_calls and open_calls[-1][0] is frame:
            open_calls.pop()[1].output = result

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        with torch.no_grad():
            _outputs(mixer, x_BTD, tokens_BT)
    finally:
        sys.setprofile(before)
    return calls


def _functions(mixer: Mixer) -> dict[CodeType, FunctionType]:
    """By their code, all functions with values among their arguments: in holdall.ops, and wherever the
    classes of the mixer and of its parts were written."""
    names = {cls.__module__ for part in mixer.modules() for cls in type(part).__mro__}
    names = {name for name in names if not name.startswith("torch.")}
    names |= {name for name in sys.modules if name.startswith("holdall.ops.")}
    found = {}
    for name in names & sys.modules.keys():
        for value in list(vars(sys.modules[name]).values()):
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and _value_arguments(function):
                found[function.__code__] = value
    return found


def _value_arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments that may hold values; none if it takes arguments without names."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        return []
    return [p.name for p in parameters if VALUES.fullmatch(p.name)]


def _exact(call: Call, name: str, length: int) -> Exact | None:
    """The matrix of a call in one of its arguments, if it is linear in it channel by channel."""
    value, output = call.arguments[name], _first(call.output)
    letters = name.partition("_")[2]
    time = letters.index("T")
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    if not isinstance(output, Tensor) or output.is_complex() != value.is_complex():
        return None
    if not all(u.ndim > time and u.shape[time] == length for u in (value, output)):
        return None
    # time first, and no dimension of one: v_TX and o_TX, X any number of dimensions
    rest = [letter for letter, size in zip(letters, value.shape, strict=False) if size > 1 and letter != "T"]
    channels = [size for dim, size in enumerate(value.shape) if size > 1 and dim != time]

    def rows(u: Tensor) -> Tensor:
        u_TX = u.movedim(time, 0)
        return u_TX.reshape(length, *(size for size in u_TX.shape[1:] if size > 1))

    def respond(v: Tensor) -> Tensor:
        return rows(_first(call.function(**{**call.arguments, name: v})))

    v_TX, o_TX = rows(value), rows(output)
    if v_TX.shape != o_TX.shape:
        return None
    shape = [length if dim == time else 1 for dim in range(value.ndim)]
    impulses = torch.eye(length, dtype=value.dtype).view(length, *shape).expand(length, *value.shape)
    with torch.no_grad():
        offset_TX = respond(torch.zeros_like(value))
        response_JTX = _each(respond, impulses) - offset_TX
        rebuilt_TX = torch.einsum("jt...,j...->t...", response_JTX, v_TX) + offset_TX
    error = float((rebuilt_TX - o_TX).abs().max() / o_TX.abs().max().clamp(min=1e-300))
    if not error < ROUNDING:
        return None
    matrix_TJX, size = response_JTX.transpose(0, 1), response_JTX.abs().max()
    while channels and ((matrix_TJX - matrix_TJX[..., :1]).abs() <= ROUNDING * size).all():
        matrix_TJX = matrix_TJX[..., 0]  # the same for all of its last dimension
        channels.pop()
    return Exact(
        source=call.function.__name__,
        unit="head" if set(rest[: len(channels)]) <= {"B", "H"} else "channel",
        matrix_TJX=matrix_TJX.reshape(length, length, -1),
        error=error,
    )


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _each(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The function of each of the inputs: all at once if it can be, else one after the other."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operations that vmap runs one after the other
            return torch.func.vmap(function, chunk_size=64)(inputs)
    except (RuntimeError, ValueError):
        return torch.stack([function(each) for each in inputs])


# ---------------------------------------------------------------------------------------------- Jacobian


def _jacobian_matrix(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None, label: str) -> MixingMatrix:
    norm_TJ, block = jacobian(mixer, x_BTD, tokens_BT)
    _check_finite(norm_TJ)
    full = x_BTD.shape[1] // 2 * x_BTD.shape[2]
    known: dict[str, Any] = {"rank": None, "rank_1": None, "full_rank": full}
    if block is not None:
        known = ranks(block[None], block[None])
    return MixingMatrix(
        label=label,
        kind="jacobian",
        source="",
        beside=(),
        unit="mixer",
        count=1,
        shown=(0,),
        values_STJ=norm_TJ[None].numpy(),
        state=mixer.state_elements(x_BTD.shape[1] // 2),
        error=0.0,
        **_describe(norm_TJ[None]),
        **known,
    )


def jacobian(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """G_tj = || d y_t / d x_j ||, and d y[N/2:] / d x[:N/2] as a matrix if it is not too large.

    Rows of a batch never see each other, so one backward pass through many equal rows, from another output
    number in each, gives as many rows of the Jacobian: this needs nothing but the contract.
    """
    _, length, width = x_BTD.shape
    half, squares_TJ = length // 2, torch.zeros(length, length, dtype=x_BTD.dtype)
    block: list[Tensor] | None = [] if max(length - half, half) * width <= BLOCK else None
    places = torch.arange(length * width)
    for some in places.split(max(1, TOKENS_AT_ONCE // length)):
        rows_RTD = x_BTD.expand(len(some), -1, -1).clone().requires_grad_()
        y_RTD = _outputs(mixer, rows_RTD, tokens_BT)
        chosen_R = y_RTD.flatten(1).gather(1, some[:, None])
        (gradient_RJD,) = torch.autograd.grad(chosen_R.sum(), rows_RTD)
        squares_TJ.index_add_(0, some // width, gradient_RJD.square().sum(-1))
        if block is not None:
            block.append(gradient_RJD[some >= half * width, :half].flatten(1))
    return squares_TJ.sqrt(), None if block is None else torch.cat(block)


# ------------------------------------------------------------------------------------- what can be said


def lower_left(matrix_XTJ: Tensor) -> Tensor:
    """What the second half of the sequence takes from the first."""
    half = matrix_XTJ.shape[-1] // 2
    return matrix_XTJ[..., half:, :half]


def _describe(matrix_XTJ: Tensor) -> dict[str, Any]:
    size_XTJ = matrix_XTJ.abs()
    causal = bool(size_XTJ.triu(1).max() <= ROUNDING * size_XTJ.max())
    there_TJ = torch.ones_like(size_XTJ[0], dtype=torch.bool)
    small_XTJ = size_XTJ <= 1e-3 * size_XTJ.amax(-1, keepdim=True)
    return {
        "causal": causal,
        "toeplitz": toeplitz_distance(matrix_XTJ),
        "sparsity": float(small_XTJ[:, there_TJ.tril() if causal else there_TJ].double().mean()),
    }


def toeplitz_distance(matrix_XTJ: Tensor) -> float:
    """How far the farthest matrix is from its nearest Toeplitz matrix, the means of its diagonals."""
    length = matrix_XTJ.shape[-1]
    lag_TJ = torch.arange(length)[:, None] - torch.arange(length) + length - 1
    entries_XE = matrix_XTJ.flatten(1)
    sums_XL = entries_XE.new_zeros(len(entries_XE), 2 * length - 1).index_add_(
        1, lag_TJ.flatten(), entries_XE
    )
    mean_XL = sums_XL / lag_TJ.flatten().bincount()
    off_X = (entries_XE - mean_XL[:, lag_TJ.flatten()]).abs().square().sum(-1).sqrt()
    return float((off_X / entries_XE.abs().square().sum(-1).sqrt().clamp(min=1e-300)).max())


def ranks(block_XTJ: Tensor, whole_XTJ: Tensor) -> dict[str, Any]:
    """Of the block, to rounding beside the whole matrix and to 1%; the largest over all matrices."""
    values_XR = torch.linalg.svdvals(block_XTJ)
    rounding_X1 = 1e-12 * whole_XTJ.abs().square().sum((-2, -1)).sqrt()[:, None]
    real_XR = values_XR * (values_XR > rounding_X1)
    left_XR = real_XR.square().flip(-1).cumsum(-1).flip(-1)  # what is missing if only those before are kept
    needed_XR = left_XR > (0.01**2) * left_XR[:, :1]
    return {
        "rank": int((real_XR > 0).sum(-1).max()),
        "rank_1": int(needed_XR.sum(-1).max()),
        "full_rank": min(block_XTJ.shape[-2:]),
    }
