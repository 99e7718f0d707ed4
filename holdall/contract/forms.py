"""Which of a mixer's forms runs: the loop that defines it, the parallel form in plain PyTorch, or a kernel.

The choice is made when a mixer is built and again when it moves to another device or dtype; the mixer's
`form` tells it. "auto" takes the kernel on a GPU where it can run. With HOLDALL_STRICT=1 in the environment,
or within `strict()`, "auto" on a GPU raises where it would do without a kernel that the mixer has.

A form that was asked for by name runs or raises. A kernel raises when the mixer is built if no GPU could run
it in any dtype: without Triton, or with heads too wide for it. One that only has to move there, from the CPU
or from float64, is built, and raises if it is called before it has moved.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from holdall.files import RunError

STRICT = "HOLDALL_STRICT"
"""The environment variable: inherited by the processes of a sweep."""
HAS_TRITON = importlib.util.find_spec("triton") is not None


class KernelError(RunError, RuntimeError):
    """A kernel was asked for that cannot run here; the message says why and what would."""


def kernel_refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why no kernel can run on such tensors; empty if it can.

    On a CPU kernels run in Triton's interpreter alone, which is for tests: thousands of times slower.
    """
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and not interpreted():
        return f"kernels need a GPU, or TRITON_INTERPRET=1 for tests, and this is on device '{device.type}'"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"kernels take float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return ""


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether "auto" would take a kernel for it; in the interpreter kernels run where they are asked for."""
    return tensor.device.type == "cuda"


def fused(*tensors: torch.Tensor | None, gradients: bool = False) -> bool:
    """Whether a kernel that does at once what PyTorch does in several is to be taken for these tensors.

    Such kernels save launches and passes over memory, which decoding is made of. They are left aside where
    torch.compile traces, which fuses by itself, and off the GPU.

    Args:
        gradients: whether the kernel has them, and a rule for vmap; otherwise it is left aside where
            gradients are wanted, and within torch.func.
    """
    there = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or not all(map(on_gpu, there)):
        return False
    if any(kernel_refusal(tensor.device, tensor.dtype) for tensor in there if tensor.is_floating_point()):
        return False
    if gradients:
        return True
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in there)
    return not wanted and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, there))


def resolve(asked: str, forms: Sequence[str], device: torch.device, refusal: str) -> str:
    """The form that runs: the one asked for; for "auto" the fastest that can.

    Args:
        forms: what the mixer has, from the slowest to the fastest.
        refusal: why its kernel cannot run, empty if it can; of a kernel that was asked for: why it never can.

    Raises:
        KernelError: a kernel was asked for that can run nowhere; or strict, and "auto" on a GPU would leave
            the kernel aside.
    """
    if asked == "kernel" and refusal:
        raise KernelError(f"the kernel cannot run: {refusal}")
    if asked != "auto":
        return asked
    plain = [form for form in forms if form != "kernel"]
    if "kernel" not in forms or device.type != "cuda":
        return plain[-1]
    if refusal and is_strict():
        raise KernelError(f"strict: the kernel cannot run, {refusal}; without strict, '{plain[-1]}' would")
    return plain[-1] if refusal else "kernel"


def plain(form: str) -> str:
    """The form of an op that has no kernel where it stands beside one: the loop, or the parallel form."""
    return "loop" if form == "loop" else "parallel"


def kernel_of(op: Callable[..., Any]) -> Callable[..., Any]:
    """The Triton twin of a function of holdall/ops: the one of the same name in the file of the same name.

    It is found by name because holdall/kernels lies above ops: kernels use the plain parts of ops, need
    Triton, and are imported when one is asked for. It is looked up once and kept on the op itself, where
    torch.compile sees what is found while it traces; the import is what it could not trace.
    """
    if not hasattr(op, "kernel"):
        _find_kernel(op)
    return op.kernel  # type: ignore[attr-defined]


def _find_kernel(op: Any) -> bool:
    file = importlib.import_module(f"holdall.kernels.{op.__module__.rpartition('.')[2]}")
    op.kernel = getattr(file, op.__name__)
    return True


# run while tracing, not traced: what torch.compiler.assume_constant_result does, but to call that imports the
# compiler and Triton, and `import holdall` is quick
_find_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def require_kernel(*tensors: torch.Tensor | None) -> None:
    """Raise KernelError, with the reason, if no kernel can run on these tensors."""
    for tensor in tensors:
        if tensor is not None and (refusal := kernel_refusal(tensor.device, tensor.dtype)):
            raise KernelError(refusal)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Within, "auto" on a GPU never falls back from a kernel to plain PyTorch."""
    before = os.environ.get(STRICT)
    os.environ[STRICT] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[STRICT]
        else:
            os.environ[STRICT] = before


def is_strict() -> bool:
    return os.environ.get(STRICT, "0") not in ("", "0")


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
