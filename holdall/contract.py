"""The one contract: a sequence mixer maps a stretch of tokens and a state to outputs and the next state.

    y_BTD, state = mixer(x_BTD, state)       any T >= 1; state None means "nothing read yet"

Training, prefill, one decode step and another chunk after that are this same call. A *state* is a
value: a NamedTuple of tensors whose first dimension is the batch row, so rows can be selected, copied,
saved and moved. tests/laws.py holds every registered mixer to the laws that follow from this.

Shape letters, here and in all of Holdall: B batch row, T time, D model width, H heads, K key dim,
V value dim, F features, N state size per channel, S slots of a cache.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import textwrap
import types
import typing
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from holdall import checkpoints, files, forms, settings
from holdall.settings import PositiveInt

State = tuple[Tensor, ...]
"""A NamedTuple of tensors, first dimension the batch row; each mixer names its own."""

STATE_FORMAT = "holdall-state-1"
"""Written into every state file; changes when a file of before can no longer be read."""


# ---------------------------------------------------------------------------------------------- configs


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the closest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return (f"Did you mean '{close[0]}'? " if close else "") + f"Known: {', '.join(known)}"


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type; True is not an int, and an int will do as a float."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        return _fits(value, args[0])
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(key, args[0]) and _fits(item, args[1]) for key, item in value.items()
        )
    if origin is tuple:
        each = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (...,) else args
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def check_fields(kind: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, if a dataclass can be made of them; TypeError for one of another type than its field's."""
    for name, hint in typing.get_type_hints(kind).items():
        if name in values and not _fits(values[name], hint):
            raise TypeError(f"{name} = {values[name]!r:.80} is not of type {hint}")
    return values


C = TypeVar("C", bound="Config")  # not typing.Self, which the shape checks at test time cannot resolve


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs: frozen, keyword-only, and picky about unknown fields, types and ranges.

    A field declares which numbers it takes beside its type (holdall/settings.py); NaN and infinity are taken
    nowhere. A subclass checks in `validate()` what fields must be to each other; types and ranges are right
    by then.
    """

    def __post_init__(self) -> None:
        hints, plain = field_types(type(self))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), plain[field.name]
            if not _fits(value, kind):
                says = str(kind).replace("typing.", "") if typing.get_origin(kind) else kind.__name__
                raise TypeError(f"{type(self).__name__}.{field.name} = {value!r} is not of type {says}")
            settings.check(f"{type(self).__name__}.{field.name}", value, hints[field.name])
            if kind is float:
                object.__setattr__(self, field.name, float(value))
        self.validate()

    def validate(self) -> None:
        """Raise ValueError, naming field and way out, if values do not fit together."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, defaults included, as plain JSON values."""
        return {field.name: _to_plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[C], plain: Mapping[str, Any]) -> C:
        """The inverse of `to_dict`; an unknown field raises TypeError with the closest known one."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in plain:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no field '{name}'. {did_you_mean(name, known)}")
        _, hints = field_types(cls)
        return cls(**{name: _from_plain(value, hints[name]) for name, value in plain.items()})

    @classmethod
    def read(cls: type[C], path: Path, way_out: str = "") -> C:
        """The config that a JSON file holds. Raises RunError, which names the file and what is wrong."""
        return cls.checked(files.read_json(path, way_out), path, way_out)

    @classmethod
    def parse(cls: type[C], text: str, where: object, way_out: str = "") -> C:
        """The config that a JSON text says; `where` is named by the RunError about anything else."""
        return cls.checked(files.parse_json(text, where, way_out), where, way_out)

    @classmethod
    def checked(cls: type[C], plain: Mapping[str, Any], where: object, way_out: str = "") -> C:
        """`from_dict` of values that come from a file: whatever is wrong with them is a RunError."""
        try:
            return cls.from_dict(plain)
        except Exception as error:  # the values may be of any kind, and validate() calculates with them
            reason = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise files.damaged(where, f"{reason or type(error).__name__}", way_out) from error


_field_types: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}


def field_types(config: type[Config]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The types of a config's fields, with the ranges that they declare and without; looked up once."""
    if config not in _field_types:
        whole = typing.get_type_hints(config, include_extras=True)
        _field_types[config] = whole, typing.get_type_hints(config)
    return _field_types[config]


def _to_plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return [_to_plain(item) for item in value] if isinstance(value, tuple) else value


