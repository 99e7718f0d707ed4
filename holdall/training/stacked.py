"""The members of a population as one model: weights stacked, one pass for all, one launch per step on a GPU.

    stack       every weight of the P members is one tensor (P, ...), of which a member's own is a slice
    pass        `vmap` of the model over members: every product is batched, every kernel sees more rows
    update      AdamW of each member on its slices, with its own learning rate and its own moments
    recording   on a GPU each step, from row indices to new weights, is one CUDA graph, captured once for each
                shape of rows: small models would spend their time launching kernels

A step needs only row indices and learning rates from the host, written to where the graph reads them, and
the host waits for nothing until it fetches the losses.

Letters: P members, B rows, N tokens, Q questions a row, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from holdall.model import Model, has_kernel, head_loss
from holdall.ops.recorded import no_graph_ends
from holdall.precision import block_copies, dtype_of
from holdall.settings import Precision
from holdall.tasks.data import Questions, TaskData


@dataclass
class Member:
    """One model of a population, its AdamW, and its progress."""

    learning_rate: float
    seed: int
    model: Model
    optimizer: torch.optim.AdamW
    stopped: str = ""
    """Empty while it trains; then "accuracy", "diverged" or "end"."""
    steps: int = 0
    accuracy: float = 0.0
    accuracy_by_difficulty: dict[str, float] = field(default_factory=dict)

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)  # a CUDA graph reads it there
            else:
                group["lr"] = rate


class Recording:
    """A function without arguments or results that works on tensors in place.

    On a GPU the first call runs it, which allocates what it needs; the second captures it as a CUDA graph,
    which is replayed from then on.
    """

    def __init__(self, function: Callable[[], None], pool: Any) -> None:
        self.function, self.pool, self.warm = function, pool, False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.pool is None or not self.warm:
            self.function()
            self.warm = True
            return
        if self.graph is None:
            self.graph = self._record()
        self.graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        free, total = torch.cuda.mem_get_info()
        if free < total / 3:  # what the first run needed still lies there, and a graph has its own
            torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with no_graph_ends():  # those of populations before, in this process
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                self.function()
            finally:
                graph.capture_end()
        return graph


class Population:
    """Members that train together. A member leaves by making a new population of the others."""

    def __init__(
        self, members: Sequence[Member], data: TaskData, batch: int, precision: Precision, *, record: bool
    ) -> None:
        self.members, self.data, self.batch, self.precision = list(members), data, batch, precision
        self.weights, self.buffers = _stack([member.model for member in members])
        self.model = members[0].model
        self.device = next(iter(self.weights.values())).device
        self.losses_P = torch.zeros(len(members), device=self.device)
        self.pool = torch.cuda.graph_pool_handle() if record else None
        self.steps: dict[tuple[int, int], tuple[Tensor, Recording]] = {}
        self.tests: dict[tuple[int, ...], tuple[Questions, Recording]] = {}
        self.right_P = torch.zeros(len(members), dtype=torch.long, device=self.device)
        self.orders: list[Tensor] = []
        self.epoch = -1

    # ------------------------------------------------------------------------------------------ training

    def step(self, step: int) -> Tensor:
        """One step of every member, each on its own rows; returns their losses, (P,), until the next step."""
        epoch, which, rows = self.data.place(step, self.batch)
        order_PR = self._orders(epoch)[which][:, rows]
        key = which, order_PR.shape[1]
        if key not in self.steps:
            index_PB = torch.empty_like(order_PR, memory_format=torch.contiguous_format)
            self.steps[key] = index_PB, Recording(lambda: self._step(which, index_PB), self.pool)
        index_PB, run = self.steps[key]
        index_PB.copy_(order_PR)
        run()
        return self.losses_P

    def _orders(self, epoch: int) -> list[Tensor]:
        """The order in which each member sees each segment's rows in an epoch, (P, rows)."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.orders = [
                torch.stack([self.data.order(member.seed, epoch, which) for member in self.members]).to(
                    self.device
                )
                for which in range(len(self.data.train))
            ]
        return self.orders

    def _step(self, which: int, index_PB: Tensor) -> None:
        rows = Questions(*(tensor[index_PB] for tensor in self.data.train[which]))
        losses_P = self._each(loss, rows)
        grads = torch.autograd.grad(losses_P.sum(), list(self.weights.values()), allow_unused=True)
        # laid out as the weights are: AdamW's fused form walks both through memory side by side
        grads = tuple(grad if grad is None else grad.contiguous() for grad in grads)
        for place, member in enumerate(self.members):
            for weight, grad in zip(member.model.parameters(), grads, strict=True):
                weight.grad = None if grad is None else grad[place]
            member.optimizer.step()
            member.optimizer.zero_grad()
        self.losses_P.copy_(losses_P.detach())

    # ------------------------------------------------------------------------------------------- testing

    @torch.no_grad()
    def accuracies(self, tokens_at_once: int) -> list[list[float]]:
        """The share of questions that each member answers right, per test segment."""
        rights = []
        for segment in self.data.test:
            self.right_P.zero_()
            rows = max(1, tokens_at_once // (len(self.members) * segment.tokens_BN.shape[1]))
            for part in zip(*(tensor.split(rows) for tensor in segment), strict=True):
                self._count_right(Questions(*part))
            rights.append(self.right_P.clone())
        counts = torch.tensor([segment.answer_BQ.numel() for segment in self.data.test])
        return (torch.stack(rights).cpu().double() / counts[:, None]).T.tolist()

    def _count_right(self, questions: Questions) -> None:
        key = *questions.tokens_BN.shape, questions.at_BQ.shape[1]
        if key not in self.tests:
            own = Questions(*map(torch.empty_like, questions))
            self.tests[key] = own, Recording(lambda: self._add_right(own), self.pool)
        own, run = self.tests[key]
        for place, tensor in zip(own, questions, strict=True):
            place.copy_(tensor)
        run()

    def _add_right(self, questions: Questions) -> None:
        count = len(self.members)
        shared = Questions(*(tensor.expand(count, *tensor.shape) for tensor in questions))
        self.right_P += self._each(right, shared).flatten(1).sum(1)

    def _each(self, function: Callable[..., Tensor], rows: Questions) -> Tensor:
        """What a function of model, weights and rows gives for each member with its own."""
        own = {**self.weights, **self.buffers}
        return vmap(lambda own, mine: function(self.model, own, mine, self.precision))(own, rows)


def _stack(models: Sequence[Model]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights as leaves (P, ...), of which the models' own become slices; and all buffers (P, ...)."""
    weights = {}
    for name, _ in models[0].named_parameters():
        own = [model.get_parameter(name) for model in models]
        weights[name] = torch.stack([weight.detach() for weight in own])
        for weight, piece in zip(own, weights[name], strict=True):
            weight.data = piece
        weights[name].requires_grad_()
    names = [name for name, _ in models[0].named_buffers()]
    return weights, {name: torch.stack([model.get_buffer(name) for model in models]) for name in names}


# ------------------------------------------------------------------------------------------- one member


def loss(model: Model, weights: Mapping[str, Tensor], batch: Questions, precision: Precision) -> Tensor:
    """Mean cross-entropy of the answers, fp32; nothing is computed where nothing is asked.

    `weights`, and buffers among them, stand in for the model's own, also where they are the same: one code
    path for one and for many.
    """
    h_BQD, head_VD = _hidden(model, weights, batch, precision), weights[model.head_name]
    answer_N, soft_cap = batch.answer_BQ.flatten(), model.config.soft_cap
    mean, _ = head_loss(h_BQD.flatten(0, 1), head_VD, answer_N, soft_cap)
    return mean


def right(model: Model, weights: Mapping[str, Tensor], batch: Questions, precision: Precision) -> Tensor:
    """Which questions are answered right, (B, Q)."""
    h_BQD, head_VD = _hidden(model, weights, batch, precision), weights[model.head_name]
    if has_kernel(h_BQD):
        _, right_N = head_loss(h_BQD.flatten(0, 1), head_VD, batch.answer_BQ.flatten())
        return right_N.unflatten(0, batch.answer_BQ.shape)
    return (h_BQD.to(head_VD.dtype) @ head_VD.T).argmax(-1) == batch.answer_BQ


def _hidden(model: Model, weights: Mapping[str, Tensor], batch: Questions, precision: Precision) -> Tensor:
    """What the head reads at the positions of the questions, (B, Q, D)."""
    dtype = dtype_of(precision)
    own = {f"model.{name}": weight for name, weight in block_copies(weights, dtype).items()}
    h_BQD, _ = functional_call(_Hidden(model), own, (batch.tokens_BN, batch.at_BQ))
    return h_BQD if dtype is None else h_BQD.to(dtype)


class _Hidden(torch.nn.Module):
    """A model's `hidden` as a module's forward, which is what functional_call can call."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BN: Tensor, at_BQ: Tensor) -> tuple[Tensor, None]:
        h_BQD, _ = self.model.hidden(tokens_BN, at_BQ=at_BQ, want_states=False)
        return h_BQD, None
