"""flash-linear-attention as a backend: the one adapter to its Triton kernels, in tested versions.

It is an optional package (`fla-core`, imported as `fla`, by Yang, Zhang and others). It is never used
silently: a mixer's `form` is then "kernel", and a version that our tests have not compared with our loops is
refused by name (`KNOWN_GOOD`).

What is used: the forward and the backward half of each rule, which the package's public functions keep inside
autograd Functions without a rule for `vmap`. Here they are one pair of custom operations for all rules, which
run under `vmap`, `torch.compile` and in CUDA graphs, with gradients of every input and of the incoming state,
from output and final state.

    rule                    of the package, below fla.ops       for our op
    decay per head          common.fused_chunk, common.chunk_h  linear_attention
    decay per key           gla.chunk                           linear_attention, wkv.matrix_wkv
    delta                   delta_rule.chunk                    delta_rule
    delta, decay per head   gated_delta_rule.chunk              delta_rule
    delta, decay per key    kda.chunk_fwd, kda.chunk_bwd        delta_rule
    generalised delta       generalized_delta_rule.dplr.chunk   generalised_delta_rule
    sums of decays          utils                               all of these

What is set by public ways: fp32 tensors are multiplied in three passes of tf32 instead of one, by Triton's
own knob, while a kernel runs (`_running`); the package's other backends (such as tilelang), which it would
use by default if they are installed, are disabled by its environment variable, unless the package was
imported before this file.

What is patched, when a module of the package is loaded (`load`) and nowhere else, since no public way exists:

- one fixed configuration per kernel, from the package's list. Its autotuning times 3 to 60 of them for every
  new head dimension, number of heads or, for some kernels, batch size: minutes of compilation for each model
  of a sweep, and two runs may choose differently and so not be bit-identical. With one configuration, new
  head dimensions compile in 2 to 11 seconds (7 to 22 in fp32), and a new length needs no compilation. The
  package can read configurations from a folder of files, but only for the whole process, set in the
  environment before its first import, and not for kernels under Triton's own autotuner;
- SOLVE_TRIL_DOT_PRECISION, a constant of two modules: the precision of solving triangular systems, which they
  choose by the GPU, also for fp32. FLA_TRIL_PRECISION in the environment is another module's;
- chunk_bwd_dqkwg, replaced by our own kernel (holdall/kernels/chunk_gradients.py), since some versions of
  Triton miscompile the package's for Hopper GPUs, where it then refuses to run: see `per_head_is_broken`. Its
  callers accept no other function;
- in tests, what Triton's interpreter cannot run (`_make_interpretable`).

Beside the package: in fp32, the gradient of decays is our own kernel (holdall/kernels/decay_gradients.py),
where the package takes a difference of sums that loses all digits of strong decays. For the remaining
rounding error see `LOST_PER_NAT`. In 16 bits the difference is kept: its inputs are rounded as coarsely, and
the exact sum takes twice as long as the rest of the backward pass.

Letters: B row, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.contract import forms
from holdall.kernels import register_batch_vmap
from holdall.kernels.chunk_gradients import chunk_gradients
from holdall.kernels.decay_gradients import decay_gradients
from holdall.ops.derivatives import once_differentiable

KNOWN_GOOD = ("0.6.0",)
"""Versions of fla-core that tests/kernels/test_fla.py has compared with our loops on a GPU."""
CHUNK = 64
"""Tokens per chunk, as in the package."""
LOST_PER_NAT = 2.0**-22
"""Relative error per nat of decay: the package computes decays between tokens as differences of cumulative
sums. In a chunk of 64 tokens that decays by e^-G, the relative error is up to G times this, 1e-4 for G = 420.
In the generalised delta rule, with chunks of 16, the gradient of decays is itself a difference of sums, with
that error relative to the gradient without decay: accurate enough for RWKV-7, whose decays are above e^-0.61.
With stronger decays, the form "parallel" is accurate."""
WIDEST_KEY = 256
"""Most key dimensions per head, where a program holds all of them: all rules except a decay per head."""

# ------------------------------------------------------------------------------------------- availability


try:
    VERSION = importlib.metadata.version("fla-core")
except importlib.metadata.PackageNotFoundError:
    VERSION = ""


def refusal(key_dim: int = 0) -> str:
    """Why flash-linear-attention cannot be used, for heads with `key_dim` key dimensions; empty if it can."""
    way_out = f'pip install "fla-core=={KNOWN_GOOD[-1]}"'
    if not VERSION:
        return f"flash-linear-attention is not installed ({way_out})"
    if VERSION not in KNOWN_GOOD:
        known = ", ".join(KNOWN_GOOD)
        return f"fla-core {VERSION} has not been tested against our loops, {known} has ({way_out})"
    if key_dim > WIDEST_KEY:
        return f"flash-linear-attention takes heads of up to {WIDEST_KEY} key dimensions here, not {key_dim}"
    return ""


def require(*tensors: Tensor | None, key_dim: int = 0) -> None:
    """Raise KernelError, with the reason and the remedy, if it cannot run on these tensors."""
    forms.require_kernel(*tensors)
    if reason := refusal(key_dim):
        raise forms.KernelError(reason)


@torch.compiler.assume_constant_result
def per_head_is_broken() -> bool:
    """Whether the delta rule with a decay per head would have wrong gradients.

    Triton 3.4 to 3.7.0 miscompiles the package's backward for Hopper GPUs, and the package then raises an
    error (flash-linear-attention#640). Our replacement was tested against our loops there with Triton 3.6;
    with the other versions such decays are expanded over the key dimensions, for which there are other
    kernels.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    import triton

    release = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
    return (3, 4) <= release < (3, 7, 1) and release[:2] != (3, 6)


# ------------------------------------------------------------------------------------- the package's kernels


PREFERRED = {"BK": 64, "BV": 64, "BS": 32, "BH": 2, "num_warps": 4, "num_stages": 3}
"""The preferred configuration; for each kernel the nearest one in the package's list is used."""


@functools.cache
def load(name: str) -> Any:
    """Import a module of the package, patched as the beginning of this file describes."""
    before = set(sys.modules)
    with warnings.catch_warnings():  # it warns where there is no GPU
        warnings.simplefilter("ignore")
        os.environ.setdefault("FLA_DISABLE_BACKEND_DISPATCH", "1")
        module = importlib.import_module(f"fla.{name}")
    for path, owner in list(sys.modules.items()):
        if path.startswith("fla."):
            _hold(owner, is_new=path not in before)
    if hasattr(module, "chunk_bwd_dqkwg"):
        module.chunk_bwd_dqkwg = _chunk_gradients  # type: ignore[attr-defined]
    return module


def _hold(module: Any, *, is_new: bool) -> None:
    """Fix one configuration for each kernel of a module, and the precision of its triangular systems."""
    from triton.runtime.autotuner import Autotuner

    if is_new and hasattr(module, "SOLVE_TRIL_DOT_PRECISION") and not forms.interpreted():
        precision = vars(module)["SOLVE_TRIL_DOT_PRECISION"]
        vars(module)["SOLVE_TRIL_DOT_PRECISION"] = type(precision)(FP32)
    for kernel in list(vars(module).values()):
        while kernel is not None and not isinstance(kernel, Autotuner):
            kernel = getattr(kernel, "fn", None) if type(kernel).__module__.startswith("triton.") else None
        if kernel is not None:
            kernel.configs = [min(kernel.configs, key=_distance)]
    if forms.interpreted():
        _make_interpretable(module)


def _chunk_gradients(q: Tensor, k: Tensor, v: Tensor, w: Tensor, g: Tensor | None, **own: Any) -> Any:
    """Our kernel with the package's argument names."""
    return chunk_gradients(q, k, v, own["do"], own["dv"], own["h"], own["dh"], g, own["chunk_size"])


def _distance(config: Any) -> float:
    """How far a configuration is from the preferred one, in factors of two."""
    settings = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return sum(abs(math.log2(settings[name] / size)) for name, size in PREFERRED.items() if name in settings)


def _make_interpretable(module: Any) -> None:
    """For tests: in Triton's interpreter loop indices are Python integers, which these kernels cast, and
    Triton's functions must be called by their own names."""
    import triton.language as tl

    class Index(int):
        def to(self, _: Any) -> Index:
            return self

    module.range = lambda *ends: map(Index, range(*ends))
    if hasattr(module, "gather"):
        module.gather = lambda *args, **options: tl.gather(*args, **options)


FP32 = "tf32x3"
"""Precision of fp32 products: three passes of tf32, about 21 bits instead of 11."""
_precision = threading.Lock()


@contextlib.contextmanager
def _running(x: Tensor) -> Iterator[None]:
    """Within, the device of x is current, and fp32 products have the precision `FP32`.

    This is also needed for bf16 inputs: some kernels, such as the sums of decays, only take fp32, and are
    compiled once.
    """
    from triton import knobs

    # the setting is global, and another thread may be training another model
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext(), _precision:
        before = knobs.language.fp32_default
        knobs.language.fp32_default = FP32
        try:
            yield
        finally:
            knobs.language.fp32_default = before


class Inputs(NamedTuple):
    """The inputs of any rule; None for those that a rule lacks.

    q, k, v, a and b have one dtype, the others are fp32. a and b are those of `generalised_delta_rule`.
    """

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    a_BTHK: Tensor | None = None
    b_BTHK: Tensor | None = None
    beta_BTH: Tensor | None = None
    log_decay: Tensor | None = None
    s_BHKV: Tensor | None = None


Forward = Callable[[Inputs, bool], tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]
"""From inputs and whether the final state is needed to output, final state, and tensors for the backward."""
Backward = Callable[[Inputs, tuple[Tensor, ...], Tensor, Tensor | None, bool], dict[str, Tensor | None]]
"""From inputs, saved tensors, gradients of output and final state, and whether the decays' gradient is needed
to the gradients of the inputs, by name."""


def _log2_sums(log_decay: Tensor | None) -> Tensor:
    """The package's decays: base-2 logarithms, summed from the start of each chunk.

    Rows of whole chunks are passed as one long row, since the kernel is recompiled for every number of rows.
    """
    assert log_decay is not None
    rows = log_decay.flatten(0, 1)[None] if log_decay.shape[1] % CHUNK == 0 else log_decay
    sums = load("ops.utils").chunk_local_cumsum(rows, chunk_size=CHUNK, scale=1 / math.log(2))
    return sums.view(log_decay.shape)


def _is_exact(x: Inputs, want_decay: bool) -> bool:
    """Whether the gradient of decays is computed by an exact sum (decay_gradients.py)."""
    return want_decay and x.q_BTHK.dtype == torch.float32


def _d_decay(
    x: Inputs, u_BTHV: Tensor, dy: Tensor, dv: Tensor | None, states: Tensor, d_states: Tensor
) -> Tensor:
    assert x.log_decay is not None
    return decay_gradients(x.q_BTHK, x.k_BTHK, u_BTHV, dy, dv, states, d_states, x.log_decay, CHUNK)


def _per_head_forward(x: Inputs, want_state: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """No decay or one per head: a program loops over the chunks of a head with the state in registers."""
    q, k, v, sums, starts = _end_to_end(x)
    y, s = load("ops.common.fused_chunk").fused_chunk_fwd(
        q, k, v, sums, None, 1.0, x.s_BHKV, want_state, cu_seqlens=starts, chunk_size=CHUNK
    )
    return y.view(x.v_BTHV.shape), s, ()


def _per_head_backward(
    x: Inputs, saved: tuple[Tensor, ...], dy: Tensor, ds: Tensor | None, want_decay: bool
) -> dict[str, Tensor | None]:
    q, k, v, sums, starts = _end_to_end(x)
    dq, dk, dv, d_decay, ds0 = load("ops.common.fused_chunk").fused_chunk_bwd(
        q, k, v, sums, None, dy.view(v.shape), 1.0, x.s_BHKV, ds, cu_seqlens=starts, chunk_size=CHUNK
    )
    gradients = {"q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "log_decay": d_decay}
    gradients = {n: None if d is None else d.view(getattr(x, n).shape) for n, d in gradients.items()}
    if _is_exact(x, want_decay):
        parts = load("ops.common.chunk_h")
        own = {"g": _log2_sums(x.log_decay), "h0": x.s_BHKV, "chunk_size": CHUNK}
        states, _ = parts.chunk_fwd_h(x.k_BTHK, x.v_BTHV, **own)
        d_states, _ = parts.chunk_bwd_dh(x.q_BTHK, x.k_BTHK, x.v_BTHV, dy, dht=ds, scale=1.0, **own)
        gradients["log_decay"] = _d_decay(x, x.v_BTHV, dy, None, states, d_states)
    return {**gradients, "s_BHKV": ds0}


def _end_to_end(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """q, k, v and summed decays as one row of sequences, with their start offsets: these kernels are
    recompiled for every number of rows."""
    rows, length = x.q_BTHK.shape[:2]
    sums = None if x.log_decay is None else _log2_sums(x.log_decay).flatten(0, 1)[None]
    q, k, v = (u.flatten(0, 1)[None] for u in (x.q_BTHK, x.k_BTHK, x.v_BTHV))
    return q, k, v, sums, torch.arange(rows + 1, device=q.device) * length


def _per_key_forward(x: Inputs, want_state: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    _, pairs_BTHC, _, s, y = load("ops.gla.chunk").chunk_gla_fwd(
        x.q_BTHK, x.k_BTHK, x.v_BTHV, None, _log2_sums(x.log_decay), 1.0, x.s_BHKV, want_state,
        chunk_size=CHUNK,
    )  # fmt: skip
    return y, s, (pairs_BTHC,)


def _per_key_backward(
    x: Inputs, saved: tuple[Tensor, ...], dy: Tensor, ds: Tensor | None, want_decay: bool
) -> dict[str, Tensor | None]:
    parts, sums = load("ops.gla.chunk"), _log2_sums(x.log_decay)
    if not _is_exact(x, want_decay):
        dq, dk, dv, d_decay, ds0 = parts.chunk_gla_bwd(
            x.q_BTHK, x.k_BTHK, x.v_BTHV, None, sums, 1.0, x.s_BHKV, None, saved[0], dy, ds, chunk_size=CHUNK
        )
        return {"q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "log_decay": d_decay, "s_BHKV": ds0}
    own = {"gk": sums, "h0": x.s_BHKV, "chunk_size": CHUNK, "states_in_fp32": True}
    states, _ = parts.chunk_fwd_h(x.k_BTHK, x.v_BTHV, **own)
    d_states, ds0 = parts.chunk_bwd_dh(x.q_BTHK, x.k_BTHK, x.v_BTHV, dy, dht=ds, scale=1.0, **own)
    dv = parts.chunk_gla_bwd_dv(x.k_BTHK, sums, saved[0], dy, d_states, chunk_size=CHUNK)
    d_pairs = parts.chunk_gla_bwd_dA(x.v_BTHV, dy, 1.0, chunk_size=CHUNK)
    dq, dk = parts.chunk_gla_bwd_dqk_intra(x.q_BTHK, x.k_BTHK, sums, d_pairs, chunk_size=CHUNK)
    dq, dk, _ = parts.chunk_gla_bwd_dqkg(
        x.q_BTHK, x.k_BTHK, x.v_BTHV, states, sums, dy, d_states, dq, dk, 1.0, chunk_size=CHUNK
    )
    d_decay = _d_decay(x, x.v_BTHV, dy, None, states, d_states)
    return {"q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "log_decay": d_decay, "s_BHKV": ds0}


def _delta_forward(x: Inputs, want_state: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    y, solved_BTHC, s = load("ops.delta_rule.chunk").chunk_delta_rule_fwd(
        x.q_BTHK, x.k_BTHK, x.v_BTHV, x.beta_BTH, 1.0, x.s_BHKV, want_state, chunk_size=CHUNK
    )
    return y, s, (solved_BTHC,)


def _delta_backward(
    x: Inputs, saved: tuple[Tensor, ...], dy: Tensor, ds: Tensor | None, want_decay: bool
) -> dict[str, Tensor | None]:
    dq, dk, dv, d_beta, ds0 = load("ops.delta_rule.chunk").chunk_delta_rule_bwd(
        x.q_BTHK, x.k_BTHK, x.v_BTHV, x.beta_BTH, saved[0], 1.0, x.s_BHKV, dy, ds, chunk_size=CHUNK
    )
    return {"q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "beta_BTH": d_beta, "s_BHKV": ds0}


def _delta_per_head_forward(x: Inputs, want_state: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    _, y, solved_BTHC, s, _, _ = load("ops.gated_delta_rule.chunk").chunk_gated_delta_rule_fwd(
        x.q_BTHK, x.k_BTHK, x.v_BTHV, x.log_decay, x.beta_BTH, 1.0, x.s_BHKV, want_state, chunk_size=CHUNK
    )
    return y, s, (solved_BTHC,)


def _delta_per_head_backward(
    x: Inputs, saved: tuple[Tensor, ...], dy: Tensor, ds: Tensor | None, want_decay: bool
) -> dict[str, Tensor | None]:
    parts, sums = load("ops.gated_delta_rule.chunk"), _log2_sums(x.log_decay)
    q, k, v, beta = x.q_BTHK, x.k_BTHK, x.v_BTHV, x.beta_BTH
    if not _is_exact(x, want_decay):
        dq, dk, dv, d_beta, d_decay, ds0, *_ = parts.chunk_gated_delta_rule_bwd(
            q, k, v, sums, beta, saved[0], 1.0, x.s_BHKV, dy, ds, chunk_size=CHUNK
        )
        return {
            "q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "beta_BTH": d_beta, "log_decay": d_decay, "s_BHKV": ds0,
        }  # fmt: skip
    w, u = parts.recompute_w_u_fwd(k, v, beta, saved[0], g=sums)
    states, u, _ = parts.chunk_gated_delta_rule_fwd_h(
        k, w, u, g=sums, initial_state=x.s_BHKV, chunk_size=CHUNK
    )
    du = parts.chunk_bwd_dv_local(q, k, dy, g=sums, scale=1.0, chunk_size=CHUNK)
    d_states, ds0, du = parts.chunk_gated_delta_rule_bwd_dhu(
        q, k, w, dy, du, g=sums, h0=x.s_BHKV, dht=ds, scale=1.0, chunk_size=CHUNK
    )
    dq, dk, dw, _ = chunk_gradients(q, k, u, dy, du, states, d_states, sums, CHUNK)
    dk_too, dv, d_beta, _ = parts.prepare_wy_repr_bwd(k, v, beta, saved[0], dw, du, g=sums)
    return {
        "q_BTHK": dq, "k_BTHK": dk.add_(dk_too), "v_BTHV": dv, "beta_BTH": d_beta, "s_BHKV": ds0,
        "log_decay": _d_decay(x, u, dy, dv, states, d_states),
    }  # fmt: skip


def _delta_per_key_forward(x: Inputs, want_state: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    y, s, _, pairs_BTHC, solved_BTHC, *_ = load("ops.kda.chunk_fwd").chunk_kda_fwd(
        x.q_BTHK, x.k_BTHK, x.v_BTHV, x.log_decay, x.beta_BTH, 1.0, x.s_BHKV, want_state, chunk_size=CHUNK
    )
    return y, s, (pairs_BTHC, solved_BTHC)


def _delta_per_key_backward(
    x: Inputs, saved: tuple[Tensor, ...], dy: Tensor, ds: Tensor | None, want_decay: bool
) -> dict[str, Tensor | None]:
    parts, sums = load("ops.kda.chunk_bwd"), _log2_sums(x.log_decay)
    q, k, v, beta, (pairs_BTHC, solved_BTHC) = x.q_BTHK, x.k_BTHK, x.v_BTHV, x.beta_BTH, saved
    if not _is_exact(x, want_decay):
        dq, dk, dv, d_beta, d_decay, ds0, *_ = parts.chunk_kda_bwd(
            q, k, v, beta, *saved, 1.0, x.s_BHKV, dy, ds, g=sums, chunk_size=CHUNK
        )
        return {
            "q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "beta_BTH": d_beta, "log_decay": d_decay, "s_BHKV": ds0,
        }  # fmt: skip
    w, u, q_since, k_until = parts.recompute_w_u_fwd(k, v, beta, solved_BTHC, gk=sums, q=q)
    states, u, _ = parts.chunk_gated_delta_rule_fwd_h(
        k_until, w, u, gk=sums, initial_state=x.s_BHKV, chunk_size=CHUNK
    )
    d_pairs, du = parts.chunk_kda_bwd_dAv(q, k, u, dy, pairs_BTHC, 1.0, chunk_size=CHUNK)
    d_states, ds0, du = parts.chunk_gated_delta_rule_bwd_dhu(
        q_since, k_until, w, dy, du, gk=sums, h0=x.s_BHKV, dht=ds, scale=1.0, chunk_size=CHUNK
    )
    dq, dk, dv, d_beta, d_sums, d_solved = parts.chunk_kda_bwd_wy_dqkg_fused(
        q, k, v, u, sums, beta, solved_BTHC, states, dy, d_states, du, 1.0, chunk_size=CHUNK
    )
    dq, dk, d_beta, _ = parts.chunk_kda_bwd_intra(
        q, k, sums, beta, d_pairs, d_solved, dq, dk, d_beta, d_sums, chunk_size=CHUNK
    )
    return {
        "q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "beta_BTH": d_beta, "s_BHKV": ds0,
        "log_decay": _d_decay(x, u, dy, dv, states, d_states),
    }  # fmt: skip


def _generalised_forward(x: Inputs, want_state: bool) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """The package's a is our b, the key that reads, and its b our a. Chunks of 16 are safe for any decay."""
    y, s, _, _ = load("ops.generalized_delta_rule.dplr.chunk").chunk_dplr_fwd(
        x.q_BTHK, x.k_BTHK, x.v_BTHV, x.b_BTHK, x.a_BTHK, x.log_decay, 1.0, x.s_BHKV, want_state,
        chunk_size=16,
    )  # fmt: skip
    return y, s, ()


class _Context:
    """A stand-in for autograd's context, which the package's backward of this rule needs."""

    cu_seqlens = chunk_indices = cp_context = None
    scale, chunk_size, safe_gate, disable_recompute = 1.0, 16, False, False

    def __init__(self, *saved: Tensor | None) -> None:
        self.saved_tensors = saved
        self._fwd_used_autocast, self._dtype = False, None


def _generalised_backward(
    x: Inputs, saved: tuple[Tensor, ...], dy: Tensor, ds: Tensor | None, want_decay: bool
) -> dict[str, Tensor | None]:
    function = load("ops.generalized_delta_rule.dplr.chunk").ChunkDPLRDeltaRuleFunction
    context = _Context(x.q_BTHK, x.k_BTHK, x.v_BTHV, x.b_BTHK, x.a_BTHK, x.log_decay, x.s_BHKV)
    dq, dk, dv, db, da, d_decay, _, ds0, *_ = function.backward(context, dy, ds)
    return {
        "q_BTHK": dq, "k_BTHK": dk, "v_BTHV": dv, "a_BTHK": da, "b_BTHK": db, "log_decay": d_decay,
        "s_BHKV": ds0,
    }  # fmt: skip


class Rule(NamedTuple):
    """Forward and backward of a rule, and the dtypes of the saved (B, T, H, CHUNK) tensors, None for q's."""

    forward: Forward
    backward: Backward
    saved: tuple[torch.dtype | None, ...] = ()


RULES = {
    "decay per head": Rule(_per_head_forward, _per_head_backward),
    "decay per key": Rule(_per_key_forward, _per_key_backward, (torch.float32,)),
    "delta": Rule(_delta_forward, _delta_backward, (None,)),
    "delta, decay per head": Rule(_delta_per_head_forward, _delta_per_head_backward, (None,)),
    "delta, decay per key": Rule(_delta_per_key_forward, _delta_per_key_backward, (None, None)),
    "generalised delta": Rule(_generalised_forward, _generalised_backward),
}

# -------------------------------------------------------------------------------------- the custom operations


@torch.library.custom_op("holdall::fla_forward", mutates_args=())
def fla_forward(
    rule: str,
    want_state: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    log_decay: Tensor | None,
    s: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final state, and two tensors saved for the backward; (B, 0) for those that are absent."""
    inputs = Inputs(*_contiguous(q, k, v, a, b, beta, log_decay, s))
    with _running(v):
        y, state, saved = RULES[rule].forward(inputs, want_state)
    first, second, *_ = (*saved, None, None)
    return y.to(v.dtype), _present(state, q), _present(first, q), _present(second, q)


@fla_forward.register_fake
def _(
    rule: str,
    want_state: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    log_decay: Tensor | None,
    s: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, _, heads, key_dim = q.shape
    saved: list[Tensor | None] = [
        q.new_empty(*q.shape[:3], CHUNK, dtype=dtype or q.dtype) for dtype in RULES[rule].saved
    ]
    state = q.new_empty(rows, heads, key_dim, v.shape[3], dtype=torch.float32) if want_state else None
    first, second, *_ = (*saved, None, None)
    return v.new_empty(v.shape), _present(state, q), _present(first, q), _present(second, q)


@once_differentiable()
@torch.library.custom_op("holdall::fla_backward", mutates_args=())
def fla_backward(
    rule: str,
    want_decay: bool,
    dy: Tensor,
    ds: Tensor | None,
    first: Tensor,
    second: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    log_decay: Tensor | None,
    s: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q to s; (B, 0) for those that are absent."""
    inputs = Inputs(*_contiguous(q, k, v, a, b, beta, log_decay, s))
    dy, ds = _contiguous(dy, ds)
    with _running(v):
        gradients = RULES[rule].backward(
            inputs, (first, second)[: len(RULES[rule].saved)], dy, ds, want_decay
        )
    if not want_decay:
        inputs = inputs._replace(log_decay=None)
    return tuple(  # type: ignore[return-value]
        _present(None if x is None else gradients[name].to(x.dtype), q)  # type: ignore[union-attr]
        for name, x in inputs._asdict().items()
    )


@fla_backward.register_fake
def _(
    rule: str,
    want_decay: bool,
    dy: Tensor,
    ds: Tensor | None,
    first: Tensor,
    second: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    beta: Tensor | None,
    log_decay: Tensor | None,
    s: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (q, k, v, a, b, beta, log_decay if want_decay else None, s)
    return tuple(_present(None if x is None else x.new_empty(x.shape), q) for x in inputs)  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.rule, _, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output[2:], *tensors)


def _pull_back(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    first, second, *inputs = ctx.saved_tensors
    v = inputs[2]
    dy = torch.zeros_like(v) if dy is None else dy
    want_decay = inputs[6] is not None and ctx.needs_input_grad[8]
    gradients = fla_backward(ctx.rule, want_decay, dy, ds, first, second, *inputs)
    wanted = [*inputs[:6], inputs[6] if want_decay else None, inputs[7]]
    return None, None, *(None if x is None else d for x, d in zip(wanted, gradients, strict=True))


fla_forward.register_autograd(_pull_back, setup_context=_keep)
for _op in (fla_forward, fla_backward):
    register_batch_vmap(_op)


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _present(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or an empty tensor with as many rows in place of None, which operations cannot return."""
    return like.new_empty(like.shape[0], 0) if x is None else x


def apply(rule: str, inputs: Inputs, want_state: bool = True) -> tuple[Tensor, Tensor | None]:
    """Output in the dtype of v and final state in fp32, for head dimensions of any size.

    Matrix products are in the dtype of v. Dimensions are padded with zeros to multiples of 16.
    """
    x, dtype = inputs, inputs.v_BTHV.dtype
    key_dim, value_dim = x.q_BTHK.shape[-1], x.v_BTHV.shape[-1]
    more = -key_dim % 16, -value_dim % 16
    decay = (
        _filled(x.log_decay, more[0]) if x.log_decay is not None and x.log_decay.ndim == 4 else x.log_decay
    )
    y, state, _, _ = fla_forward(
        rule,
        want_state,
        *(_filled(u, more[0], dtype) for u in (x.q_BTHK, x.k_BTHK)),
        _filled(x.v_BTHV, more[1], dtype),
        *(_filled(u, more[0], dtype) for u in (x.a_BTHK, x.b_BTHK)),
        None if x.beta_BTH is None else x.beta_BTH.float(),
        None if decay is None else decay.float(),
        None if x.s_BHKV is None else F.pad(x.s_BHKV.float(), (0, more[1], 0, more[0])),
    )
    return y[..., :value_dim], state[..., :key_dim, :value_dim] if want_state else None


def _filled(x: Tensor | None, more: int, dtype: torch.dtype | None = None) -> Tensor | None:
    if x is None:
        return None
    x = x if dtype is None else x.to(dtype)
    return F.pad(x, (0, more)) if more else x