def _from_plain(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) in (Union, types.UnionType):
        is_list = isinstance(value, list)
        fitting = [arg for arg in typing.get_args(kind) if (typing.get_origin(arg) is tuple) == is_list]
        return _from_plain(value, fitting[0]) if fitting else value
    if isinstance(value, list):
        args = typing.get_args(kind)
        each = args[:1] * len(value) if args[1:] == (...,) else args
        # items beyond the last type stay, so that the check of the whole refuses them
        return tuple(_from_plain(item, each[i] if i < len(each) else Any) for i, item in enumerate(value))
    if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Config):
        return kind.from_dict(value)
    return value


# ----------------------------------------------------------------------------------------------- mixers


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """Base of the mixers' configs: the model width, and which of a mixer's forms runs.

    `form` "loop" is the definition, "parallel" the parallel or chunked form in plain PyTorch, "kernel" the
    one for GPUs, where there is one; "auto" takes the fastest that can run on the mixer's device, and the
    built mixer's `form` says which that is (holdall/forms.py).
    """

    width: PositiveInt = 64
    form: str = "auto"

    name: ClassVar[str] = ""
    """The registered name; set by `register`."""
    forms: ClassVar[tuple[str, ...]] = ("loop", "parallel")
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
    def from_dict(cls: type[C], plain: Mapping[str, Any]) -> C:
        """The config of the mixer that `plain["name"]` names, whichever class this is called on."""
        options = {key: value for key, value in plain.items() if key != "name"}
        owner = lookup(plain["name"]).config if "name" in plain else cls
        if not issubclass(owner, cls):
            raise TypeError(f"'{plain['name']}' is not a {cls.__name__}")
        return super(MixerConfig, owner).from_dict(options)

    def options(self) -> dict[str, Any]:
        """The fields that differ from their defaults, without the width: what makes this one special."""
        plain = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {
            name: _to_plain(v) for name, (v, default) in plain.items() if name != "width" and v != default
        }


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

    def __init_subclass__(cls, **options: Any) -> None:
        """Every mixer's `forward`, a user's own included, is called through the one check at the border."""
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward = _checked(vars(cls)["forward"])  # type: ignore[method-assign]

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
            inplace: the caller gives `state` away, so its memory may be reused. Not for training.
            want_state: False if the caller will drop the state (training on whole sequences): mixers
                need not compute it, and return None.

        Returns:
            y_BTD in the dtype of x, and the state after the last token.
        """

    @abstractmethod
    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | None = None) -> State:
        """The state that None stands for, for `batch` rows and activations of `dtype`."""

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


class StateError(ValueError):
    """A state that is not of the rows, sizes, dtype, device or kind that a mixer carries."""


class Field(NamedTuple):
    """One tensor of a state, whatever its rows: `sizes` begins with its second dimension, or with its third
    where the second is `time` and grows."""

    name: str
    time: bool
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"({', '.join(('rows', *['time'] * self.time, *map(str, self.sizes)))})"


def fields_of(start: State, grows: bool) -> tuple[Field, ...]:
    """The fields of a state in which nothing was read: where time grows, the second dimension is empty.

    So it may be where it never grows, as of a convolution that is switched off: `grows` says whether the
    state has more elements after a token. What has no elements either way, a count of tokens, always may.
    """
    fields = []
    for name, tensor in zip(type(start)._fields, start, strict=True):  # type: ignore[attr-defined]
        time = tensor.ndim > 1 and tensor.shape[1] == 0 and (grows or 0 in tensor.shape[2:])
        fields.append(Field(name, time, tuple(tensor.shape[1 + time :]), tensor.dtype))
    return tuple(fields)


def misfit(
    state: Any,
    kind: type[tuple],
    fields: tuple[Field, ...],
    owner: str,
    *,
    rows: int | None = None,
    device: torch.device | None = None,
    layer: str = "",
) -> str:
    """Why a state is none that `owner` carries; empty if it is one.

    Shapes, dtypes and devices alone are compared, which costs a few microseconds and never waits for a
    device. Without `rows`, all fields must have the same. Without `device`, as for a state from a file, it is
    anywhere and beside activations of any dtype.
    """
    nameless = type(state) is tuple and len(state) == len(fields)  # its tensors decide
    if not (nameless or isinstance(state, kind)):
        return f"the state{layer} is a {type(state).__name__}, where {owner} needs a {kind.__name__}"
    for found, field in zip(state, fields, strict=True):
        name, time, sizes, dtype = field
        if not isinstance(found, Tensor):
            return f"{name}{layer} is a {type(found).__name__}, where {owner} needs a tensor"
        shape = found.shape
        if len(shape) != 1 + time + len(sizes) or shape[1 + time :] != sizes:
            return f"{name}{layer} has shape {tuple(shape)}, where {owner} needs {field}"
        if rows is None:
            rows = shape[0]
        if shape[0] != rows:
            return f"{name}{layer} has shape {tuple(shape)}, where {owner} needs {rows} rows"
        if device is None:
            if found.is_floating_point() != dtype.is_floating_point:
                return f"{name}{layer} is {found.dtype}, where {owner} needs {dtype}"
        elif found.dtype != dtype:
            return f"{name}{layer} is {found.dtype}, where {owner} needs {dtype}"
        elif found.device != device:
            return f"{name}{layer} is on {found.device}, where {owner} is on {device}"
    return ""


def _checked(forward: Callable[..., tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    """A mixer's forward behind its border."""

    @functools.wraps(forward)
    def checked(self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> tuple[Tensor, Any]:
        _check_border(self, x_BTD, state, how.get("tokens_BT") if how else None)
        if type(state) is tuple:
            state = self.state_type(*state)
        run = forward
        if torch._C._is_any_autocast_enabled():  # whose device need not be this one, but which costs nothing
            device = x_BTD.device.type
            if device != "meta" and torch.is_autocast_enabled(device):
                run = functools.partial(_beside_autocast, forward)
        if x_BTD.shape[0] == 0:
            return _no_rows(run, self, x_BTD, state, **how)
        return run(self, x_BTD, state, **how)

    return checked


def _check_border(mixer: Mixer, x_BTD: Tensor, state: Any, tokens_BT: Tensor | None) -> None:
    """Refuse with ValueError what a mixer would otherwise broadcast, or fail on somewhere inside."""
    shape = x_BTD.shape
    if len(shape) != 3 or shape[2] != mixer.config.width:
        needs = f"{mixer.config.name} needs (rows, tokens, width {mixer.config.width})"
        raise ValueError(f"x_BTD has shape {tuple(shape)}, where {needs}")
    if shape[1] == 0:
        raise ValueError(f"{mixer.config.name} needs at least one token, and x_BTD has shape {tuple(shape)}")
    if tokens_BT is not None and tokens_BT.shape != shape[:2]:
        needs = f"{mixer.config.name} needs {tuple(shape[:2])}, as x_BTD"
        raise ValueError(f"tokens_BT has shape {tuple(tokens_BT.shape)}, where {needs}")
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
    if why := misfit(state, mixer.state_type, fields, mixer.owner, rows=rows, device=device):
        raise StateError(why)


def _no_rows(
    forward: Callable[..., tuple[Tensor, Any]], mixer: Mixer, x_BTD: Tensor, state: Any, **how: Any
) -> tuple[Tensor, Any]:
    """No rows in, no rows out: what comes of one row of zeros, without that row."""

    def one_row(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, tensor.new_zeros(1, *tensor.shape[1:])))

    how = {key: one_row(value) if isinstance(value, Tensor) else value for key, value in how.items()}
    start = None if state is None else map_state(state, one_row)
    y_BTD, after = forward(mixer, one_row(x_BTD), start, **how)
    return y_BTD[:0].clone(), None if after is None else map_state(after, lambda tensor: tensor[:0].clone())


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
        fields = mixer.state_fields(dtype)
        return type(state)(*(tensor.to(field.dtype) for tensor, field in zip(state, fields, strict=True)))

    own = {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}
    copies = {name: copied(tensor) for name, tensor in own.items()}
    start = None if state is None else beside(dtype, state)
    # functional_call would call the mixer's hooks once more
    with torch.autocast(device, enabled=False), _reparametrize_module(mixer, copies):
        y_BTD, after = forward(mixer, x_BTD.to(dtype), start, **how)
    return y_BTD, None if after is None else beside(x_BTD.dtype, after)


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


