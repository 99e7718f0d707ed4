"""The one backbone: embeddings, pre-norm blocks of mixers, a head. Only the mixers differ.

    r = embed(tokens) (+ learned positions)
    each layer:  r = r + mixer(norm(r));  r = r + mlp(norm(r))  if there is an MLP
                 or, with its norms after,  r = r + norm(mixer(r));  r = r + norm(mlp(r))
    logits = norm(r) head^T                                     head = embed  if the head is tied

A hybrid is a list of different mixers. Letters: B row, T time, Q positions asked for, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import (
    POSITION_FIELDS,
    POSITION_SLOTS,
    Config,
    Mixer,
    MixerConfig,
    Position,
    State,
    StateError,
    bytes_per_row,
    count_on,
    forms,
    is_reserved,
    misfit,
    none_read,
    reserve,
    with_room_too,
    write_state,
)
from holdall.contract.rollback import counts_of, without_last
from holdall.contract.room import advanced, beyond, check_room
from holdall.kernels import fold, unfold
from holdall.ops.cross_entropy import capped, linear_cross_entropy
from holdall.ops.kept import Kept
from holdall.ops.layer_norm import add_norm, kernel_refusal, layer_norm, rms_norm
from holdall.ops.linear import Linear, is_plain, swiglu_linear, wide
from holdall.settings import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A language model, or a synthetic task's model."""

    vocab: Annotated[int, Range(least=2)]
    """Vocabulary size, V."""
    width: PositiveInt
    """Width of the residual stream, D; every layer's mixer has it."""
    layers: tuple[MixerConfig, ...]
    """The mixers, from the embedding to the head."""
    mlp: NonNegativeInt = 0
    """Hidden width of each layer's MLP; 0 for no MLPs."""
    mlp_kind: Literal["gelu", "gelu_tanh", "swiglu", "geglu"] = "gelu"
    """Kind of MLP: "gelu" and its approximation "gelu_tanh" with biases; gated by SiLU, "swiglu", or by the
    approximation of GELU, "geglu", without."""
    mlp_bias: bool | None = None
    """Whether the MLPs' maps have biases; None for as their kind has them."""
    positions: NonNegativeInt = 0
    """Number of learned position embeddings; 0 for none. A longer context is an error."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm before each mixer and MLP and before the head: "layer" with weight and bias, "rms" with weight."""
    norms_after: tuple[NonNegativeInt, ...] = ()
    """Layers, counted from 0, whose mixer and MLP read the residual stream as it is; their norms are of what
    they add to it, as in OLMo 2.
    """
    eps: NonNegativeFloat = 1e-5
    """Epsilon of these norms."""
    embed_scale: PositiveFloat = 1.0
    """What embeddings of tokens are multiplied by."""
    soft_cap: NonNegativeFloat = 0.0
    """Bound c of the logits, c tanh(logits / c); 0 for none."""
    tied: bool = True
    """Whether the head is the embedding; otherwise it has weights of its own, of the same shape."""

    def validate(self) -> None:
        if not self.layers:
            raise ValueError("a model needs at least one layer")
        if any(depth >= len(self.layers) for depth in self.norms_after):
            raise ValueError(f"norms_after {self.norms_after} names more than the {len(self.layers)} layers")
        for depth, layer in enumerate(self.layers):
            if layer.width != self.width:
                raise ValueError(
                    f"layer {depth} ({layer.name}) has width {layer.width}, the model {self.width}"
                )

    def build(self) -> Model:
        """The model, freshly initialised from torch's random state."""
        return Model(self)

    def state_elements(self, context_len: int) -> int:
        """Elements of one row's states, all layers, after `context_len` tokens."""
        with seeded(0):  # equal layers are built once
            mixers = {layer: layer.build() for layer in set(self.layers)}
        position = int(self.positions > 0)  # the count of tokens read
        return sum(mixers[layer].state_elements(context_len) for layer in self.layers) + position


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, the CPU's random state is this seed's; then it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On a GPU, have PyTorch add in a fixed order, so that the same run gives the same bits.

    By default gathers and embeddings sum gradients in whatever order threads arrive. A CPU needs nothing.
    """
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS promises it only with this
    settings: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # nothing here reads memory that was never written
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), or gated: fc2(a * silu(g)) or fc2(a * gelu(g)), with [a | g] = fc1(x)."""

    def __init__(self, width: int, inner: int, kind: str, bias: bool | None = None) -> None:
        super().__init__()
        self.kind, halves = kind, kind in ("swiglu", "geglu")
        bias = not halves if bias is None else bias
        self.fc1 = Linear(width, 2 * inner if halves else inner, bias=bias)
        self.fc2 = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.fc2(swiglu_linear(self.fc1, x))
        if self.kind == "geglu":
            a, gate = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(a * F.gelu(gate, approximate="tanh"))
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Sum(NamedTuple):
    """A residual stream r + x not summed yet: the norm that reads it adds, in the same kernel."""

    r: Tensor
    x: Tensor


