"""BaseConv by hand: layers whose weights are set, one channel at a time, to do one exact thing each.

    y_d[t] = (b_d + sum_i h_d[i] x_d[t - i]) ((P x)_d[t] + p_d) + x_d[t]

is what a layer of the mixer `base-conv` computes. Each primitive sets h, b, P and p of one channel:

    keep              y_d = x_d                         nothing: the skip
    clear             y_d = 0                           h = -delta            gate 1
    shift by s        y_d[t] = x_d[t - s]               h = delta_s - delta   gate 1
    filter by f       y_d[t] = sum_i f_i x_d[t - i]     h = f - delta         gate 1
    affine            y_d = l(x)                        b = 1                 gate l(x) - x_d
    product           y_d = x_d l(x)                    h = delta             gate l(x) - 1
    filtered_product  y_d = (f * x_d) l(x) + x_d        h = f                 gate l(x)
    constant          y_d[t] = g(t)                     h = differences of g, minus delta; gate 1

l is an affine form: a constant plus a weighted sum of the layer's input channels, at t. All channels of a
layer are set independently of each other, and read the layer's input.

    layer = Layer(3).shift(0, 2).product(1, {2: 1.0})      # channel 2 is kept
    Stack([layer]).run(x_BTD)

Letters: x_d[t] and y_d[t] input and output of channel d at token t; i and s lags; h_d the taps of a channel's
filter, b_d its bias; P the gate's weights and p_d its bias; delta the filter that changes nothing, delta_s
the one that shifts by s; f given taps; l an affine form; g a function of the position. Of shapes: B rows, T
tokens, D channels, W taps.

Compared with the BaseConv of the theory (Arora et al., "Zoology", 2023, arXiv 2312.04927; definition G.1 of
Arora et al., "Just read twice", 2024, arXiv 2407.05483), a layer here has a skip, and biases that are
the same at every position: `constant` replaces the others. P is a dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdall.mixers.base_conv import BaseConv, BaseConvConfig

Channels = int | Iterable[int]
"""One channel, or several that are treated alike."""
Weights = Mapping[int, float]
"""The weights of an affine form, by the channel that is read; or of a filter, by lag."""


class Layer:
    """One layer of BaseConv, with weights that are set channel by channel; all others are kept.

    Only what is not zero is stored. Every method sets the channels that it names, each of which can be set
    once, and returns the layer, so that calls can be chained. Raises ValueError for a channel that there is
    not, or that is set already.

    Attributes:
        width: channels, D.
        taps: of each channel that has any, its filter: weight by lag.
        bias: of each channel that has one, the bias b.
        gate: of each channel that has any, its row of P: weight by channel.
        gate_bias: of each channel that has one, the gate's bias p.
        primitives: of each channel that is set, the name of the primitive.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"a layer of width {width}: it needs at least one channel")
        self.width = width
        self.taps: dict[int, dict[int, float]] = {}
        self.bias: dict[int, float] = {}
        self.gate: dict[int, dict[int, float]] = {}
        self.gate_bias: dict[int, float] = {}
        self.primitives: dict[int, str] = {}

    # ------------------------------------------------------------------------------------------ primitives

    def keep(self, channels: Channels) -> Layer:
        """y_d = x_d. Costs no weight: it is the skip, and what happens to channels that nothing sets."""
        for channel in self._claimed(channels, "keep"):
            self._set(channel, {}, 0.0, {}, 0.0)
        return self

    def clear(self, channels: Channels) -> Layer:
        """y_d = 0. Costs 2 weights. `affine` overwrites as it is, and needs no cleared channel."""
        for channel in self._claimed(channels, "clear"):
            self._set(channel, {0: -1.0}, 0.0, {}, 1.0)
        return self

    def shift(self, channels: Channels, by: int) -> Layer:
        """y_d[t] = x_d[t - by], zero where t < by. Costs 3 weights, and a kernel of by + 1 taps.

            Layer(1).shift(0, 2)      1 2 3 4 5  ->  0 0 1 2 3

        A negative shift would read the future (ValueError): shift all other channels down instead.
        """
        if by < 0:
            raise ValueError(f"a shift by {by} would read the future: shift the other channels down instead")
        for channel in self._claimed(channels, "shift"):
            self._set(channel, _plus({by: 1.0}, {0: -1.0}), 0.0, {}, 1.0)
        return self

    def filter(self, channels: Channels, taps: Sequence[float]) -> Layer:
        """y_d[t] = sum_i taps[i] x_d[t - i]. Costs at most len(taps) + 1 weights and that kernel.

        Layer(1).filter(0, [1, 1, 1])      1 2 3 4 5  ->  1 3 6 9 12
        """
        for channel in self._claimed(channels, "filter"):
            self._set(channel, _plus(dict(enumerate(taps)), {0: -1.0}), 0.0, {}, 1.0)
        return self

    def affine(self, channel: int, weights: Weights, constant: float = 0.0) -> Layer:
        """y_d = constant + sum_j weights[j] x_j, in place of what was in the channel.

            Layer(2).affine(1, {0: 3}, 1)      channel 1: 3 x_0 + 1, whatever was in it

        Costs a weight for each channel that is read, and 3. In floating point x_d is taken away and added
        again, which is exact for integers below 2^53.
        """
        (channel,) = self._claimed(channel, "affine")
        self._set(channel, {}, 1.0, _plus(weights, {channel: -1.0}), constant)
        return self

    def product(self, channel: int, weights: Weights, constant: float = 0.0) -> Layer:
        """y_d = x_d (constant + sum_j weights[j] x_j). Costs a weight for each channel that is read, and 2.

        Layer(2).product(0, {1: 1})      channel 0: x_0 x_1
        """
        (channel,) = self._claimed(channel, "product")
        self._set(channel, {0: 1.0}, 0.0, weights, constant - 1.0)
        return self

    def filtered_product(
        self, channel: int, taps: Sequence[float], weights: Weights, constant: float = 0.0
    ) -> Layer:
        """y_d[t] = (sum_i taps[i] x_d[t - i]) (constant + sum_j weights[j] x_j[t]) + x_d[t].

            Layer(2).filtered_product(0, [0, 1], {1: 1})      channel 0: x_0[t - 1] x_1[t] + x_0[t]

        A shift and a product in one layer. The x_d that is left over is for the reader to subtract. Costs a
        weight for each tap and each channel that is read, and 1 for the constant.
        """
        (channel,) = self._claimed(channel, "filtered_product")
        self._set(channel, dict(enumerate(taps)), 0.0, weights, constant)
        return self

    def constant(self, channels: Channels, function: Callable[[int], float], length: int) -> Layer:
        """y_d[t] = function(t) for t < length, of a channel that holds 1 at every token.

            Layer(1).constant(0, lambda t: t * t, 5)      1 1 1 1 1  ->  0 1 4 9 16

        In place of the biases by position of the papers' BaseConv. A channel of ones is made by
        `affine(channel, {}, 1)`, or given with the input. Costs length + 2 weights at most, and a kernel of
        `length` taps; the function keeps its last value after that.
        """
        values = [float(function(position)) for position in range(length)]
        steps = {
            i: value - before for i, (before, value) in enumerate(zip([0.0, *values], values, strict=False))
        }
        for channel in self._claimed(channels, "constant"):
            self._set(channel, _plus(steps, {0: -1.0}), 0.0, {}, 1.0)
        return self

    # --------------------------------------------------------------------------------------------- weights

    @property
    def kernel(self) -> int:
        """Taps of the layer's filter, W: the largest lag + 1, and at least the mixer's least, 2."""
        return max([2, *(1 + lag for taps in self.taps.values() for lag in taps)])

    @property
    def nonzeros(self) -> int:
        """Weights that are not zero."""
        rows = (*self.taps.values(), *self.gate.values())
        return sum(map(len, rows)) + len(self.bias) + len(self.gate_bias)

    def build(self) -> BaseConv:
        """The layer as Holdall's mixer, in fp64. No random numbers are drawn."""
        config = BaseConvConfig(width=self.width, kernel=self.kernel, form="parallel")
        with torch.device("meta"):
            mixer = config.build()
        mixer = mixer.to_empty(device="cpu").double().requires_grad_(False)
        self.write(mixer)
        return mixer

    @torch.no_grad()
    def write(self, mixer: BaseConv) -> None:
        """Set the weights of a mixer of this width and kernel."""
        assert mixer.bias_D is not None
        weight_DD, gate_bias_D = mixer.projection.weight, mixer.projection.bias
        last = mixer.config.kernel - 1  # the mixer's last tap is that of lag 0
        for weight in (mixer.weight_DW, mixer.bias_D, weight_DD, gate_bias_D):
            weight.zero_()
        _fill(mixer.weight_DW, ((d, last - i, w) for d, taps in self.taps.items() for i, w in taps.items()))
        _fill(weight_DD, ((d, j, w) for d, row in self.gate.items() for j, w in row.items()))
        for vector_D, values in ((mixer.bias_D, self.bias), (gate_bias_D, self.gate_bias)):
            _fill(vector_D[None], ((0, d, value) for d, value in values.items()))

    def _claimed(self, channels: Channels, primitive: str) -> Iterator[int]:
        for channel in (channels,) if isinstance(channels, int) else channels:
            if not 0 <= channel < self.width:
                raise ValueError(
                    f"there is no channel {channel}: the layer has channels 0 to {self.width - 1}"
                )
            if channel in self.primitives:
                raise ValueError(
                    f"channel {channel} is set already, by {self.primitives[channel]}: a channel does one "
                    f"thing in a layer, so {primitive} needs another channel or another layer"
                )
            self.primitives[channel] = primitive
            yield channel

    def _set(self, channel: int, taps: Weights, bias: float, gate: Weights, gate_bias: float) -> None:
        for source in gate:
            if not 0 <= source < self.width:
                raise ValueError(
                    f"channel {channel} cannot read channel {source}: there are 0 to {self.width - 1}"
                )
        for rows, weights in ((self.taps, taps), (self.gate, gate)):
            if kept := {at: float(weight) for at, weight in weights.items() if weight}:
                rows[channel] = kept
        for values, value in ((self.bias, bias), (self.gate_bias, gate_bias)):
            if value:
                values[channel] = float(value)


