"""The mixer: one call for training, prefill and decoding, behind one check at its border."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from holdall.contract import forms
from holdall.contract.config import Config, did_you_mean, to_plain
from holdall.contract.rollback import counts_of
from holdall.contract.room import (
    advanced,
    as_grown,
    beyond,
    capacity_of,
    check_room,
    fill,
    is_reserved,
    known_to_the_host,
    reserve,
    slot_names,
)
from holdall.contract.state import (
    Field,
    State,
    StateError,
    fields_of,
    map_state,
    misfit,
    select_rows,
    with_room_too,
    write_state,
)
from holdall.settings import PositiveInt

M = TypeVar("M", bound="MixerConfig")  # not typing.Self, which the shape checks at test time cannot resolve


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """Base of the mixers' configs."""

    width: PositiveInt = 64
    """Width of the model, D: elements of a token's vector, in and out."""
    form: str = "auto"
    """Which implementation runs: "loop" is the definition, "parallel" the parallel or chunked form in plain
    PyTorch, "kernel" the GPU kernel, where there is one. "auto" takes the fastest that can run on the mixer's
    device; the built mixer's `form` is the one that runs (holdall/contract/forms.py).
    """

    name: ClassVar[str] = ""
    """The registered name; set by `register`."""
    forms: ClassVar[tuple[str, ...]] = ("loop", "parallel")
    export_sizes: ClassVar[tuple[str, ...]] = ("rows",)
    """Sizes that torch.export can leave open, with default options: "rows", and "tokens" where the parallel
    form does not cut a text into chunks, whose number is fixed when it is traced."""
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Options under which the laws are checked, each beside the defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("auto", *self.forms):
            raise ValueError(f"{self.name} has no form '{self.form}'. {did_you_mean(self.form, self.forms)}")

    @property
    def has_kernel(self) -> bool:
        """Whether somebody wrote a kernel for a mixer with these options: what strict insists on."""
        return "kernel" in self.forms

    def kernel_refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why the kernel of this config cannot run on such activations; empty if it can."""
        return forms.kernel_refusal(device, dtype)

    def resolved_form(self, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        """The form that will run on such a device; may raise KernelError, see `forms.resolve`."""
        known = [form for form in self.forms if form != "kernel" or self.has_kernel]
        if self.form == "kernel":
            refusal = self._refusal_everywhere()
        else:
            refusal = self.kernel_refusal(device, dtype) if "kernel" in known else ""
        return forms.resolve(self.form, known, device, refusal)

    def _refusal_everywhere(self) -> str:
        """Why the kernel can run on no GPU, whatever the dtype; empty if moving there may help."""
        tried = (torch.float32, torch.bfloat16)
        found = [self.kernel_refusal(torch.device("cuda"), dtype) for dtype in tried]
        return "" if "" in found else found[0]

    @abstractmethod
    def build(self) -> Mixer:
        """The mixer that this config describes, freshly initialised from torch's random state."""

    def to_dict(self) -> dict[str, Any]:
        """All fields and the registered name, so that the dictionary alone tells which mixer it is."""
        return {"name": self.name, **super().to_dict()}

    @classmethod
    def from_dict(cls: type[M], plain: Mapping[str, Any]) -> M:
        """The config of the mixer that `plain["name"]` names, whichever class this is called on."""
        from holdall.contract.registry import lookup  # which knows this class

        options = {key: value for key, value in plain.items() if key != "name"}
        owner = lookup(plain["name"]).config if "name" in plain else cls
        if not issubclass(owner, cls):
            raise TypeError(f"'{plain['name']}' is not a {cls.__name__}")
        return super(MixerConfig, owner).from_dict(options)

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, without the width: what makes this one special."""
        plain = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {name: to_plain(v) for name, (v, default) in plain.items() if name != "width" and v != default}


class Mixer(nn.Module):
    """Base of all sequence mixers.

    Attributes:
        config: the config that built it.
        form: the form that runs, resolved when the mixer is built and when it moves.
        owner: what errors call it.
    """

    state_type: ClassVar[type[State]]
    """The NamedTuple that this mixer's state is."""
    refusals: ClassVar[Mapping[str, str]] = {}
    """Laws that this mixer cannot obey, by name, each with the reason."""
    own_init: ClassVar[bool] = False
    """Whether the published initialisation is the mixer's own; otherwise the model's is used."""
    reads_tokens: ClassVar[bool] = False
    """Whether `forward` also takes the tokens' ids, as the keyword argument `tokens_BT`."""
    reads_shared: bool = False
    """Whether `forward` also takes what a model's first layer of this class shares of the same tokens (see
    `shared`), as the keyword argument `shared_BTD`; None where this is that layer, or stands alone.
    """
    prefix: int = 0
    """Tokens at a row's start that see each other, and so have to be read in one call; 0 where none does. A
    mixer with such a prefix refuses the laws "causal" and "splits", but obeys them behind it: law "prefix".
    """
    fills_slots: bool = False
    """Whether `forward` takes a state with room as it is, and returns one.

    Otherwise it is given one that grows, a copy of the slots in order, and what it appends is put into the
    next free slots: right for every mixer, at the price of that copy in every step.
    """
    rollback_limit: int = 0
    """How many of a row's last tokens `rollback` can take back; 0 where a state cannot be undone."""
    rollback_rounds: bool = False
    """Whether a state that was rolled back differs for good, by rounding, from one that never read what was
    taken back: where what a token writes depends on the state, as in a delta rule. Otherwise it has the same
    bits once twice the limit of tokens have followed.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Every mixer's `forward`, a user's own included, is called through the one check at the border; and
        every mixer's `init_state` takes a capacity; `shared` is called through that check too."""
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward = _checked(vars(cls)["forward"])  # type: ignore[method-assign]
        if "init_state" in vars(cls):
            cls.init_state = _with_capacity(vars(cls)["init_state"])  # type: ignore[method-assign]
        if "shared" in vars(cls):
            cls.shared = _checked_shared(vars(cls)["shared"])  # type: ignore[method-assign]

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config = config
        self.form = config.resolved_form(torch.get_default_device(), torch.get_default_dtype())
        self.owner = f"{config.name} of width {config.width}"
        self._state_fields: dict[torch.dtype, tuple[Field, ...]] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixer:
        """Behind `to`, `cuda`, `half` and the like: another device may run another form."""
        super()._apply(fn, recurse)
        weight = next(self.parameters(), None)
        if weight is not None:
            self.form = self.config.resolved_form(weight.device, weight.dtype)
        return self

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, state: Any = None, *, inplace: bool = False, want_state: bool = True
    ) -> tuple[Tensor, Any]:
        """Read T >= 1 more tokens of any number of rows, none included.

        What does not fit together is refused by name (ValueError): no tokens, another width, and a state of
        other rows, sizes, dtype, device or kind. Under `torch.autocast` a mixer computes what it computes in
        that dtype, on copies of its weights; what it keeps wide stays wide.

        Args:
            x_BTD: the tokens' activations.
            state: what an earlier call returned; None if nothing was read yet.
            inplace: the caller gives `state` away, and the next one is in its memory: every tensor of fixed
                size is the same tensor, at the same address. Not for training.
            want_state: False if the caller will drop the state (training on whole sequences): mixers
                need not compute it, and return None.

        Returns:
            y_BTD in the dtype of x, and the state after the last token.
        """

    def shared(self, x_BTD: Tensor, state: Any = None) -> Tensor:
        """What later layers of this class read of this one, if they say `reads_shared`: (B, T, D).

        A model asks its first layer of the class before it calls it, with the same arguments. Each token's
        depends on that token and the state alone, so it is made again in every call and kept in no state.
        """
        raise NotImplementedError(f"{self.owner} says reads_shared, but has no method `shared`")

    @abstractmethod
    def init_state(self, batch: int, *args: Any, **how: Any) -> State:
        """The state that None stands for. A mixer's own has the signature

            init_state(self, batch, *, dtype, device=None)

        and callers may add `capacity`, which needs no code of the mixer's: see holdall/contract/room.py.

        Args:
            batch: how many rows.
            dtype: of the activations.
            device: where; the default one if None.
            capacity: tokens that a row will have read at most. With it all tensors have fixed sizes: what
                grows otherwise has so many slots. A state that never grows is the same with and without.
        """

    def with_room(self, state: Any, capacity: int) -> State:
        """A copy of a state with room for `capacity` tokens in each row, those read included.

        Raises ValueError if it holds more.
        """
        like = self.init_state(1, dtype=torch.float32, device=torch.device("meta"), capacity=capacity)
        if is_reserved(like):
            return reserve(state, slot_names(like), capacity)
        return type(state)(*(_at_the_end(old, new) for old, new in zip(state, like, strict=True)))

    def rollback(self, state: Any, count_B: Tensor | int, *, inplace: bool = False) -> State:
        """The state as if its rows' last tokens had never been read: drafts that were rejected, say.

        Outputs that follow are, up to rounding, those of a row that never read them, and no bit of them
        depends on what they were. Tokens may be taken back that were read since the last rollback,
        `rollback_limit` of them at most.

        Args:
            count_B: how many, of every row or of each, (B,).
            inplace: the caller gives `state` away; then next to nothing is written. Otherwise it is copied.

        Raises:
            StateError: more than the limit, or than the row can give back; or a state that is not this
                mixer's. What only a GPU knows is not asked for: such a row's outputs are NaN from then on.
        """
        # beside activations of any dtype
        kind, fields = with_room_too(state, self.state_type, self.state_fields(torch.float32))
        if why := misfit(state, kind, fields, self.owner):
            raise StateError(why)
        asked_B = torch.as_tensor(count_B)
        if known_to_the_host(asked_B) and asked_B.numel():
            least, most = int(asked_B.min()), int(asked_B.max())
            if least < 0:
                raise StateError(f"{self.owner} cannot take back {least} tokens")
            if most > self.rollback_limit:
                why = f"{self.owner} cannot take back {most} tokens: its rollback_limit is"
                way = "" if self.rollback_limit else "; read the tokens that are to stay again, from a copy"
                raise StateError(f"{why} {self.rollback_limit}{way}")
        before = self._rolled_back(state, counts_of(count_B, len(state[0]), state[0].device), inplace)
        return write_state(state, before) if inplace else before

    def _rolled_back(self, state: Any, count_B: Tensor, inplace: bool) -> State:
        """What `rollback` returns, of mixers with a limit; a limit of 0 leaves nothing to do.

        In place it may write into the state; what it returns as new tensors is copied into it.
        """
        return state if inplace else map_state(state, torch.clone)

    @abstractmethod
    def state_elements(self, context_len: int) -> int:
        """Elements of all tensors in one row's state after `context_len` tokens."""

    def state_fields(self, dtype: torch.dtype) -> tuple[Field, ...]:
        """What `init_state` makes beside activations of `dtype`, as the check at the border needs it."""
        fields = self._state_fields.get(dtype)
        if fields is None:
            start = self.init_state(1, dtype=dtype, device=torch.device("meta"))
            grows = self.state_elements(1) > self.state_elements(0)
            fields = self._state_fields[dtype] = fields_of(start, grows)
        return fields

    def extra_repr(self) -> str:
        return f"form={self.form}"