class Norm(nn.Module):
    """What both norms have: a kernel on a GPU, and the sum before it.

    A residual stream wider than the weights is normalised as it is; the result is narrow.
    """

    weight: nn.Parameter
    eps: Any

    def refusal(self, x: Tensor) -> str:
        """Why the kernel cannot run on x; empty if it can."""
        if not forms.on_gpu(x):
            return f"this is on device '{x.device.type}'"
        refusals = (forms.kernel_refusal(x.device, dtype) for dtype in (x.dtype, self.weight.dtype))
        return next(filter(None, refusals), "") or kernel_refusal(self.weight.shape[0])

    def read(self, r: Tensor | Sum, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
        """The residual stream, its last sum taken, and its norm.

        Args:
            inplace: the stream is given away, and the sum may be written into it.
        """
        if not isinstance(r, Sum):
            return r, self(r)
        (r, x), weight = r, self.weight
        widens = torch.promote_types(r.dtype, x.dtype) != r.dtype
        if widens or self.refusal(r) or not forms.fused(r, x, weight):
            r = r + x
            return r, self(r)
        bias = getattr(self, "bias", None)  # which the RMS norm has not
        return add_norm(r, x, weight, bias, self.eps, weight.dtype, inplace=inplace, form="kernel")


class RMSNorm(Norm, nn.RMSNorm):
    """PyTorch's, by one kernel each way on a GPU, unless torch.compile fuses it with its neighbours."""

    def forward(self, x: Tensor) -> Tensor:
        form = "parallel" if torch.compiler.is_compiling() or self.refusal(x) else "kernel"
        return rms_norm(x, self.weight, self.eps, self.weight.dtype, form=form)


class LayerNorm(Norm, nn.LayerNorm):
    """PyTorch's, by one kernel each way on a GPU; a population's members have weights of their own there."""

    def forward(self, x: Tensor) -> Tensor:
        form = "parallel" if self.refusal(x) else "kernel"
        return layer_norm(x, self.weight, self.bias, self.eps, self.weight.dtype, form=form)


class Block(nn.Module):
    """A mixer and perhaps an MLP, each behind a norm, or before it, and beside a residual."""

    def __init__(self, config: ModelConfig, layer: MixerConfig, *, norms_after: bool = False) -> None:
        super().__init__()
        self.norms_after = norms_after
        norm = LayerNorm if config.norm == "layer" else RMSNorm
        self.norm = norm(config.width, eps=config.eps)
        self.mixer: Mixer = layer.build()
        self.mlp_norm = norm(config.width, eps=config.eps) if config.mlp else None
        self.mlp = MLP(config.width, config.mlp, config.mlp_kind, config.mlp_bias) if config.mlp else None

    def forward(
        self,
        r: Tensor | Sum,
        state: State | None = None,
        *,
        tokens_BT: Tensor,
        at_BQ: Tensor | None = None,
        inplace: bool = False,
        want_state: bool = True,
        defer: bool = False,
        shared_BTD: Tensor | None = None,
        want_shared: bool = False,
    ) -> tuple[Any, ...]:
        """The residual stream after the layer, at all positions or those asked for, and the mixer's state.

        Args:
            shared_BTD: what an earlier layer of the mixer's class shares with it.
            want_shared: whether a third result is what this layer shares with later ones (`Mixer.shared`).
            defer: the stream is given away, and the layer's last sum left to the norm that reads it next.
        """
        more: dict[str, Any] = {"tokens_BT": tokens_BT} if self.mixer.reads_tokens else {}
        if self.mixer.reads_shared:
            more["shared_BTD"] = shared_BTD
        r, h = self._read(self.norm, r, defer)
        # before the mixer, which may write into the state
        shared = (self.mixer.shared(h, state),) if want_shared else ()
        x, state = self.mixer(h, state, inplace=inplace, want_state=want_state, **more)
        x = self.norm(x) if self.norms_after else x
        after = Sum(r, x) if at_BQ is None else _SumAt.apply(r, x, at_BQ)
        if self.mlp is not None and self.mlp_norm is not None:
            r, h = self._read(self.mlp_norm, after, defer)
            x = self.mlp(h)
            after = Sum(r, self.mlp_norm(x) if self.norms_after else x)
        r = after if defer or isinstance(after, Tensor) else after.r + after.x
        return r, state, *shared

    def _read(self, norm: Norm, r: Tensor | Sum, defer: bool) -> tuple[Tensor, Tensor]:
        """The residual stream, its last sum taken, and what mixer or MLP read: its norm, or it as it is."""
        if not self.norms_after:
            return norm.read(r, inplace=defer)
        r = r.r + r.x if isinstance(r, Sum) else r
        return r, r.to(norm.weight.dtype)


class _SumAt(torch.autograd.Function):
    """r + x at the positions asked for: (B, T, D), (B, T, D), (B, Q) to (B, Q, D).

    Either gets the same gradient, zero but at these positions. To add it up there in a fixed order a GPU
    sorts all its numbers first; a product with a matrix of zeros and ones is faster, and as repeatable.
    """

    @staticmethod
    def forward(r_BTD: Tensor, x_BTD: Tensor, at_BQ: Tensor) -> Tensor:
        index_BQD = at_BQ[..., None].expand(-1, -1, r_BTD.shape[-1])
        return r_BTD.gather(1, index_BQD) + x_BTD.gather(1, index_BQD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        r_BTD, x_BTD, at_BQ = inputs
        ctx.save_for_backward(at_BQ)
        ctx.length, ctx.dtypes = r_BTD.shape[1], (r_BTD.dtype, x_BTD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BQD: Tensor) -> tuple[Tensor, Tensor, None]:
        (at_BQ,) = ctx.saved_tensors
        if grad_BQD.device.type == "cpu":
            index_BQD = at_BQ[..., None].expand(grad_BQD.shape)
            zeros_BTD = grad_BQD.new_zeros(len(at_BQ), ctx.length, grad_BQD.shape[-1])
            grad_BTD = zeros_BTD.scatter_add(1, index_BQD, grad_BQD)
        else:
            token_T1 = torch.arange(ctx.length, device=at_BQ.device)[:, None]
            grad_BTD = (token_T1 == at_BQ[:, None]).to(grad_BQD.dtype) @ grad_BQD
        r_dtype, x_dtype = ctx.dtypes
        return grad_BTD.to(r_dtype), grad_BTD.to(x_dtype), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        folded = (fold(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True))
        return unfold(_SumAt.apply(*folded), info.batch_size), 0


class Model(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.position_embed = nn.Embedding(config.positions, config.width) if config.positions else None
        self.blocks = nn.ModuleList(
            Block(config, layer, norms_after=depth in config.norms_after)
            for depth, layer in enumerate(config.layers)
        )
        self.norm = (LayerNorm if config.norm == "layer" else RMSNorm)(config.width, eps=config.eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab, bias=False)
        self.shared_from = _first_of_class(self.mixers)
        """By depth of each layer that reads what an earlier one shares, the depth of that one."""
        self._narrow = Kept()
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's initialisation, as Zoology uses it: N(0, 0.02), zero biases, and the projections that end a
        residual branch (named out_proj and fc2) scaled by 1 / sqrt(2 layers). Mixers with `own_init` keep
        theirs, apart from that scale."""
        own = {id(m) for b in self.blocks if b.mixer.own_init for m in b.mixer.modules()}  # type: ignore[union-attr]
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and id(module) not in own:
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if name.endswith((".out_proj", ".fc2")):
                with torch.no_grad():
                    module.weight.div_(math.sqrt(2 * len(self.blocks)))

    @property
    def mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def block_dtype(self) -> torch.dtype:
        """What the blocks compute in: see holdall/precision.py."""
        return self.blocks[0].norm.weight.dtype  # type: ignore[union-attr,return-value]

    @property
    def head_name(self) -> str:
        """The name of the head's weight among the parameters."""
        return "embed.weight" if self.head is None else "head.weight"

    @property
    def head_weight(self) -> Tensor:
        """What turns `hidden` into logits, (V, D): the embedding where the head is tied.

        Raises ValueError if the head is no longer a weight alone, as with LoRA: `logits` takes any.
        """
        if self.head is None:
            return self.embed.weight
        if not is_plain(self.head):
            raise ValueError(
                f"the head is a {type(self.head).__name__}, which is more than its weight: merge it first, "
                "or use `logits`"
            )
        return self.head.weight

    def logits(self, h: Tensor) -> Tensor:
        """The head's logits, (..., V), of what `hidden` gives, (..., D), in the dtype of the head.

        On a GPU, where blocks compute in 16 bits and nothing is trained, the product's operands are in 16
        bits too, and its sums and results stay as wide as the head.
        """
        if self.head is not None and not is_plain(self.head):
            wide_V = wide(self.head, h, torch.promote_types(h.dtype, self.embed.weight.dtype))
            return capped(wide_V, self.config.soft_cap)
        head_VD = self.head_weight
        narrow = self.block_dtype
        if head_VD.device.type != "cuda" or narrow.itemsize != 2 or torch.is_grad_enabled():
            return capped(h.to(head_VD.dtype) @ head_VD.T, self.config.soft_cap)
        h_ND = h.to(narrow).view(-1, h.shape[-1])
        narrow_VD = self._narrow.of(head_VD, lambda head: head.to(narrow))
        wide_NV = torch.mm(h_ND, narrow_VD.T, out_dtype=head_VD.dtype)
        return capped(wide_NV, self.config.soft_cap).view(*h.shape[:-1], len(head_VD))

    def hidden(
        self,
        tokens_BT: Tensor,
        states: Sequence[State] | None = None,
        *,
        at_BQ: Tensor | None = None,
        inplace: bool = False,
        want_states: bool = True,
        run: Callable[..., tuple[Any, ...]] | None = None,
    ) -> tuple[Tensor, list[State] | None]:
        """What the head reads, after the last norm, at all positions or those asked for.

        Args:
            tokens_BT: the next T tokens of each row.
            states: what an earlier call returned; None if nothing was read yet.
            at_BQ: positions within these T tokens; after the last mixer only they are computed.
            inplace: as in `Mixer.forward`. States with room keep all their addresses.
            want_states: as `want_state` there.
            run: what calls a block, with the block and its arguments: training may have its own way.

        Returns:
            h_BTD or h_BQD, and the states, one per layer (and one more of learned positions). Tokens beyond
            the last learned position, and states of another model or of other rows, are refused (ValueError).
        """
        self._check_states(tokens_BT, states)
        embedded_BTD = self.embed(tokens_BT)
        if self.config.embed_scale != 1:
            embedded_BTD = embedded_BTD * self.config.embed_scale
        after: list[State] = []
        position: State | None = None
        if self.position_embed is not None:
            start = none_read(len(tokens_BT), embedded_BTD.device) if states is None else states[-1]
            position_BTD, position = self._embed_positions(start, tokens_BT.shape[1])
            embedded_BTD = embedded_BTD + position_BTD
        r: Tensor | Sum = embedded_BTD
        # each sum of the stream is one kernel with the norm behind it, also from a block to the next
        defer = {"defer": True} if run is None and forms.fused(embedded_BTD) else {}
        run = run or nn.Module.__call__
        shared: dict[int, Tensor] = {}
        for depth, block in enumerate(self.blocks):
            before = None if states is None else states[depth]
            at = at_BQ if depth == len(self.blocks) - 1 else None
            try:
                r, state, *gives = run(
                    block, r, before, tokens_BT=tokens_BT, at_BQ=at,
                    inplace=inplace, want_state=want_states, **defer, **self._sharing(depth, shared),
                )  # fmt: skip
            except StateError as error:
                raise StateError(f"layer {depth}: {error}") from None
            if gives:
                (shared[depth],) = gives
            if want_states:
                assert state is not None
                after.append(state)
        if position is not None:
            after.append(position if states is None or not inplace else write_state(states[-1], position))
        return self.norm.read(r, inplace=True)[1], after if want_states else None

    def _sharing(self, depth: int, shared: dict[int, Tensor]) -> dict[str, Any]:
        """The arguments of a block that are about shared values: none in most models."""
        if not self.shared_from:
            return {}
        how: dict[str, Any] = {"want_shared": True} if depth in self.shared_from.values() else {}
        if depth in self.shared_from:
            how["shared_BTD"] = shared[self.shared_from[depth]]
        return how

    def _embed_positions(self, start: Any, new: int) -> tuple[Tensor, State]:
        """The learned positions of the next tokens, and the count of tokens read after them."""
        assert self.position_embed is not None
        limit = self.config.positions
        position = count_on(start, new, limit, f"the model has {limit} learned positions")
        index_BT = start.seen_B[:, None] + torch.arange(new, device=start.seen_B.device)
        if not is_reserved(start):
            return self.position_embed(index_BT), position
        if why := check_room(start, new):
            raise StateError(f"a model with learned positions: {why}")
        embedded_BTD, over_B = self.position_embed(index_BT.clamp(max=limit - 1)), beyond(start, new)
        if over_B is not None:
            embedded_BTD = embedded_BTD.masked_fill(over_B[:, None, None], torch.nan)
        return embedded_BTD, advanced(start, position, new)

    def init_states(
        self,
        rows: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        capacity: int | None = None,
    ) -> list[State]:
        """The states that None stands for, one per layer (and one more of learned positions).

        Args:
            rows: how many.
            dtype: of the activations; that of the blocks' weights if None.
            device: where; that of the weights if None.
            capacity: tokens that a row will have read at most. With it all tensors have fixed sizes, and with
                `inplace=True` fixed addresses: see holdall/contract/room.py. More than there are learned
                positions are refused (ValueError).
        """
        dtype, device = dtype or self.block_dtype, device or self.device
        states = [
            mixer.init_state(rows, dtype=dtype, device=device, capacity=capacity) for mixer in self.mixers
        ]
        if self.position_embed is None:
            return states
        position = none_read(rows, device)
        return [*states, position if capacity is None else self._position_with_room(position, capacity)]

    def with_room(self, states: Sequence[State], capacity: int) -> list[State]:
        """Copies of a model's states with room for `capacity` tokens in each row, those read included.

        Raises ValueError if they hold more, or if the model has fewer learned positions.
        """
        self._check_count(states)
        pairs = zip(self.mixers, states, strict=False)
        roomy = [mixer.with_room(state, capacity) for mixer, state in pairs]
        return roomy + [self._position_with_room(state, capacity) for state in states[len(roomy) :]]

    @property
    def prefix(self) -> int:
        """Tokens at a row's start that see each other, and so have to be read in one call: all of the first
        call's, up to this number; 0 for a causal model.

        Raises ValueError, naming the layer, if the tokens of every call see each other: such a model neither
        reads a text in pieces nor continues one.
        """
        for depth, mixer in enumerate(self.mixers):
            if "splits" in mixer.refusals and not mixer.prefix:
                why = mixer.refusals["splits"]
                raise ValueError(f"layer {depth}, {mixer.owner}, cannot read a text in pieces: {why}")
        return max(mixer.prefix for mixer in self.mixers)

    @property
    def rollback_limit(self) -> int:
        """How many of a row's last tokens `rollback` can take back: as many as every layer can."""
        return min(mixer.rollback_limit for mixer in self.mixers)

    def rollback(
        self, states: Sequence[State], count_B: Tensor | int, *, inplace: bool = False
    ) -> list[State]:
        """A model's states as if each row's last tokens had never been read; see `Mixer.rollback`.

        Args:
            states: what a call returned.
            count_B: how many, of every row or of each, (B,); at most `rollback_limit`.
            inplace: the caller gives the states away, and those returned are in their memory. They are no
                longer anything if this raises.

        Raises StateError, naming the layer, for more than a layer or a row can give back.
        """
        self._check_count(states)
        before: list[State] = []
        for depth, (mixer, state) in enumerate(zip(self.mixers, states, strict=False)):
            try:
                before.append(mixer.rollback(state, count_B, inplace=inplace))
            except StateError as error:
                raise StateError(f"layer {depth}: {error}") from None
        if self.position_embed is not None:
            position, owner = states[-1], "a model with learned positions"
            back_B = counts_of(count_B, len(position[0]), position[0].device)
            counted = without_last(position, POSITION_SLOTS, back_B, owner, inplace=inplace)
            before.append(write_state(position, counted) if inplace else counted)
        return before

    def _position_with_room(self, position: State, capacity: int) -> State:
        if capacity > self.config.positions:
            positions = self.config.positions
            raise ValueError(
                f"a capacity of {capacity} tokens, but the model has {positions} learned positions"
            )
        return reserve(position, POSITION_SLOTS, capacity)

    def _check_states(self, tokens_BT: Tensor, states: Sequence[State] | None) -> None:
        """Refuse with ValueError tokens and states that are not of this model; mixers check their own."""
        shape = tuple(tokens_BT.shape)
        if len(shape) != 2 or not shape[1]:
            raise ValueError(f"tokens_BT has shape {shape}, where a model needs rows of at least one token")
        if states is None:
            return
        owner, with_positions = self._check_count(states), self.position_embed is not None
        if with_positions:
            device = tokens_BT.device
            kind, fields = with_room_too(states[-1], Position, POSITION_FIELDS)
            if why := misfit(states[-1], kind, fields, owner, rows=shape[0], device=device):
                raise StateError(why)

    def _check_count(self, states: Sequence[State]) -> str:
        """Refuse another number of states than the model has; returns what errors call the model."""
        layers, with_positions = len(self.blocks), self.position_embed is not None
        owner = f"a model of {layers} layers" + " and learned positions" * with_positions
        if len(states) != layers + with_positions:
            raise StateError(f"{owner} needs {layers + with_positions} states, not {len(states)}")
        return owner

    def forward(
        self, tokens_BT: Tensor, states: Sequence[State] | None = None, **options: Any
    ) -> tuple[Tensor, list[State] | None]:
        """Logits at all positions or those asked for; arguments as in `hidden`."""
        h, after = self.hidden(tokens_BT, states, **options)
        return self.logits(h), after

    @torch.no_grad()
    def state_bytes(self, context_len: int) -> int:
        """Bytes of one row's states, all layers, counted from what is carried after `context_len` tokens."""
        tokens = torch.zeros(1, context_len, dtype=torch.long, device=self.device)
        _, states = self.hidden(tokens)
        assert states is not None
        return sum(map(bytes_per_row, states))

    @property
    def needs_room(self) -> bool:
        """Whether states with fixed addresses need a capacity: caches that grow, or learned positions."""
        return any(map(is_reserved, self.init_states(1, device=torch.device("meta"), capacity=1)))

    def reserved_bytes(self, capacity: int) -> int:
        """Bytes of one row's states, all layers, with room for `capacity` tokens."""
        return sum(map(bytes_per_row, self.init_states(1, device=torch.device("meta"), capacity=capacity)))

    def parameter_count(self) -> int:
        """Trained weights; a tied head is counted once, as the embedding."""
        return sum(p.numel() for p in self.parameters())


def _first_of_class(mixers: Sequence[Mixer]) -> dict[int, int]:
    """By depth of each mixer that reads what an earlier one of its class shares, the depth of the first."""
    kinds = [type(mixer) for mixer in mixers]
    readers = [depth for depth, mixer in enumerate(mixers) if mixer.reads_shared]
    return {depth: first for depth in readers if (first := kinds.index(kinds[depth])) < depth}


def head_loss(
    h_ND: Tensor, head_VD: Tensor, target_N: Tensor, soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, in nats, and which predictions are right; by the kernel where there is one.

    The logits are never all in memory. `h` may be in bf16 beside a head in fp32: the kernel then reads the
    head in bf16, plain PyTorch reads both in fp32, and the gradients come in the dtype of each. Logits with a
    bound have no kernel.
    """
    if soft_cap or not has_kernel(h_ND):
        return linear_cross_entropy(h_ND.to(head_VD.dtype), head_VD, target_N, soft_cap=soft_cap)
    with torch.autocast(h_ND.device.type, h_ND.dtype, enabled=h_ND.dtype != head_VD.dtype):
        return linear_cross_entropy(h_ND, head_VD, target_N, form="kernel")


def has_kernel(x: Tensor) -> bool:
    """Whether kernels run on such a tensor."""
    return x.device.type == "cuda" and not forms.kernel_refusal(x.device, x.dtype)