# --------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a mixer comes from; `arxiv` is the identifier, empty if there is none."""

    title: str
    authors: str
    year: int
    arxiv: str = ""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the registry knows of one mixer.

    Attributes:
        family: which mixers it stands beside in tables.
        state: elements of the state of one row after N tokens, as a formula in the config's letters.
        training, inference: cost of N tokens at once, and of one more token, in O-notation.
        causal: whether no output sees the future.
    """

    name: str
    family: str
    summary: str
    paper: Paper
    state: str
    training: str
    inference: str
    causal: bool
    config: type[MixerConfig]

    @property
    def options(self) -> dict[str, Any]:
        """Each option of the mixer with its default."""
        return {f.name: f.default for f in dataclasses.fields(self.config) if f.name != "width"}

    def configure(self, **options: Any) -> MixerConfig:
        """A config of this mixer; an unknown option raises TypeError with the closest known one."""
        known = [field.name for field in dataclasses.fields(self.config)]
        for option in options:
            if option not in known:
                raise TypeError(f"{self.name} has no option '{option}'. {did_you_mean(option, known)}")
        return self.config(**options)

    def __str__(self) -> str:
        source = f"{self.paper.authors}, {self.paper.year}"
        source += f", arXiv {self.paper.arxiv}" if self.paper.arxiv else ""
        options = "".join(f"\n    {name} = {default!r}" for name, default in self.options.items())
        about = inspect.getdoc(self.config) or ""
        options += "\n" + textwrap.indent(about.partition("\n")[2].strip("\n"), "  ")
        return (
            f"{self.name}: {self.summary}\n  {self.family}; {self.paper.title} ({source})\n"
            f"  state elements after N tokens: {self.state}\n"
            f"  N tokens at once: {self.training}; one more: {self.inference}; "
            f"{'causal' if self.causal else 'not causal'}\n  options:{options}"
        )


_registry: dict[str, Entry] = {}


def register(
    name: str,
    *,
    family: str = "other",
    paper: Paper,
    state: str,
    training: str,
    inference: str,
    causal: bool = True,
) -> Callable[[type[MixerConfig]], type[MixerConfig]]:
    """Class decorator that enters a mixer's config, and with it the mixer, into the registry.

    The first line of the config's docstring becomes the summary. Raises ValueError for a name that
    another class already has.
    """

    def enter(config: type[MixerConfig]) -> type[MixerConfig]:
        other = _registry[name].config if name in _registry else config
        if (other.__module__, other.__qualname__) != (config.__module__, config.__qualname__):
            # the same class once more is welcome: its file was read again
            raise ValueError(
                f"mixer '{name}' is already registered, by {other.__module__}.{other.__qualname__}"
            )
        config.name = name
        _registry[name] = Entry(
            name=name,
            family=family,
            summary=(config.__doc__ or "").strip().partition("\n")[0].rstrip("."),
            paper=paper,
            state=state,
            training=training,
            inference=inference,
            causal=causal,
            config=config,
        )
        return config

    return enter


def lookup(name: str) -> Entry:
    """The registry's entry, among the mixers whose files were imported; KeyError helps with the name."""
    if name not in _registry:
        raise KeyError(f"unknown mixer '{name}'. {did_you_mean(name, _registry)}")
    return _registry[name]