# -------------------------------------------------------------------------------------- the border


def _checked(forward: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """A mixer's forward behind its border."""

    @functools.wraps(forward)
    def checked(self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> tuple[Tensor, Any]:
        _check_border(self, x_BTD, state, how)
        if type(state) is tuple:
            state = self.state_type(*state)
        run = _under_autocast(forward, x_BTD)
        if x_BTD.shape[0] == 0:
            run = functools.partial(_no_rows, run)
        if state is None:
            return run(self, x_BTD, None, **how)
        if is_reserved(state):
            run = functools.partial(_with_room, run)
        y_BTD, after = run(self, x_BTD, state, **how)
        if after is not None and how.get("inplace"):
            after = write_state(state, after)
        return y_BTD, after

    return checked


def _checked_shared(shared: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mixer's `shared` behind its border."""

    @functools.wraps(shared)
    def checked(self: Mixer, x_BTD: Tensor, state: Any = None) -> Tensor:
        _check_border(self, x_BTD, state, {})
        if type(state) is tuple:
            state = self.state_type(*state)

        def run(mixer: Mixer, x_BTD: Tensor, state: Any) -> tuple[Tensor, None]:
            return shared(mixer, x_BTD, state), None

        return _under_autocast(run, x_BTD)(self, x_BTD, state)[0]

    return checked


def _under_autocast(
    forward: Callable[..., tuple[Tensor, Any]], x_BTD: Tensor
) -> Callable[..., tuple[Tensor, Any]]:
    """What computes as autocast asks, where it is on."""
    if torch._C._is_any_autocast_enabled():  # whose device need not be this one, but which costs nothing
        device = x_BTD.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            return functools.partial(_beside_autocast, forward)
    return forward


def _check_border(mixer: Mixer, x_BTD: Tensor, state: Any, how: Mapping[str, Any]) -> None:
    """Refuse with ValueError what a mixer would otherwise broadcast, or fail on somewhere inside."""
    shape = x_BTD.shape
    if len(shape) != 3 or shape[2] != mixer.config.width:
        needs = f"{mixer.config.name} needs (rows, tokens, width {mixer.config.width})"
        raise ValueError(f"x_BTD has shape {tuple(shape)}, where {needs}")
    if shape[1] == 0:
        raise ValueError(f"{mixer.config.name} needs at least one token, and x_BTD has shape {tuple(shape)}")
    for name, dims in (("tokens_BT", 2), ("shared_BTD", 3)) if how else ():
        found = how.get(name)
        if found is not None and found.shape != shape[:dims]:
            needs = f"{mixer.config.name} needs {tuple(shape[:dims])}, as x_BTD"
            raise ValueError(f"{name} has shape {tuple(found.shape)}, where {needs}")
    if state is None:
        return
    rows, device, fields = shape[0], x_BTD.device, mixer.state_fields(x_BTD.dtype)
    if isinstance(state, mixer.state_type):
        # `misfit` for a state that fits, which nearly all do, in a quarter of its time: a step may be short
        for found, (_, time, sizes, dtype) in zip(state, fields, strict=True):
            if not isinstance(found, Tensor):
                break
            has = found.shape
            if len(has) <= time or has[0] != rows or has[1 + time :] != sizes:
                break
            if found.dtype is not dtype or found.device != device:
                break
        else:
            return
    kind, fields = with_room_too(state, mixer.state_type, fields)
    if why := misfit(state, kind, fields, mixer.owner, rows=rows, device=device):
        raise StateError(why)
    if is_reserved(state) and (why := check_room(state, shape[1])):
        raise StateError(f"{mixer.owner}: {why}")


def _with_capacity(init_state: Callable[..., State]) -> Callable[..., State]:
    """A mixer's init_state that takes a capacity, whether or not its own code does."""
    own = "capacity" in inspect.signature(init_state).parameters

    @functools.wraps(init_state)
    def with_capacity(self: Mixer, batch: int, *, capacity: int | None = None, **how: Any) -> State:
        if capacity is None:
            return init_state(self, batch, **how)
        if capacity < 1:
            raise ValueError(f"a capacity is a number of tokens of at least 1, not {capacity}")
        start = init_state(self, batch, **how, **({"capacity": capacity} if own else {}))
        grow = [field.name for field in self.state_fields(how["dtype"]) if field.time]
        if is_reserved(start) or any(getattr(start, name).shape[1] for name in grow) or not grow:
            return start
        return reserve(start, grow, capacity)

    return with_capacity


def _with_room(
    forward: Callable[..., tuple[Tensor, Any]], mixer: Mixer, x_BTD: Tensor, state: Any, **how: Any
) -> tuple[Tensor, Any]:
    """A call with slots to fill: by the mixer itself, or around it, as of a state that grows."""
    new, after = x_BTD.shape[1], None
    over_B = beyond(state, new)  # before the call, which may count its tokens in place
    if mixer.fills_slots:
        y_BTD, after = forward(mixer, x_BTD, state, **how)
    else:
        y_BTD, grown = forward(mixer, x_BTD, as_grown(state), **how)
        if grown is not None:
            after = _filled(mixer, state, grown, new, inplace=bool(how.get("inplace")))
    if over_B is not None:
        y_BTD = y_BTD.masked_fill(over_B[:, None, None], torch.nan)
    return y_BTD, after


def _filled(mixer: Mixer, state: Any, grown: Any, new: int, *, inplace: bool) -> Any:
    """The state with room after a call, from what came of it as of a state that grows."""
    capacity = capacity_of(state)
    tensors = dict(zip(grown._fields, grown, strict=True))
    for name in slot_names(state):
        if (found := tensors[name].shape[1]) != capacity + new:
            raise StateError(
                f"{mixer.owner} makes {found} slots of {name} from {capacity} slots and {new} tokens, so it "
                "does not grow by one per token: have its init_state take a capacity, for which it returns "
                "tensors that stay as large as they are"
            )
        appended_BTX = tensors[name][:, capacity:]
        tensors[name] = fill(getattr(state, name), appended_BTX, state.filled_B, inplace=inplace)
    return advanced(state, list(tensors.values()), new)


def _at_the_end(old_BSX: Tensor, like: Tensor) -> Tensor:
    """A copy of a tensor behind as many empty slots as make it of the sizes of `like`, whatever its rows."""
    sizes = list(like.shape[1:])
    if list(old_BSX.shape[1:]) == sizes:
        return old_BSX.clone()
    return torch.cat(
        (old_BSX.new_zeros(len(old_BSX), sizes[0] - old_BSX.shape[1], *sizes[1:]), old_BSX), dim=1
    )


def _no_rows(
    forward: Callable[..., tuple[Tensor, Any]], mixer: Mixer, x_BTD: Tensor, state: Any, **how: Any
) -> tuple[Tensor, Any]:
    """No rows in, no rows out: what comes of one row of zeros, without that row."""

    def one_row(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))

    how = {key: one_row(value) if isinstance(value, Tensor) else value for key, value in how.items()}
    start = None if state is None else map_state(state, one_row)
    y_BTD, after = forward(mixer, one_row(x_BTD), start, **how)
    return y_BTD[:0].clone(), None if after is None else select_rows(after, slice(0))


def _beside_autocast(
    forward: Callable[..., tuple[Tensor, Any]], mixer: Mixer, x_BTD: Tensor, state: Any, **how: Any
) -> tuple[Tensor, Any]:
    """Under autocast: what the mixer computes in autocast's dtype, from copies of its weights in it.

    Autocast itself would take every product to that dtype, those of a recurrence with its wide state too; so
    within it is off, and what a mixer keeps wide in that dtype stays wide. Outputs have autocast's dtype, as
    a linear layer's have; states have those that they have beside x without autocast, so that they continue
    in and out of it. As in autocast itself, fp64 stays.
    """
    device = x_BTD.device.type
    dtype = x_BTD.dtype if x_BTD.dtype == torch.float64 else torch.get_autocast_dtype(device)

    def copied(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    def beside(dtype: torch.dtype, state: Any) -> Any:
        _, fields = with_room_too(state, mixer.state_type, mixer.state_fields(dtype))
        return type(state)(*(tensor.to(field.dtype) for tensor, field in zip(state, fields, strict=True)))

    own = {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}
    copies = {name: copied(tensor) for name, tensor in own.items()}
    start = None if state is None else beside(dtype, state)
    # functional_call would call the mixer's hooks once more
    with torch.autocast(device, enabled=False), _reparametrize_module(mixer, copies):
        y_BTD, after = forward(mixer, x_BTD.to(dtype), start, **how)
    return y_BTD, None if after is None else beside(x_BTD.dtype, after)


# ----------------------------------------------------------------------------------------- dtypes


def recurrent_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recurrent state beside activations of `dtype`: at least fp32.

    A recurrence adds thousands of small terms to one number; in bf16 its 8 bits of mantissa would drop
    every term below 1/256 of the sum.
    """
    return torch.promote_types(dtype, torch.float32)


def readout_dtype(form: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the values, and so of what is read out of a recurrence, where a norm follows.

    A readout can be thousands of times larger than what the norm makes of it: in fp16, beyond the largest
    number. So it is narrowed after the norm. A kernel multiplies in the dtype of the activations, which does
    as well in bf16 with the exponents of fp32.
    """
    return dtype if form == "kernel" and dtype != torch.float16 else recurrent_dtype(dtype)
