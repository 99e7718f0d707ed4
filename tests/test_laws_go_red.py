"""A law that cannot fail is no law: for each, faults are planted in a right mixer, and the law finds them.

Each fault is small, most of them a millionth of a value, and is built into a registered mixer whose weights
and definition stay right. What has to come is an AssertionError of the law's own, not an accident on the way.
"""

import dataclasses
import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import holdall
from holdall.contract import Mixer, is_reserved, map_state
from holdall.testing import laws, test_laws
from holdall.testing.nudges import Nudges

TINY = 1e-6
"""Far above the rounding of fp64 and far below what anyone would see in a curve."""


def plant(base: str, dtype: torch.dtype = torch.float64, /, *, prepare: Callable[[Mixer], None] | None = None,
          options: dict[str, Any] | None = None, **methods: Callable) -> Callable[[], Mixer]:  # fmt: skip
    """A maker of registered mixers in which some methods are replaced.

    A fault is called as the method is, with the right method first: fault(right, self, *arguments).
    """

    def make() -> Mixer:
        mixer = laws.build(holdall.describe(base).configure(width=laws.WIDTH, **(options or {}))).to(dtype)
        right = type(mixer)

        def replacement(name: str, fault: Callable) -> Callable:
            def method(self: Mixer, *args: Any, **how: Any) -> Any:
                return fault(getattr(right, name).__get__(self), self, *args, **how)

            return method

        names = {name: replacement(name, fault) for name, fault in methods.items()}
        mixer.__class__ = type(f"Faulty{right.__name__}", (right,), names)
        if prepare is not None:
            prepare(mixer)
        return mixer

    return make