@dataclass(frozen=True, kw_only=True)
class StackReport:
    """The size of a stack."""

    layers: int
    """Layers of BaseConv."""
    width: int
    """Channels of each layer, D."""
    kernel: int
    """Taps of the longest filter."""
    nonzeros: int
    """Weights that are not zero, of all layers."""
    parameters: int
    """All weights, zeros included: D (D + W + 2) in a layer, since P is a dense matrix."""
    state_elements: int
    """Elements of the states of all layers, of a row: D (W - 1) in a layer."""


class Stack:
    """Layers of BaseConv, one after the other: no norms, no embedding, no MLPs; fp64.

    Args:
        layers: of one width; ValueError otherwise.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("a stack needs at least one layer")
        if len(widths := {layer.width for layer in self.layers}) > 1:
            raise ValueError(f"the layers of a stack have one width, not {sorted(widths)}")

    @property
    def width(self) -> int:
        return self.layers[0].width

    def run(self, x_BTD: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
        """The outputs of the last layer, (B, T, D) in fp64, on the inputs' device.

        The mixers are built one by one, so that one layer's dense weights are in memory at a time.

        Args:
            x_BTD: inputs, of any real dtype; fewer channels than the stack has are padded with zeros.
            progress: is called with the number of layers that are done.
        """
        missing = self.width - x_BTD.shape[-1]
        if missing < 0:
            raise ValueError(f"inputs have {x_BTD.shape[-1]} channels, the stack {self.width}")
        y_BTD = nn.functional.pad(x_BTD.double(), (0, missing))
        built: dict[int, BaseConv] = {}
        with torch.no_grad():
            for done, layer in enumerate(self.layers, 1):
                if layer.kernel in built:
                    layer.write(built[layer.kernel])
                else:
                    built = {layer.kernel: layer.build().to(y_BTD.device)}
                y_BTD, _ = built[layer.kernel](y_BTD, want_state=False)
                if progress is not None:
                    progress(done)
        return y_BTD

    def mixers(self) -> nn.ModuleList:
        """All layers as Holdall's mixers, in fp64: to inspect, to train on, or to call one by one."""
        return nn.ModuleList(layer.build() for layer in self.layers)

    def report(self) -> StackReport:
        """Layers, width, weights and state."""
        return StackReport(
            layers=len(self.layers),
            width=self.width,
            kernel=max(layer.kernel for layer in self.layers),
            nonzeros=sum(layer.nonzeros for layer in self.layers),
            parameters=sum(self.width * (self.width + layer.kernel + 2) for layer in self.layers),
            state_elements=sum(self.width * (layer.kernel - 1) for layer in self.layers),
        )


