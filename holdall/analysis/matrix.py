"""The matrix that a sequence mixer applies along the sequence, for one given input.

    o_t = sum_j M_tj v_j        the contribution of each token's value to each output

Softmax attention's M holds the attention weights, a convolution's is Toeplitz, a window's is banded, and that
of a recurrence with n state elements per value channel has rank(M[t:, :t]) <= n for every t (it is
semiseparable): only the state passes from the past to the future, so this rank is the memory that M needs.

There are two kinds, and every result says which it is:

    exact       The functions that mix tokens (in holdall.ops and in the mixer's own file) take values as an
                argument named by its shape: v_BTHV, x_BTD, u_BTD or b_BTX. One forward pass is traced; each
                such function is called again on impulses, value 1 at token j, which gives column j of M.
                Linearity in the values is checked: M v plus the output for zeros must equal the recorded
                output up to rounding. If a mixer has several such functions (a short convolution, then a
                scan), its matrix is that of the one which couples the most pairs of tokens, the last of
                equals; the others are listed beside it. If an output depends on a token that these functions
                do not couple, not even in a chain, then the mixer mixes in some other way and has no exact
                matrix. What follows the function, such as a gate, a norm or a mask, is not part of M.
    jacobian    For all other mixers: G_tj = || d y_t / d x_j ||, the Frobenius norm, of the whole mixer with
                its gates, projections and skips.

Letters: T output token, J input token, X all channels, D model width, S matrices shown.
"""

from __future__ import annotations

import copy
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
from holdall.model import Model
from holdall.tasks.mqar import MQAR

INPUTS = ("random", "repeats", "constant")
VALUES = re.compile(r"[vxub]_([A-Z]*T[A-Z0-9]*)")
"""Names of arguments that may hold values: v, x, u or b, and shape letters that include T."""
LETTERS = "vxub"
"""Tried in this order: linear attention without a norm is linear in its keys too, but v are the values."""
ROUNDING = 1e-9
"""fp64 values that are equal in exact arithmetic differ by less than this share of the largest."""
TOKENS_AT_ONCE = 1 << 14
"""Tokens per pass of a Jacobian, all rows together; bounds the memory."""
BLOCK = 1024
"""Side of the largest block of a Jacobian whose rank is computed."""


# ----------------------------------------------------------------------------------------------- inputs


class Input(NamedTuple):
    """One row of embedded tokens in fp64, their ids, and a name for each (none if all tokens differ)."""

    x_BTD: Tensor
    tokens_BT: Tensor
    names: tuple[str, ...]


def inputs(kind: str, length: int, width: int, *, scale: float = 1.0, seed: int = 0) -> Input:
    """An input for a mixer.

    kind: "random", all tokens different; "repeats", a row of associative recall from a small vocabulary:
        key-value pairs, then questions among filler; "constant", one token repeated, which shows the effect
        of position alone.
    scale: the standard deviation of the embeddings' elements.
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
    """The matrix of a freshly initialised mixer for one of `inputs`; both depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = config.build().double()
        x_BTD, tokens_BT, _ = inputs(kind, length, config.width, scale=scale, seed=seed)
        return mixing_matrix(mixer, x_BTD, tokens_BT, label=label, shown=shown, jacobian=jacobian)