def registered() -> list[str]:
    """The names of the mixers whose files were imported, sorted."""
    return sorted(_registry)


# ---------------------------------------------------------------------------------------- states as values


class Position(NamedTuple):
    """How many tokens a row has read: what a model with learned positions carries beside its mixers' states.

    `seen_B` counts them where they are needed, on the device. To refuse what lies beyond the last position,
    the host has to know too, without waiting for the device: it reads the length of `read_BT0`, a tensor with
    no elements, which grows as a cache of keys does and is as long as the longest row.
    """

    seen_B: Tensor
    read_BT0: Tensor


def none_read(batch: int, device: torch.device | None = None) -> Position:
    """The counts of rows that have read nothing."""
    seen_B = torch.zeros(batch, dtype=torch.long, device=device)
    return Position(seen_B, seen_B.new_zeros(batch, 0, 0))


def count_on(position: Position, new: int, limit: int, limited: str) -> Position:
    """The counts after `new` more tokens; more than `limit` in a row are refused with ValueError.

    A row that was longer than the others may have been taken out since. So only where the limit seems to be
    passed are the rows' own counts asked for, which waits for the device.
    """
    seen_B, read_BT0 = position
    total = read_BT0.shape[1] + new
    if total > limit and read_BT0.shape[1] and len(seen_B):
        total = int(seen_B.max()) + new
    if total > limit:
        before = f", {total - new} of them read before" * (total > new)
        raise ValueError(f"{total} tokens{before}, but {limited}")
    return Position(seen_B + new, seen_B.new_zeros(len(seen_B), total, 0))


S = TypeVar("S", bound=State)


def map_state(state: S, function: Callable[[Tensor], Tensor]) -> S:
    """The state with a function applied to each of its tensors."""
    return type(state)(*map(function, state))


def select_rows(state: S, rows: Sequence[int] | Sequence[bool] | Tensor) -> S:
    """The state of some batch rows, copied; rows may repeat (one prompt read once, continued often).

    Rows are chosen as a tensor's are: by number, from the end if negative, or by a mask that says of each
    whether it stays. Rows that are on a GPU are waited for.
    """
    index, count = _row_numbers(rows, state[0].shape[0]), state[0].shape[0]
    if index.numel() and not -count <= int(index.min()) <= int(index.max()) < count:
        raise ValueError(f"rows {index.tolist()} of a state that has {count} rows, numbered from 0")
    index = torch.where(index < 0, index + count, index)
    return map_state(state, lambda tensor: tensor.index_select(0, index.to(tensor.device)))