def _plus(one: Weights, other: Weights) -> dict[int, float]:
    return {at: one.get(at, 0.0) + other.get(at, 0.0) for at in (*one, *(set(other) - set(one)))}


def _fill(matrix: Tensor, entries: Iterable[tuple[int, int, float]]) -> None:
    """Write the entries (row, column, value) into a matrix of zeros, all at once."""
    if entries := list(entries):
        rows, columns, values = zip(*entries, strict=True)
        at = (torch.tensor(rows, device=matrix.device), torch.tensor(columns, device=matrix.device))
        matrix[at] = torch.tensor(values, dtype=matrix.dtype, device=matrix.device)


# ----------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True, kw_only=True)
class Example:
    """One primitive on a short input, for pictures and tests."""

    name: str
    """The method of `Layer`."""
    says: str
    """What it computes, as a formula."""
    layer: Layer
    """A layer in which it sets channel 0."""
    x_TD: Tensor
    """An input, (T, D)."""
    y_T: Tensor
    """What channel 0 holds afterwards, (T,), by the formula and not by the layer."""

    def output(self) -> Tensor:
        """What the layer makes of the input, (T, D)."""
        return Stack([self.layer]).run(self.x_TD[None])[0]


def examples() -> list[Example]:
    """Each primitive, on six tokens and two channels."""
    a_T = torch.tensor([1.0, 3, 2, 5, 4, 2], dtype=torch.float64)
    b_T = torch.tensor([2.0, 0, 1, -1, 3, 1], dtype=torch.float64)
    x_TD, ones_TD = torch.stack((a_T, b_T), dim=1), torch.stack((torch.ones_like(a_T), b_T), dim=1)
    before_T = torch.cat((a_T.new_zeros(1), a_T[:-1]))
    shifted_T = torch.cat((a_T.new_zeros(2), a_T[:-2]))
    squares_T = torch.arange(6, dtype=torch.float64) ** 2
    made = [
        ("keep", "y = x", Layer(2).keep(0), x_TD, a_T),
        ("clear", "y = 0", Layer(2).clear(0), x_TD, torch.zeros_like(a_T)),
        ("shift", "y[t] = x[t - 2]", Layer(2).shift(0, 2), x_TD, shifted_T),
        ("filter", "y[t] = x[t] + 2 x[t - 1]", Layer(2).filter(0, [1, 2]), x_TD, a_T + 2 * before_T),
        ("affine", "y = 3 z + 1", Layer(2).affine(0, {1: 3}, 1), x_TD, 3 * b_T + 1),
        ("product", "y = x z", Layer(2).product(0, {1: 1}), x_TD, a_T * b_T),
        (
            "filtered_product", "y[t] = x[t - 1] z[t] + x[t]", Layer(2).filtered_product(0, [0, 1], {1: 1}),
            x_TD, before_T * b_T + a_T,
        ),
        ("constant", "y[t] = t², of ones", Layer(2).constant(0, lambda t: t * t, 6), ones_TD, squares_T),
    ]  # fmt: skip
    return [Example(name=n, says=s, layer=layer, x_TD=x, y_T=y) for n, s, layer, x, y in made]