def matrices_of_model(
    model: Model, tokens_1T: Tensor, depths: Sequence[int], *, shown: int = 1, jacobian: bool = False
) -> list[MixingMatrix]:
    """The matrices of a trained model's layers for one text, each for what the layer reads of it.

    Args:
        tokens_1T: the text's ids.
        depths: of the layers, from 0.
        shown, jacobian: as in `mixing_matrix`.
    """
    inputs_BTD: dict[int, Tensor] = {}
    shared_BTD: dict[int, Tensor] = {}

    def keep(depth: int) -> Callable[..., None]:
        def hook(mixer: Any, args: tuple[Any, ...], how: dict[str, Any]) -> None:
            inputs_BTD[depth] = args[0].detach()
            if (shared := how.get("shared_BTD")) is not None:
                shared_BTD[depth] = shared.detach().cpu().double()

        return hook

    hooks = [
        model.mixers[depth].register_forward_pre_hook(keep(depth), with_kwargs=True) for depth in set(depths)
    ]
    try:
        with torch.no_grad():
            model.hidden(tokens_1T.to(model.device), want_states=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for depth in depths:
        mixer = copy.deepcopy(model.mixers[depth]).cpu().double()
        if depth in shared_BTD:
            _share(mixer, shared_BTD[depth])
        x_BTD, label = inputs_BTD[depth].cpu().double(), f"layer {depth}, {mixer.config.name}"
        found.append(
            mixing_matrix(mixer, x_BTD, tokens_1T.cpu(), label=label, shown=shown, jacobian=jacobian)
        )
    return found


def _share(mixer: Mixer, shared_1TD: Tensor) -> None:
    """Have a mixer read what an earlier layer shares of the text: the same in all rows, and held fixed."""
    forward: Any = mixer.forward

    def with_shared(x_BTD: Tensor, *args: Any, **how: Any) -> Any:
        return forward(x_BTD, *args, shared_BTD=shared_1TD.expand(len(x_BTD), -1, -1), **how)

    mixer.forward = with_shared  # type: ignore[method-assign]


def mixing_matrix(
    mixer: Mixer,
    x_BTD: Tensor,
    tokens_BT: Tensor | None = None,
    *,
    label: str = "",
    shown: int = 1,
    jacobian: bool = False,
) -> MixingMatrix:
    """The matrix of `mixer` for the one row of x_BTD; both in fp64, to distinguish structure from rounding.

    Args:
        tokens_BT: the tokens' ids, for mixers that read them; None if all tokens differ.
        shown: number of heads or channels to return, evenly spread.
        jacobian: compute the Jacobian even if the mixer has an exact matrix.

    Raises:
        ValueError: the matrix has entries that are NaN or infinite.
    """
    mixer = mixer.eval()
    matrices = [] if jacobian else exact_matrices(mixer, x_BTD, tokens_BT)
    label = label or mixer.config.name
    if not matrices or not explained(dependence(mixer, x_BTD, tokens_BT), matrices):
        return _jacobian_matrix(mixer, x_BTD, tokens_BT, label)
    best = max(reversed(matrices), key=lambda matrix: matrix.couplings)
    beside = tuple(dict.fromkeys(matrix.source for matrix in matrices if matrix is not best))
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
    """The mixer's outputs for x_BTD; the tokens' ids are the same in all rows."""
    if not mixer.reads_tokens:
        return mixer(x_BTD)[0]
    if tokens_BT is None:
        tokens_BT = torch.arange(x_BTD.shape[1])[None]
    return mixer(x_BTD, tokens_BT=tokens_BT.expand(len(x_BTD), -1))[0]


def _check_finite(matrix: Tensor) -> None:
    if not matrix.isfinite().all():
        raise ValueError("its matrix has entries that are NaN or infinite")


# ------------------------------------------------------------------------------------------------- exact


@dataclass(frozen=True, kw_only=True, eq=False)
class Exact:
    """The matrix of one function, (T, J, X), with the heads or channels last."""

    source: str
    unit: Literal["head", "channel"]
    matrix_TJX: Tensor
    error: float

    def coupled(self, share: float) -> Tensor:
        """Which pairs of different tokens are coupled, by more than `share` of the largest entry, (T, J)."""
        size_TJ = self.matrix_TJX.abs().amax(-1)
        return (size_TJ > share * size_TJ.max()).fill_diagonal_(False)

    @functools.cached_property
    def couplings(self) -> int:
        return int(self.coupled(ROUNDING).sum())


@dataclass(eq=False)
class Call:
    """A traced call of a function that may be linear in one of its arguments."""

    function: FunctionType
    arguments: dict[str, Any]
    parent: Call | None
    output: Any = None


def exact_matrices(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> list[Exact]:
    """The matrices of all functions that couple tokens and are linear in their values, in order of calls.

    A function that is not linear may call one that is; calls within a linear function are skipped.
    """
    length, linear = x_BTD.shape[1], set[int]()
    calls = watch(mixer, x_BTD, tokens_BT)
    matrices: list[Exact] = []
    for call in calls:  # callers come before what they call
        if id(call.parent) in linear:
            linear.add(id(call))
            continue
        for name in sorted(_value_arguments(call.function), key=lambda name: LETTERS.index(name[0])):
            exact = _exact(call, name, length)
            if exact is not None:
                linear.add(id(call))
                if exact.couplings:
                    matrices.append(exact)
                break
    return matrices


def explained(depends_TJ: Tensor, matrices: Sequence[Exact]) -> bool:
    """Whether every dependence of an output on a token is a chain of couplings in these matrices.

    A coupling may be much weaker than the dependence that it explains, since gates and projections come
    between them; only couplings that are zero up to rounding are excluded.
    """
    step_TJ = torch.eye(len(depends_TJ), dtype=torch.float64)
    for matrix in matrices:
        step_TJ += matrix.coupled(1e-14)
    reached_TJ = torch.linalg.matrix_power(step_TJ, len(matrices)) > 0
    return not (depends_TJ & ~reached_TJ).any()


def dependence(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> Tensor:
    """Which outputs depend on which tokens, (T, J) bool, by the gradient of one random projection of each."""
    length = x_BTD.shape[1]
    rows_RTD = x_BTD.expand(length, -1, -1).clone().requires_grad_()
    y_RTD = _outputs(mixer, rows_RTD, tokens_BT)
    place_R = torch.arange(length)
    direction_D = torch.randn(y_RTD.shape[2], generator=torch.Generator().manual_seed(0), dtype=y_RTD.dtype)
    (slope_RJD,) = torch.autograd.grad((y_RTD[place_R, place_R] @ direction_D).sum(), rows_RTD)
    size_TJ = slope_RJD.abs().amax(-1)
    return size_TJ > 1e-6 * size_TJ.max()


def watch(mixer: Mixer, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> list[Call]:
    """The calls in one forward pass of functions that may mix values, in the order in which they began.

    A profiling hook recognises functions by their code, so it does not matter how a mixer refers to them: by
    name, as an attribute, inside a partial.
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
    """All functions with values among their arguments, by their code objects.

    They are searched in holdall.ops and in the modules of the mixer's classes and of its submodules'.
    """
    names = {cls.__module__ for part in mixer.modules() for cls in type(part).__mro__}
    names = {name for name in names if not name.startswith("torch.")}
    names |= {name for name in sys.modules if name.startswith("holdall.ops.")}
    functions = {}
    for name in names & sys.modules.keys():
        for value in list(vars(sys.modules[name]).values()):
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and _value_arguments(function):
                functions[function.__code__] = value
    return functions


def _value_arguments(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments that may hold values; none if it takes *args or **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        return []
    return [p.name for p in parameters if VALUES.fullmatch(p.name)]


def _exact(call: Call, name: str, length: int) -> Exact | None:
    """The matrix of a call with respect to one argument; None unless it is linear in it, per channel."""
    value, output = call.arguments[name], _first(call.output)
    letters = name.partition("_")[2]
    time = letters.index("T")
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    if not isinstance(output, Tensor) or output.is_complex() != value.is_complex():
        return None
    if not all(u.ndim > time and u.shape[time] == length for u in (value, output)):
        return None
    wide = _for_all_heads(value, output, time)
    # time first, without dimensions of size one: v_TX and o_TX, X any number of dimensions
    rest = [letter for letter, size in zip(letters, wide.shape, strict=False) if size > 1 and letter != "T"]
    channels = [size for dim, size in enumerate(wide.shape) if size > 1 and dim != time]

    def rows(u: Tensor) -> Tensor:
        u_TX = u.movedim(time, 0)
        return u_TX.reshape(length, *(size for size in u_TX.shape[1:] if size > 1))

    def respond(v: Tensor) -> Tensor:
        return rows(_first(call.function(**{**call.arguments, name: v})))

    v_TX, o_TX = rows(wide), rows(output)
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
        matrix_TJX = matrix_TJX[..., 0]  # equal along its last dimension
        channels.pop()
    return Exact(
        source=_op_of(call),
        unit="head" if set(rest[: len(channels)]) <= {"B", "H"} else "channel",
        matrix_TJX=matrix_TJX.reshape(length, length, -1),
        error=error,
    )


def _for_all_heads(value: Tensor, output: Tensor, time: int) -> Tensor:
    """The values, those that several heads share repeated for each."""
    shapes = list(zip(value.shape, output.shape, strict=False))
    unlike = [dim for dim, (own, theirs) in enumerate(shapes) if own != theirs]
    if value.ndim != output.ndim or len(unlike) != 1 or time in unlike:
        return value
    own, theirs = shapes[unlike[0]]
    return value if theirs % own else value.repeat_interleave(theirs // own, unlike[0])


def _op_of(call: Call) -> str:
    """What the function is called: by the name of the op in its file that called it for one of its forms."""
    file = call.function.__module__
    while call.parent and file.startswith("holdall.ops.") and call.parent.function.__module__ == file:
        call = call.parent
    return call.function.__name__


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _each(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The function applied to each input: vectorised if possible, else in a loop."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about operations that vmap runs in a loop
            return torch.func.vmap(function, chunk_size=64)(inputs)
    except (RuntimeError, ValueError):
        return torch.stack([function(x) for x in inputs])


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
    """G_tj = || d y_t / d x_j ||, (T, J), and d y[N/2:] / d x[:N/2] as a matrix if it is not too large.

    Rows of a batch are independent, so one backward pass through many equal rows, each from another output
    element, gives as many rows of the Jacobian.
    """
    _, length, width = x_BTD.shape
    half, squares_TJ = length // 2, torch.zeros(length, length, dtype=x_BTD.dtype)
    block: list[Tensor] | None = [] if max(length - half, half) * width <= BLOCK else None
    places = torch.arange(length * width)
    for place_R in places.split(max(1, TOKENS_AT_ONCE // length)):
        rows_RTD = x_BTD.expand(len(place_R), -1, -1).clone().requires_grad_()
        y_RTD = _outputs(mixer, rows_RTD, tokens_BT)
        chosen_R = y_RTD.flatten(1).gather(1, place_R[:, None])
        (gradient_RJD,) = torch.autograd.grad(chosen_R.sum(), rows_RTD)
        squares_TJ.index_add_(0, place_R // width, gradient_RJD.square().sum(-1))
        if block is not None:
            block.append(gradient_RJD[place_R >= half * width, :half].flatten(1))
    return squares_TJ.sqrt(), None if block is None else torch.cat(block)


# ------------------------------------------------------------------------------------------- properties


def lower_left(matrix_XTJ: Tensor) -> Tensor:
    """The block M[N/2:, :N/2] by which the second half of the sequence depends on the first."""
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
    """Relative distance to the nearest Toeplitz matrix, the means of the diagonals; the largest of all."""
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
    """Ranks of the blocks, up to rounding relative to the whole matrix and to 1%; the largest of all."""
    values_XR = torch.linalg.svdvals(block_XTJ)
    rounding_X1 = 1e-12 * whole_XTJ.abs().square().sum((-2, -1)).sqrt()[:, None]
    real_XR = values_XR * (values_XR > rounding_X1)
    left_XR = real_XR.square().flip(-1).cumsum(-1).flip(-1)  # squared error if only those before are kept
    needed_XR = left_XR > (0.01**2) * left_XR[:, :1]
    return {
        "rank": int((real_XR > 0).sum(-1).max()),
        "rank_1": int(needed_XR.sum(-1).max()),
        "full_rank": min(block_XTJ.shape[-2:]),
    }
