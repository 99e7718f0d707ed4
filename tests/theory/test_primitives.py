"""Each primitive of BaseConv does what its formula says, exactly, in any channel, beside any other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdall.theory.primitives import Example, Layer, Stack, examples

EXAMPLES = examples()


def whole(seed: int, rows: int, length: int, width: int) -> torch.Tensor:
    """Random integers as fp64."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (rows, length, width), generator=rng).double()


def defined(layer: Layer, x_BTD: torch.Tensor) -> torch.Tensor:
    """The layer's formula, in loops over its sparse weights."""
    y_BTD = x_BTD.clone()
    for d in range(layer.width):
        filtered_BT = torch.full(x_BTD.shape[:2], layer.bias.get(d, 0.0), dtype=torch.float64)
        for lag, weight in layer.taps.get(d, {}).items():
            for t in range(lag, x_BTD.shape[1]):
                filtered_BT[:, t] += weight * x_BTD[:, t - lag, d]
        gate_BT = torch.full(x_BTD.shape[:2], layer.gate_bias.get(d, 0.0), dtype=torch.float64)
        for source, weight in layer.gate.get(d, {}).items():
            gate_BT += weight * x_BTD[..., source]
        y_BTD[..., d] += filtered_BT * gate_BT
    return y_BTD


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_a_primitive_does_what_its_formula_says(example: Example) -> None:
    y_TD = example.output()
    assert torch.equal(y_TD[:, 0], example.y_T)
    assert torch.equal(y_TD[:, 1], example.x_TD[:, 1])  # the other channel is kept
    assert example.layer.primitives == {0: example.name}
    if example.name != "keep":
        assert not torch.equal(y_TD[:, 0], example.x_TD[:, 0])


def test_every_primitive_has_an_example() -> None:
    methods = {name for name, value in vars(Layer).items() if callable(value) and not name.startswith("_")}
    assert methods - {"build", "write"} == {example.name for example in EXAMPLES}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 7))
def test_a_layer_of_them_all_is_the_sum_of_its_formula(seed: int, rows: int, length: int) -> None:
    """Holdall's mixer computes what the loop does, with all primitives in one layer, in any channels."""
    place = torch.randperm(9, generator=torch.Generator().manual_seed(seed)).tolist()
    keep, clear, shift, smooth, form, times, both, ramp, ones = place
    layer = (
        Layer(9).keep(keep).clear(clear).shift(shift, 3).filter(smooth, [2, 0, -1])
        .affine(form, {keep: 2, shift: -1, form: 1}, 5).product(times, {times: 1, clear: 3}, -2)
        .filtered_product(both, [1, 0, 4], {ramp: 1}, 1).constant(ramp, lambda t: 3 - t, length)
    )  # fmt: skip
    x_BTD = whole(seed, rows, length, 9)
    x_BTD[..., ramp] = 1
    y_BTD = Stack([layer]).run(x_BTD)
    assert torch.equal(y_BTD, defined(layer, x_BTD))
    assert torch.equal(y_BTD[..., ramp], (3 - torch.arange(length)).double().expand(rows, -1))
    assert torch.equal(y_BTD[..., ones], x_BTD[..., ones])
    before_BT = torch.nn.functional.pad(x_BTD[..., shift], (3, 0))[:, :length]
    assert torch.equal(y_BTD[..., shift], before_BT)


def test_a_stack_is_its_mixers_one_after_the_other() -> None:
    layers = [Layer(3).shift(0, 2), Layer(3).product(0, {1: 1}), Layer(3).affine(2, {0: 1, 1: -1}, 4)]
    x_BTD = whole(1, 2, 5, 3)
    y_BTD = x_BTD
    for mixer in Stack(layers).mixers():
        y_BTD, _ = mixer(y_BTD)
    done: list[int] = []
    assert torch.equal(Stack(layers).run(x_BTD, done.append), y_BTD)
    assert done == [1, 2, 3]
    assert torch.equal(Stack(layers).run(x_BTD[..., :2])[..., 2], y_BTD[..., 2])  # padded with zeros


def test_the_report_counts_what_the_mixers_have() -> None:
    stack = Stack([Layer(3).shift(0, 2), Layer(3).product(0, {1: 1}).clear(2)])
    report, mixers = stack.report(), stack.mixers()
    weights = [parameter for mixer in mixers for parameter in mixer.parameters()]
    assert report.parameters == sum(weight.numel() for weight in weights)
    assert report.nonzeros == sum(int(weight.count_nonzero()) for weight in weights) == 8
    assert report.state_elements == sum(mixer.state_elements(99) for mixer in mixers)
    assert (report.layers, report.width, report.kernel) == (2, 3, 3)


def test_what_is_not_given_is_not_drawn_from_the_random_state() -> None:
    before = torch.get_rng_state()
    Layer(4).shift(0, 2).build()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Layer(0), "at least one channel"),
        (lambda: Layer(2).shift(0, -1), "would read the future"),
        (lambda: Layer(2).clear(2), "there is no channel 2: the layer has channels 0 to 1"),
        (lambda: Layer(2).clear(0).shift(0, 1), "channel 0 is set already, by clear"),
        (lambda: Layer(2).affine(0, {5: 1}), "channel 0 cannot read channel 5"),
        (lambda: Stack([]), "at least one layer"),
        (lambda: Stack([Layer(2), Layer(3)]), r"have one width, not \[2, 3\]"),
        (lambda: Stack([Layer(2)]).run(torch.zeros(1, 2, 3)), "inputs have 3 channels, the stack 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
