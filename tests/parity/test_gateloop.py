"""GateLoop against the package gateloop-transformer, which scans complex numbers.

Letters: B row, T time, D width.
"""

import warnings
from types import ModuleType

import pytest
import torch
from torch import nn

from holdall.mixers.gateloop import GateLoop, GateLoopConfig
from holdall.testing import laws


@pytest.fixture(scope="module")
def package() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "gateloop_transformer.gateloop_transformer", reason="gateloop-transformer is not installed"
        )


def load(theirs: nn.Module, mixer: GateLoop) -> None:
    """Their weights into ours."""
    weights = dict(theirs.named_parameters())
    own = {
        "to_a.0.weight": "transition.weight",
        "to_a.0.bias": "transition.bias",
        "to_out.weight": "out_proj.weight",
    }
    ours = {name: weights[their_name] for their_name, name in own.items()}
    ours["qkvg.weight"] = torch.cat((weights["to_qkv.weight"], weights["to_gates.0.weight"]))
    mixer.load_state_dict(ours)


@pytest.mark.claim("mixers/gateloop.py", "Weights")
@pytest.mark.parametrize("form", ["loop", "parallel"])
@pytest.mark.parametrize("heads", [1, 4, 16])
@torch.no_grad()
def test_outputs_are_those_of_the_package(package: ModuleType, heads: int, form: str) -> None:
    theirs = package.GateLoopedAttention(16, heads=heads).eval().double()
    for i, parameter in enumerate(theirs.parameters()):
        parameter += 0.3 * laws.draw(*parameter.shape, dtype=torch.float64, seed=i)
    mixer = GateLoopConfig(width=16, heads=heads, chunk=16, form=form).build().double()
    load(theirs, mixer)
    x_BTD = laws.tokens(mixer, 100)
    want_BTD = theirs(x_BTD)
    assert laws.distance(mixer(x_BTD)[0], want_BTD) <= 1e-12 * laws.size(want_BTD)


@pytest.mark.claim("mixers/gateloop.py", "the package scales the gradient")
def test_the_package_scales_the_gradient_of_its_gates_alone(package: ModuleType) -> None:
    theirs = package.GateLoopedAttention(16, heads=4).eval().double()
    mixer = GateLoopConfig(width=16, heads=4, chunk=16).build().double()
    load(theirs, mixer)
    x_BTD = laws.tokens(mixer, 20).requires_grad_()
    up_BTD = laws.draw(2, 20, 16, dtype=torch.float64, seed=1)
    mixer(x_BTD)[0].backward(up_BTD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs about checkpoints
        theirs(x_BTD).backward(up_BTD)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name in ("weight", "bias"):
        own = mixer.transition.get_parameter(name).grad
        laws.assert_close(name, grads[f"to_a.0.{name}"], 0.9 * own)
    qkvg = torch.cat((grads["to_qkv.weight"], grads["to_gates.0.weight"]))
    laws.assert_close("qkvg", qkvg, mixer.qkvg.weight.grad)
    laws.assert_close("out_proj", grads["to_out.weight"], mixer.out_proj.weight.grad)
