"""Cross-entropy of a linear head, forward and backward, at the shapes of sweeps and of a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import Case
from holdall.kernels.cross_entropy import FUSED_WIDTH, linear_cross_entropy
from holdall.ops.cross_entropy import linear_cross_entropy as plain

SHAPES = [
    (4, 1024, 8192, 128),
    (4, 16384, 8192, 64),
    (4, 16384, 8192, 128),
    (1, 16384, 50264, 1024),
    (1, 16384, 50257, 1024),
]
"""Members, predictions of each, vocabulary, width."""


def cases() -> Iterator[Case]:
    return (_case(*shape) for shape in SHAPES)


def _case(members: int, count: int, vocab: int, width: int) -> Case:
    h = torch.randn(members, count, width, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(members, vocab, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    target = torch.randint(vocab, (members, count), device="cuda")

    def step(losses: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> tuple[Tensor, ...]:
            leaves = h.detach().requires_grad_(), head.detach().requires_grad_()
            return torch.autograd.grad(losses(*leaves, target).sum(), leaves)

        return _captured(run)

    # without the logits in memory, they are made twice; where that is dearer than memory, three products do
    products = 4 if width <= FUSED_WIDTH else 3
    return Case(
        what="linear cross-entropy, forward and backward",
        shape=f"{members} x {count}, V={vocab}, D={width}, bf16",
        bytes=2 * 3 * members * (count + vocab) * width,
        flops=products * 2 * members * count * vocab * width,
        ways={
            "ours": step(lambda *args: torch.vmap(linear_cross_entropy)(*args)[0]),
            "plain, in blocks": step(lambda *args: torch.vmap(plain)(*args)[0]),
            "F.cross_entropy(h @ head.T)": step(_all_logits),
            "torch.compile of it": step(torch.compile(_all_logits, dynamic=False)),
        },
    )


def _captured(function: Callable[[], object]) -> Callable[[], None]:
    """A function as a CUDA graph, made at its first call: a sweep's step is one, so Python's time is none."""
    graph: torch.cuda.CUDAGraph | None = None

    def run() -> None:
        nonlocal graph
        if graph is None:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                function()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                function()
        graph.replay()

    return run


def _all_logits(h_MND: Tensor, head_MVD: Tensor, target_MN: Tensor) -> Tensor:
    """What a user would write."""
    logits_MNV = h_MND @ head_MVD.mT
    loss_MN = F.cross_entropy(logits_MNV.flatten(0, 1), target_MN.flatten(), reduction="none")
    return loss_MN.view(target_MN.shape).mean(1)