def output(change: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    """A forward whose outputs are changed, from (y, x)."""

    def forward(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
        y_BTD, after = right(x_BTD, state, **how)
        return change(y_BTD, x_BTD), after

    return forward


def before(change: Callable[[Any], Any]) -> Callable:
    """A forward whose incoming state is changed."""

    def forward(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
        return right(x_BTD, None if state is None else change(state), **how)

    return forward


def after(change: Callable[[Any, Tensor], Any]) -> Callable:
    """A forward whose next state is changed, from (state, x)."""

    def forward(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
        y_BTD, new = right(x_BTD, state, **how)
        return y_BTD, None if new is None else change(new, x_BTD)

    return forward


def each(change: Callable[[Tensor], Tensor]) -> Callable:
    """A change of every tensor of a state that is not a count."""
    return lambda state, *_: map_state(state, lambda t: change(t) if laws.differentiable(t) else t)


# --------------------------------------------------------------------------------- faults of more than a line


def sees_next_token(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return y_BTD + TINY * torch.cat((x_BTD[:, 1:], x_BTD[:, -1:]), dim=1)


def writes_into_x(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    result = right(x_BTD, state, **how)
    x_BTD.data.mul_(1 + TINY)
    return result


def writes_into_parameter(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    next(self.parameters()).data.mul_(1 + TINY)
    return right(x_BTD, state, **how)


def always_inplace(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    return right(x_BTD, state, inplace=True)


def loses_what_is_given_away(
    right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any
) -> Any:
    if how.get("inplace"):
        state = map_state(state, torch.zeros_like)
    return right(x_BTD, state, **how)


def stale_when_inplace(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, state, want_state=how.get("want_state", True))
    return y_BTD, state if how.get("inplace") else new


def returns_unwanted_state(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    return right(x_BTD, state)


def cheaper_if_unwanted(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, state, **how)
    return y_BTD if new is not None else y_BTD * (1 + TINY), new


def remembers_in_itself(right: Callable, self: Any, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, state, **how)
    y_BTD = y_BTD + (0 if state is None else TINY * getattr(self, "last", 0))
    self.last = x_BTD[:1, -1:].detach()
    return y_BTD, new


class OtherState(NamedTuple):
    """Of the right shape, under a name that nobody announced."""

    s_BHFV: Tensor
    z_BHF: Tensor


def exponential_that_cancels_on_paper(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    growth_T = torch.arange(x_BTD.shape[1], dtype=x_BTD.dtype).exp()
    return y_BTD * growth_T[:, None] / growth_T[:, None]


def infinite_after_a_while(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return torch.where((torch.arange(x_BTD.shape[1]) > 1900)[:, None], torch.inf, y_BTD)


def right_value_wrong_gradient(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return y_BTD + TINY * (x_BTD - x_BTD.detach())


class SquareOnce(torch.autograd.Function):
    """Whose gradient is right, and taken for a constant where it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def wrong_second_derivative(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return y_BTD + TINY * (SquareOnce.apply(x_BTD) - x_BTD.square())


def parameter_gradient(right: Callable, self: Any, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, state, **how)
    weight = self.out_proj.weight
    return y_BTD + TINY * (weight - weight.detach()).sum(), new


def draws_noise(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.seed()
        return y_BTD + TINY * torch.rand_like(y_BTD)


def counts_its_calls(right: Callable, self: Any, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    y_BTD, new = right(x_BTD, state, **how)
    return y_BTD * (1 + TINY * self.calls), new


def gradient_follows_calls(right: Callable, self: Any, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    y_BTD, new = right(x_BTD, state, **how)
    return y_BTD + self.calls * TINY * (x_BTD - x_BTD.detach()), new


def branches_on_values(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return y_BTD if x_BTD.sum() > 0 else y_BTD.clone()


def hold_a_parameter_aside(mixer: Any) -> None:
    mixer.__dict__["aside"] = [mixer.out_proj.weight]


def uses_it(right: Callable, self: Any, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, state, **how)
    return y_BTD + TINY * self.aside[0].sum(), new


def list_a_module_twice(mixer: Mixer) -> None:
    mixer.again = nn.Sequential(mixer.out_proj, mixer.out_proj)


def breaks_the_graph(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return y_BTD


def other_when_compiled(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return y_BTD + TINY if torch.compiler.is_compiling() else y_BTD


def other_gradient_when_compiled(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    return right_value_wrong_gradient(y_BTD, x_BTD) if torch.compiler.is_compiling() else y_BTD


def bf16_sums(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, None if state is None else map_state(state, Tensor.float), **how)
    return y_BTD, None if new is None else map_state(new, Tensor.bfloat16)


def bf16_start(right: Callable, self: Mixer, batch: int, **how: Any) -> Any:
    return map_state(right(batch, **how), Tensor.bfloat16)


def wide_start(right: Callable, self: Mixer, batch: int, **how: Any) -> Any:
    return map_state(right(batch, **how), Tensor.double)


def start_of_ones(right: Callable, self: Mixer, batch: int, **how: Any) -> Any:
    return map_state(right(batch, **how), torch.ones_like)


def hands_its_state_on(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, state, **how)
    return y_BTD, state or new


def view_of_more(state: Any, x_BTD: Tensor) -> Any:
    return map_state(state, lambda t: torch.cat((t, t), dim=1)[:, : t.shape[1]])


def coarse(y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
    """Six bits fewer than the dtype has."""
    unit = 64 * torch.finfo(y_BTD.dtype).eps * y_BTD.abs().max()
    return (y_BTD / unit).round() * unit


def moves_in_place(when: Callable[[Tensor], bool]) -> Callable[[Mixer], None]:
    """New tensors for what is given away, behind the border, for some calls."""

    def prepare(mixer: Mixer) -> None:
        right = type(mixer).forward

        def forward(self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
            y_BTD, new = right(self, x_BTD, state, **how)
            return y_BTD, map_state(new, torch.clone) if how.get("inplace") and when(x_BTD) else new

        type(mixer).forward = forward  # type: ignore[method-assign]

    return prepare


def one_ring_for_both(right: Callable, self: Mixer, batch: int, **how: Any) -> Any:
    state = right(batch, **how)
    return state._replace(v_BSHV=state.k_BSHK)


def with_room(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of states with room alone."""
    return lambda state, *_: change(state) if is_reserved(state) else state


def looks_at_empty_slots(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
    y_BTD, new = right(x_BTD, state, **how)
    return (y_BTD + TINY * state.k_BSHK.mean() if is_reserved(state) else y_BTD), new


def touch_the_slot_behind(state: Any) -> Any:
    slots = state.k_BSHK.shape[1]
    state.k_BSHK[:, (state.filled_B % slots).tolist()] += 1
    return state


def leave_the_border_open(mixer: Mixer) -> None:
    """The forward that its file has, without the check in front."""
    type(mixer).forward = inspect.unwrap(type(mixer).forward)  # type: ignore[method-assign]


def narrow_states_too(mixer: Mixer) -> None:
    """Autocast's dtype for all that comes out, behind the border."""
    right = type(mixer).forward

    def forward(self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
        y_BTD, new = right(self, x_BTD, state, **how)
        return y_BTD, map_state(new, Tensor.bfloat16) if torch.is_autocast_enabled("cpu") else new

    type(mixer).forward = forward  # type: ignore[method-assign]


def rolls_back_nothing(right: Callable, self: Mixer, state: Any, count_B: Any, **how: Any) -> Any:
    return right(state, 0, **how)


def rolls_back_all_rows_alike(right: Callable, self: Mixer, state: Any, count_B: Any, **how: Any) -> Any:
    return right(state, int(torch.as_tensor(count_B).max()), **how)


def rolls_back_unasked(right: Callable, self: Mixer, state: Any, count_B: Any, **how: Any) -> Any:
    return right(state, count_B, inplace=True)


def rolls_back_any_number(right: Callable, self: Any, state: Any, count_B: Any, inplace: bool = False) -> Any:
    return self._rolled_back(state, torch.as_tensor(count_B).expand(len(state.seen_B)), inplace)


def remembers_the_draft(right: Callable, self: Mixer, state: Any, count_B: Any, **how: Any) -> Any:
    kept = right(state, count_B, **how)
    last_BHK = kept.k_BSGK[torch.arange(len(kept.seen_B)), state.seen_B - 1 & kept.k_BSGK.shape[1] - 1]
    return kept._replace(z_BHF=kept.z_BHF + 1e-12 * last_BHK.sum())


def sums_twice(right: Callable, self: Mixer, state: Any, count_B: Any, **how: Any) -> Any:
    """What a state does whose sums are where its count says, without a field of their own."""
    kept = right(state, count_B, **how)
    half = kept.k_BSGK.shape[1] // 2
    return kept._replace(summed_B=half * (kept.seen_B // half - 1).clamp(min=0))


def convolves_the_draft(right: Callable, self: Mixer, state: Any, count_B: Any, **how: Any) -> Any:
    kept = right(state, count_B, **how)
    return kept._replace(conv_BPE=kept.conv_BPE + TINY * kept.conv_BPE.mean(1, keepdim=True))


def fades(state: Any) -> Any:
    return state._replace(log_decay_BSHX=1.001 * state.log_decay_BSHX)


def short_ring(right: Callable, self: Mixer, batch: int, **how: Any) -> Any:
    state = right(batch, **how)
    return state._replace(k_BSHK=state.k_BSHK[:, 1:], v_BSHV=state.v_BSHV[:, 1:])


def lowers_counts_alone(right: Callable, self: Any, state: Any, count_B: Any, inplace: bool) -> Any:
    kept = right(state, count_B, inplace)
    return type(state)(*state[:2], *kept[2:]) if is_reserved(state) else kept


def double_scores(mixer: Any) -> None:
    mixer.feature_map = dataclasses.replace(mixer.feature_map, scores=lambda q, k: 1 + 1.0001 * (q @ k.mT))


LINEAR, TAYLOR = {"feature_map": "elu1"}, {"feature_dim": 4, "chunk": 16}
RING = {"feature_dim": 4, "replay": 4}
SHORT = {"replay": 2}
TWICE = "prefix-linear-attention"
FP32, BF16 = torch.float32, torch.bfloat16

FAULTS: list[tuple[str, str, Callable[[], Mixer]]] = [
    ("splits", "forgets its state", plant("base-conv", forward=before(lambda s: None))),
    ("splits", "forgets a little", plant("mamba", forward=before(each(lambda t: t * (1 - TINY))))),
    ("splits", "counts pieces", plant("retnet", forward=output(lambda y, x: y + TINY * x.shape[1]))),
    ("splits", "state knows the cut", plant("mamba", forward=after(lambda s, x: each(
        lambda t: t + TINY * x.shape[1])(s)))),
    ("splits", "forgets in fp32", plant("retnet", FP32, forward=before(each(lambda t: t * 0.999)))),
    ("causal", "sees the next token", plant("attention", forward=output(sees_next_token))),
    ("causal", "sees all", plant("hyena", forward=output(lambda y, x: y + TINY * x.mean(1, keepdim=True)))),
    ("causal", "sees all in fp32", plant("hyena", FP32, forward=output(
        lambda y, x: y + 0.001 * x.mean(1, keepdim=True)))),
    ("prefix", "forgets a little", plant(TWICE, forward=before(each(lambda t: t * (1 - TINY))))),
    ("prefix", "reads it again", plant(TWICE, forward=before(lambda s: s._replace(
        seen_B=torch.zeros_like(s.seen_B))))),
    ("prefix", "sees the next token", plant(TWICE, forward=output(sees_next_token))),
    ("prefix", "sees all in fp32", plant(TWICE, FP32, forward=output(
        lambda y, x: y + 0.001 * x.mean(1, keepdim=True)))),
    ("rows", "averages rows", plant("mamba", forward=output(lambda y, x: y + TINY * x.mean(0)))),
    ("rows", "averages rows of the state", plant("linear-attention", forward=after(
        each(lambda t: t + TINY * t.mean(0))))),
    ("rows", "goes on with another row's state", plant("mamba", forward=before(
        each(lambda t: t.roll(1, 0))))),
    ("joined_rows", "takes empty slots for tokens", plant("attention", forward=before(
        lambda s: s._replace(seen_B=torch.full_like(s.seen_B, s.k_BSHK.shape[1]))))),
    ("joined_rows", "one position for all rows", plant("sliding-window", forward=before(
        lambda s: s._replace(seen_B=s.seen_B[:1].expand_as(s.seen_B))))),
    ("untouched", "writes into its input", plant("attention", forward=writes_into_x)),
    ("untouched", "writes into its state", plant("linear-attention", forward=always_inplace)),
    ("untouched", "writes into a parameter", plant("mamba", forward=writes_into_parameter)),
    ("untouched", "hands out its input", plant("base-conv", forward=after(
        lambda s, x: s._replace(past_BPD=x[:, -2:])))),
    ("untouched", "hands its state on", plant("linear-attention", forward=hands_its_state_on)),
    ("inplace", "loses what is given away", plant("linear-attention", forward=loses_what_is_given_away)),
    ("inplace", "keeps the old state", plant("linear-attention", forward=stale_when_inplace)),
    ("addresses", "returns new tensors", plant("mamba", prepare=moves_in_place(lambda x: True))),
    ("addresses", "copies several tokens", plant("retnet", prepare=moves_in_place(lambda x: x.shape[1] > 1))),
    ("addresses", "copies a cache", plant("attention", prepare=moves_in_place(lambda x: x.shape[1] == 1))),
    ("addresses", "one tensor for two", plant("sliding-window", init_state=one_ring_for_both)),
    ("addresses", "grows all the same", plant("hyena", init_state=lambda right, self, batch, **how: right(
        batch, **{**how, "capacity": None}), prepare=lambda mixer: setattr(
            type(mixer), "init_state", inspect.unwrap(type(mixer).init_state)))),
    ("capacity", "forgets in place", plant("mamba", forward=loses_what_is_given_away)),
    ("capacity", "looks at empty slots", plant("attention", forward=looks_at_empty_slots)),
    ("capacity", "writes beyond", plant("attention", forward=after(with_room(touch_the_slot_behind)))),
    ("capacity", "one count for all rows", plant("attention", forward=before(with_room(
        lambda s: s._replace(filled_B=s.filled_B[:1].repeat(len(s.filled_B))))))),
    ("capacity", "takes what does not fit", plant("attention", prepare=leave_the_border_open)),
    ("recorded", "counts on the host", plant("mamba", forward=counts_its_calls)),
    ("recorded", "new tensors", plant("attention", prepare=moves_in_place(lambda x: True))),
    ("fresh", "starts elsewhere", plant("linear-attention", init_state=start_of_ones)),
    ("fresh", "returns an unwanted state", plant("attention", forward=returns_unwanted_state)),
    ("fresh", "cheaper if unwanted", plant("retnet", forward=cheaper_if_unwanted)),
    ("definition", "a wrong term", plant("taylor", options=TAYLOR, prepare=double_scores)),
    ("definition", "a little too much", plant("mamba", forward=output(lambda y, x: y * (1 + TINY)))),
    ("definition", "a wrong final state", plant("base-conv", forward=after(
        each(lambda t: t * (1 + TINY))))),
    ("definition", "coarse in fp32", plant("retnet", FP32, forward=output(coarse))),
    ("definition", "half precision inside", plant("mamba", FP32, forward=output(
        lambda y, x: y.half().float()))),
    ("gradients", "a detached state", plant("mamba", forward=before(each(torch.detach)))),
    ("gradients", "a next state cut off", plant("mamba", forward=after(each(torch.detach)))),
    ("gradients", "of the tokens", plant("attention", forward=output(right_value_wrong_gradient))),
    ("gradients", "of a parameter", plant("mamba", forward=parameter_gradient)),
    ("gradients_through_state", "a detached state", plant("retnet", forward=before(each(torch.detach)))),
    ("gradients_through_state", "a next state cut off", plant("mamba", forward=after(each(torch.detach)))),
    ("second_derivative", "taken for a constant", plant("mamba", forward=output(wrong_second_derivative))),
    ("state_size", "claims one too few", plant("mamba", state_elements=lambda right, self, n: right(n) - 1)),
    ("state_size", "claims no growth", plant("attention", state_elements=lambda right, self, n: right(65))),
    ("state_size", "another type", plant("linear-attention", forward=after(lambda s, x: OtherState(*s)))),
    ("state_size", "keeps the prompt alive", plant("mamba", forward=after(view_of_more))),
    ("state_size", "rows elsewhere", plant("linear-attention", forward=after(each(lambda t: t[:, 0])),
                                           options={"heads": 2})),
    ("state_size", "the whole batch in every row", plant("mamba", forward=after(each(
        lambda t: t.flatten(0, 1).expand(t.shape[0], -1, -1).clone())))),
    ("state_dtype", "sums in bf16", plant(
        "linear-attention", BF16, forward=bf16_sums, init_state=bf16_start)),
    ("state_dtype", "starts wider than it goes on", plant("linear-attention", BF16, init_state=wide_start)),
    ("rollback", "takes nothing back", plant("taylor", options=RING, rollback=rolls_back_nothing)),
    ("rollback", "all rows alike", plant("taylor", options=RING, rollback=rolls_back_all_rows_alike)),
    ("rollback", "writes into its state", plant("taylor", options=RING, rollback=rolls_back_unasked)),
    ("rollback", "takes back any number", plant("taylor", options=RING, rollback=rolls_back_any_number)),
    ("rollback", "remembers the draft", plant("taylor", options=RING, rollback=remembers_the_draft)),
    ("rollback", "sums tokens twice", plant("taylor", options=RING, rollback=sums_twice)),
    ("rollback", "sums twice by a delta rule", plant("delta-net", options=SHORT, rollback=sums_twice)),
    ("rollback", "convolves the draft", plant("mamba-2", options=SHORT, rollback=convolves_the_draft)),
    ("rollback", "a ring too short", plant("sliding-window", options={"replay": 4}, init_state=short_ring)),
    ("rollback", "one input too few", plant("base-conv", options={"replay": 4}, _rolled_back=lambda
        right, self, state, count_B, inplace: right(state, (count_B - 1).clamp(min=0), inplace))),
    ("rollback", "lets what was read lie behind", plant("attention", _rolled_back=lowers_counts_alone)),
    ("rollback", "takes back what it cannot", plant("mamba", rollback=lambda right, self, s, n, **how: s)),
    ("replay", "a wrong term in the ring", plant("taylor", options=RING, prepare=double_scores)),
    ("replay", "a ring that fades", plant("retnet", options=SHORT, forward=before(fades))),
    ("replay", "a delta rule that fades", plant("gated-delta-net", options=SHORT, forward=before(fades))),
    ("replay", "a wrong output in fp32", plant("taylor", FP32, options=RING, forward=output(
        lambda y, x: y.half().float()))),
    ("saved", "remembers in itself", plant("mamba", forward=remembers_in_itself)),
    ("saved", "another type", plant("linear-attention", forward=after(lambda s, x: OtherState(*s)))),
    ("saved", "two names for one tensor", plant("attention", forward=after(
        lambda s, x: s._replace(v_BSHV=s.k_BSHK)))),
    ("bf16", "answers in fp32", plant("attention", FP32, forward=output(lambda y, x: y.float()))),
    ("bf16", "coarse", plant("mamba", FP32, forward=output(coarse))),
    ("bf16", "not a number", plant("retnet", FP32, forward=output(
        lambda y, x: y / (y.dtype != torch.bfloat16) * (y.dtype != torch.bfloat16)))),
    ("state_border", "rows are broadcast", plant("gla", FP32, prepare=leave_the_border_open)),
    ("state_border", "any rows of a cache", plant("attention", FP32, prepare=leave_the_border_open)),
    ("autocast", "autocast inside", plant("mamba-2", FP32, prepare=leave_the_border_open)),
    ("autocast", "a state as narrow as the products", plant("gla", FP32, prepare=narrow_states_too)),
    ("autocast", "coarse", plant("mamba", FP32, forward=output(coarse))),
    ("fp16", "a readout that is narrowed before its norm", plant("retnet", FP32, forward=output(
        lambda y, x: (y * 1e6) / 1e6))),
    ("sound", "an exponential that cancels on paper", plant("linear-attention", FP32, forward=output(
        exponential_that_cancels_on_paper))),
    ("sound", "infinite after a while", plant("mamba", FP32, forward=output(infinite_after_a_while))),
    ("sound", "a state that overflows", plant("mamba", FP32, forward=after(
        lambda s, x: each(lambda t: t + torch.tensor(float(x.shape[1])).exp())(s)))),
    ("deterministic", "draws noise", plant("attention", forward=output(draws_noise))),
    ("deterministic", "counts its calls", plant("mamba", forward=counts_its_calls)),
    ("deterministic", "a gradient that counts calls", plant("mamba", forward=gradient_follows_calls)),
    ("vmapped", "branches on values", plant("linear-attention", forward=output(branches_on_values))),
    ("vmapped", "takes numbers out", plant("linear-attention", forward=output(
        lambda y, x: y * (1 + x.mean().item())))),
    ("vmapped", "a parameter held aside", plant("mamba", prepare=hold_a_parameter_aside, forward=uses_it)),
    ("vmapped", "a module under two names", plant("mamba", prepare=list_a_module_twice)),
    ("compiled", "a graph break", plant("base-conv", forward=output(breaks_the_graph))),
    ("compiled", "other values", plant("base-conv", forward=output(other_when_compiled))),
    ("compiled", "other gradients", plant("base-conv", forward=output(other_gradient_when_compiled))),
]  # fmt: skip


ROOM = 4
"""How much wider bounds are here. Where plain PyTorch errs more they are wider, and a fault that only just
exceeds them, as one of 4 units does where 2 + 2 times 0.7 are earned, would be missed on that processor."""


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MARKS = {"compiled": [pytest.mark.compile], "recorded": [pytest.mark.gpu, NEEDS_GPU]}


@pytest.mark.parametrize(
    ("law", "make"),
    [pytest.param(law, make, id=f"{law}-{fault}", marks=MARKS.get(law, ())) for law, fault, make in FAULTS],
)
def test_a_planted_fault_is_found(
    law: str, make: Callable[[], Mixer], monkeypatch: pytest.MonkeyPatch
) -> None:
    earned = laws.earned
    monkeypatch.setattr(laws, "earned", lambda *args: (ROOM * bound for bound in earned(*args)))
    monkeypatch.setattr(laws, "SPREAD", ROOM * laws.SPREAD)
    monkeypatch.setattr(laws, "RUNS", 3)  # a fault exceeds the bounds of all of them, and each takes its time
    with pytest.raises(AssertionError) as caught:
        laws.LAWS[law](make())
    # by the law's own judgement, and not by an assertion of torch's that it ran into
    assert Path(caught.traceback[-1].path).name == "laws.py"


def test_every_law_has_been_seen_red() -> None:
    assert {law for law, _, _ in FAULTS} == set(laws.LAWS)


# --------------------------------------------------------------------------------------- tolerances, refusals


DOUBLE = torch.float64


def lone_key(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Softmax attention to one key: the gradient of q is zero, by cancellation of dy . v with itself."""
    q = q.detach().requires_grad_()
    y = ((q * k).sum(-1, keepdim=True)[..., None].softmax(-1) * v[..., None, :]).sum(-2)
    return {"y": y, "gradient": torch.autograd.grad(y, q, dy)[0]}


def by_another_way(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> Tensor:
    """The same gradient as some kernels have it: two sums, each in its own order."""
    return ((dy * v).sum(-1, keepdim=True) - (dy * v).flip(-1).cumsum(-1)[..., -1:]) * k


def sums(x: Tensor, w: Tensor, *_: Tensor) -> dict[str, Tensor]:
    return {"y": torch.tanh(x @ w.mT).softmax(-1) @ w}


def four(dtype: torch.dtype) -> list[Tensor]:
    return [laws.draw(50, 16, dtype=DOUBLE, seed=seed).to(dtype) for seed in range(4)]


@pytest.mark.parametrize("wrong", [
    torch.zeros_like, torch.neg, lambda t: t * torch.nan, lambda t: t[:-1], lambda t: t.roll(1, 0),
    lambda t: t * (1.01 if t.dtype != BF16 else 1.1),
    lambda t: torch.where(t == t.max(), t * (1.01 if t.dtype != BF16 else 1.1), t),
], ids=["zero", "negated", "nan", "shorter", "elsewhere", "1%", "1% of one"])  # fmt: skip
@pytest.mark.parametrize("dtype", [DOUBLE, FP32, BF16], ids=str)
def test_tolerances_let_no_wrong_answer_through(wrong: Callable, dtype: torch.dtype) -> None:
    tensors = four(dtype)
    plain, truth = laws.plainly(sums, *tensors)["y"], sums(*(t.double() for t in tensors))["y"]
    laws.assert_right("the same", plain.tensor, plain, truth)
    with pytest.raises(AssertionError):
        laws.assert_right("another", wrong(plain.tensor), plain, truth)
    with pytest.raises(AssertionError):
        laws.assert_right("another dtype", plain.tensor.half(), plain, truth)


def test_tolerance_is_twice_what_plain_torch_errs() -> None:
    truth = laws.draw(100, dtype=DOUBLE)
    plain = laws.plainly(lambda: (truth * (1 + 1e-3)).float())
    laws.assert_as_good_as_plain("nearly twice", (truth * (1 + 1.9e-3)).float(), plain, truth)
    with pytest.raises(AssertionError):
        laws.assert_as_good_as_plain("more than twice", (truth * (1 + 2.1e-3)).float(), plain, truth)


@pytest.mark.parametrize("dtype", [DOUBLE, FP32, BF16], ids=str)
def test_a_sum_of_terms_that_cancel_may_err_by_their_rounding_and_no_more(dtype: torch.dtype) -> None:
    tensors = four(dtype)
    plain = laws.plainly(lone_key, *tensors)["gradient"]
    truth = lone_key(*(t.double() for t in tensors))["gradient"]
    assert laws.size(plain.tensor) == laws.size(truth) == 0  # on any processor: it is p - p
    laws.assert_right("plain", plain.tensor, plain, truth)
    laws.assert_right("another way", by_another_way(*tensors), plain, truth)
    _, k, v, dy = tensors
    term = (dy * v).sum(-1, keepdim=True) * k
    for factor in (1.0, -1.0, 1e-2 if dtype != BF16 else 1e-1, 32 * torch.finfo(dtype).eps):
        with pytest.raises(AssertionError, match="rounding explains"):
            laws.assert_right(f"{factor} of a term", factor * term, plain, truth)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_where_nothing_cancels_a_nudged_run_errs_twice_as_much_as_plain_torch(dtype: torch.dtype) -> None:
    factors = [laws.draw(50, 16, dtype=DOUBLE, seed=seed).to(dtype) for seed in range(20)]
    plain = laws.plainly(functools.reduce, torch.mul, factors)
    truth = functools.reduce(torch.mul, [u.double() for u in factors])

    def error(got: Tensor) -> float:
        return ((got - truth) / truth).square().mean().sqrt().item()

    for nudged in plain.nudged():
        assert 1.8 < error(nudged) / error(plain.tensor) < 2.2


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_where_nothing_cancels_bounds_are_what_plain_torch_earns(dtype: torch.dtype) -> None:
    tensors = four(dtype)
    plain, truth = laws.plainly(sums, *tensors)["y"], sums(*(t.double() for t in tensors))["y"]
    usual, *others = laws.earned(plain, truth)
    assert len(others) == laws.RUNS
    assert max(others) < 1.5 * usual


def test_nudges_move_what_is_rounded_to_its_neighbours_and_nothing_else() -> None:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.view(torch.int32)

    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -3.0, 1e-40]).repeat(1000, 1)
    before, plain = x.clone(), x * 1.5
    with Nudges(0):
        got = x * 1.5
        for kept in (x * 1, x + torch.zeros(1), torch.cat((x[:9], x[9:])), x.clone().add_(0)):
            laws.assert_bitwise("what is only moved", bits(kept)[:, 2:], bits(before)[:, 2:])  # -0 + 0 is 0
    laws.assert_bitwise("what came in", bits(x), bits(before))
    apart = bits(got) - bits(plain)
    assert (apart[:, :5] == 0).all()
    for column in apart[:, 5:].unbind(1):
        assert set(column.tolist()) == {-1, 0, 1}
        assert 0.2 < (column != 0).float().mean() < 0.3
    with Nudges(0):
        laws.assert_bitwise("from the same seed", bits(x * 1.5), bits(got))


def test_a_nudged_run_that_overflows_explains_nothing() -> None:
    largest = torch.full((100,), torch.finfo(torch.half).max, dtype=torch.half)
    plain = laws.plainly(lambda: largest / 4 * 4)
    assert all(nudged.isinf().any() for nudged in plain.nudged())
    with pytest.raises(AssertionError):
        laws.assert_as_good_as_plain("half as large", largest / 2, plain, largest.double())


def refusing(mixer: Mixer, **refusals: str) -> Mixer:
    type(mixer).refusals = refusals
    return mixer


def test_a_refused_law_is_expected_to_fail() -> None:
    leaky = refusing(plant("attention", forward=output(sees_next_token))(), causal="it sees one token ahead")
    with pytest.raises(pytest.xfail.Exception, match="one token ahead"):
        test_laws.hold(leaky, laws.law_causal)


def test_a_refused_law_may_be_declined_by_the_mixer_itself() -> None:
    def declines(right: Callable, self: Mixer, x_BTD: Tensor, state: Any = None, **how: Any) -> Any:
        if state is not None:
            raise NotImplementedError("reads whole sequences only")
        return right(x_BTD, state, **how)

    with pytest.raises(pytest.xfail.Exception, match="whole"):
        test_laws.hold(
            refusing(plant("attention", forward=declines)(), splits="it reads the whole"), laws.law_splits
        )


def test_a_needless_refusal_is_an_error() -> None:
    with pytest.raises(pytest.fail.Exception, match="obeys"):
        test_laws.hold(refusing(plant("attention")(), causal="because I say so"), laws.law_causal)


# ------------------------------------------------------------------------------------ a mixer of a user's own

MY_MIXER = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from holdall.contract import Mixer, MixerConfig, Paper, recurrent_dtype, register


class AverageState(NamedTuple):
    h_BD: torch.Tensor


PAPER = Paper(title="Mine", authors="Me", year=2026)


@register("my-average", paper=PAPER, state="D", training="N D", inference="D")
@dataclass(frozen=True, kw_only=True)
class AverageConfig(MixerConfig):
    """A moving average."""

    keep: float = 0.9
    forms = ("loop",)
    variants = ({}, {"keep": 0.5})

    def build(self) -> Average:
        return Average(self)


class Average(Mixer):
    config: AverageConfig
    state_type = AverageState

    def __init__(self, config: AverageConfig) -> None:
        super().__init__(config)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTD, state=None, *, inplace=False, want_state=True):
        if state is None:
            state = self.init_state(x_BTD.shape[0], dtype=x_BTD.dtype, device=x_BTD.device)
        h_BD, hs = state.h_BD, []
        for x_BD in LEAK(self.proj(x_BTD)).unbind(1):
            h_BD = self.config.keep * h_BD + x_BD
            hs.append(h_BD)
        return torch.stack(hs, dim=1).to(x_BTD.dtype), AverageState(h_BD) if want_state else None

    def init_state(self, batch, *, dtype, device=None):
        dtype = recurrent_dtype(dtype)
        return AverageState(torch.zeros(batch, self.config.width, dtype=dtype, device=device))

    def state_elements(self, context_len):
        return self.config.width
'''


def hold_file(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", "not compile and not full", "--load", str(file), "--pyargs", "holdall.testing.laws"]
    command += options
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(laws.__file__).parents[1])


def test_a_users_own_mixer_is_held_to_the_laws(tmp_path: Path) -> None:
    file = tmp_path / "my_mixer.py"
    file.write_text(MY_MIXER.replace("LEAK(self.proj(x_BTD))", "self.proj(x_BTD)"))
    run = hold_file(file)
    assert run.returncode == 0, run.stdout
    assert "linear-attention" not in run.stdout


def test_a_users_own_mixer_is_caught_at_a_leak(tmp_path: Path) -> None:
    file = tmp_path / "my_mixer.py"
    file.write_text(
        MY_MIXER.replace("LEAK(self.proj(x_BTD))", "self.proj(x_BTD + x_BTD.mean(1, keepdim=True))")
    )
    run = hold_file(file, "-k", "splits or causal or rows")
    assert run.returncode == 1, run.stdout
    for law in ("splits", "causal"):
        assert f"test_law[my-average[]-{law}-fp64]" in run.stdout
    assert "rows-fp64]" not in run.stdout.partition("short test summary")[2].replace("joined_rows", "")