def _row_numbers(rows: Sequence[int] | Sequence[bool] | Tensor, count: int) -> Tensor:
    index = torch.as_tensor(rows)
    if index.ndim != 1 or (index.numel() and (index.is_floating_point() or index.is_complex())):
        raise ValueError(f"rows are a list of numbers or a mask, not {rows!r}")
    if index.dtype != torch.bool:
        return index.long()
    if len(index) != count:
        raise ValueError(f"a mask of {len(index)} rows for a state that has {count}")
    return index.nonzero()[:, 0]


def join_rows(states: Sequence[S]) -> S:
    """One state of the rows of several, in order: how requests of different lengths become one batch.

    A tensor that grows with the context has time as its second dimension, newest last; shorter ones get
    zeros in front, which every mixer that carries such a tensor must take for "nothing was there". States of
    different kinds are refused.
    """
    if not states:
        raise ValueError("there is no state to join")
    first = states[0]
    for number, state in enumerate(states):
        # but for time; a state of another number of slots that are not time is refused where it is read
        fields = [Field(name, tensor.ndim > 1, tuple(tensor.shape[2:]), tensor.dtype)
                  for name, tensor in zip(type(first)._fields, first, strict=True)]  # type: ignore[attr-defined]  # fmt: skip
        if why := misfit(state, type(first), tuple(fields), "the first", device=first[0].device):
            raise StateError(f"state {number} cannot be joined with the first: {why}")
    joined = []
    for tensors in zip(*states, strict=True):
        longest = max(tensor.shape[1] if tensor.ndim > 1 else 0 for tensor in tensors)
        fronts = [tensor.new_zeros(tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:])
                  if tensor.ndim > 1 else None for tensor in tensors]  # fmt: skip
        joined.append(torch.cat([tensor if front is None else torch.cat((front, tensor), dim=1)
                                 for front, tensor in zip(fronts, tensors, strict=True)]))  # fmt: skip
    return type(first)(*joined)


def elements_per_row(state: State) -> int:
    """Elements of all tensors in one row of a state."""
    return sum(tensor[0].numel() for tensor in state)


def bytes_per_row(state: State) -> int:
    """Bytes of all tensors in one row of a state."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in state)


POSITION_FIELDS = fields_of(none_read(1, torch.device("meta")), True)


def save_states(states: Sequence[State], path: Path) -> None:
    """Write the states of a stack of mixers, one per layer, to a safetensors file."""
    tensors = {
        f"{layer}.{type(state).__name__}.{field}": tensor.contiguous().cpu()
        for layer, state in enumerate(states)
        for field, tensor in zip(type(state)._fields, state, strict=True)  # type: ignore[attr-defined]
    }
    checkpoints.write(path, tensors, {"format": STATE_FORMAT})


def load_states(path: Path, mixers: Sequence[Mixer]) -> list[State]:
    """Read what `save_states` wrote, for the mixers of the same stack.

    A model's states end with the `Position` of its learned positions, if it has some: so do these.

    Raises ValueError naming the first layer whose state is not of the kind that its mixer carries, and
    RunError for a file that is damaged.
    """
    with checkpoints.opened(path) as file:
        if file.about.get("format") != STATE_FORMAT:
            raise ValueError(f"{path} is not a state file of Holdall ({STATE_FORMAT})")
        tensors = {name: file.tensor(name) for name in file.names}
    kinds = [(mixer.state_type, mixer.state_fields(torch.float32), mixer.owner) for mixer in mixers]
    if any(name.startswith(f"{len(mixers)}.{Position.__name__}.") for name in tensors):
        kinds.append((Position, POSITION_FIELDS, "a model with learned positions"))
    states: list[State] = []
    for layer, (kind, fields, owner) in enumerate(kinds):
        names = [f"{layer}.{kind.__name__}.{field.name}" for field in fields]
        if any(name not in tensors for name in names):
            found = sorted(name for name in tensors if name.startswith(f"{layer}."))
            raise ValueError(f"{path}: layer {layer} needs {names} but the file holds {found}")
        state = kind(*(tensors.pop(name) for name in names))
        if why := misfit(state, kind, fields, owner, layer=f" of layer {layer}"):
            raise StateError(f"{path}: {why}")
        states.append(state)
    if tensors:
        raise ValueError(f"{path} holds states of more than {len(mixers)} layers: {sorted(tensors)}")
    return states
