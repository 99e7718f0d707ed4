"""A model of another program and what Holdall makes of it: the same logits and the same greedy text.

The originals are tiny, random, and made by the libraries' own classes. They compute norms, rotary positions
and softmax in fp32 whatever they are asked for; `InDouble` has them compute all in fp64, so that the
comparison is of equations and not of rounding.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from holdall import files
from holdall.adapters import foreign
from holdall.adapters.reading import ForeignError, Weights, weights_in
from holdall.model import Model

SINGLE, DOUBLE = torch.float32, torch.float64


@functools.cache
def transformers() -> ModuleType:
    """The library, imported when a test first needs it; where it is not installed the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="transformers is not installed")


class InDouble(TorchFunctionMode):
    """Within, whatever asks for fp32 gets fp64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args, kwargs = _doubled(args), {name: _doubled(value) for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def _doubled(value: Any) -> Any:
    if value is SINGLE:
        return DOUBLE
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(_doubled(one) for one in value)
    return value


def converted(original: nn.Module, folder: Path, dtype: torch.dtype = SINGLE) -> Model:
    """What Holdall reads of the folder that the original writes, with weights of this dtype.

    What a family computes from fp64 weights stays in fp64: 1 + w is another number in fp32.
    """
    original.save_pretrained(folder)  # type: ignore[operator]
    with weights_in(folder) as weights:
        where = folder / "config.json"
        config, tensors = foreign.read(files.read_json(where), weights, str(where))
        model = foreign.built(config, tensors, str(folder)).to(dtype).eval()
        model.load_state_dict(tensors)
        return model


def whole(model: Model, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT)[0]


def in_pieces(model: Model, tokens_BT: Tensor, sizes: list[int]) -> Tensor:
    logits, states = [], None
    for piece_BT in tokens_BT.split(sizes, dim=1):
        logits_BTV, states = model(piece_BT, states)
        logits.append(logits_BTV)
    return torch.cat(logits, dim=1)


def check_refused(original: Any, fields: Mapping[str, Any], message: str) -> None:
    """Hold a model whose config has other fields to be refused in these words, as a regular expression."""
    config_json = original.config.to_diff_dict() | dict(fields)
    with pytest.raises(ForeignError, match=message):
        foreign.read(config_json, Weights(dict(original.state_dict()), "weights"), "config.json")


@torch.no_grad()
def check(original: Any, folder: Path, *, length: int = 23, vocab: int | None = None, new: int = 12) -> Model:
    """Hold a converted model to its original; returns it, in fp32.

    Logits to 1e-5 in fp32 and to 1e-10 in fp64, of the whole, in pieces and token by token, relative to the
    largest logit where that is above one; and the same greedy text, token by token.
    """
    return checked(original, folder, length=length, vocab=vocab, new=new)[0]


@torch.no_grad()
def checked(
    original: Any, folder: Path, *, length: int = 23, vocab: int | None = None, new: int = 12
) -> tuple[Model, dict[str, float]]:
    """As `check`; also the largest errors in "fp32" and "fp64", relative as there."""
    original = original.eval()
    model = converted(original, folder)
    errors = {"fp32": 0.0, "fp64": 0.0}
    vocab = vocab or original.config.vocab_size
    tokens_BT = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0))
    want_BTV = original(tokens_BT, use_cache=False).logits
    size = want_BTV.shape[-1]

    def near(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        largest = max(1.0, float(want.abs().max()))
        error = float((got[..., :size] - want).abs().max()) / largest
        assert error <= tolerance, (
            f"{what} differs by {error:.1e} of {largest:.1e}, more than {tolerance:.0e}"
        )
        errors[what[-4:]] = max(errors[what[-4:]], error)

    ways = {"the whole": [length], "in pieces": [1, 6, 2, length - 9], "token by token": [1] * length}
    for name, sizes in ways.items():
        near(f"{name} in fp32", in_pieces(model, tokens_BT, sizes), want_BTV, 1e-5)

    text = tokens_BT
    for _ in range(new):  # without a cache: the original's own definition
        text = torch.cat((text, original(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    logits_BTV, states = model(tokens_BT)
    for at in range(length, length + new):
        next_B1 = logits_BTV[:, -1:, :size].argmax(-1)
        assert torch.equal(next_B1[:, 0], text[:, at]), f"the greedy token {at - length} is another one"
        logits_BTV, states = model(next_B1, states)

    with InDouble():  # made anew, since frequencies of rotary positions are computed when it is made
        exact = type(original)(original.config).double().eval()
        exact.load_state_dict(original.state_dict())
        want_BTV = exact(tokens_BT, use_cache=False).logits
    assert want_BTV.dtype == DOUBLE
    wide = converted(exact, folder / "fp64", DOUBLE)
    assert wide.config == model.config
    for name, sizes in ways.items():
        near(f"{name} in fp64", in_pieces(wide, tokens_BT, sizes), want_BTV, 1e-10)
    return model, errors


def show_errors(name: str, original: Any) -> None:
    """Prints what docs/checkpoints.md quotes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        _, errors = checked(original, Path(folder))
    print(f"{name}: {errors['fp32']:.1e}, {errors['fp64']:.1e}")
