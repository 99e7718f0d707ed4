"""What a state with a ring moves, and what it costs to round it: the tables of docs/replay.md.

    python -m bench.replay bytes                 what a step moves, of every mixer whose state is a matrix
    python -m bench.replay errors [--tokens N]   errors of the outputs, token by token; minutes on a free core

Errors: one head reads standard normal queries, keys and values, and the same with values whose mean is as
large as their spread. Outputs are compared with those of the op without a ring in fp64 over the last 64
tokens before each length, by the norm of the difference over that of the outputs. The ring and the products
are in fp32, so that what is measured is the rounding of S alone.

Letters: B row, T time, H heads, K key dim, V value dim, X log decays of a head and token.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import holdall
from holdall.contract import MixerConfig
from holdall.ops.delta_rule import delta_rule, unit_length
from holdall.ops.linear_attention import FEATURE_MAPS, IDENTITY, linear_attention
from holdall.ops.replay import ScaledReplayState, empty_replay, replay_attention

# -------------------------------------------------------------------------------------------------- bytes

LENGTHS_OF_RINGS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
USUAL: dict[str, dict[str, Any]] = {
    "taylor": {"width": 1792, "heads": 16},
    "prefix-linear-attention": {"width": 1792, "heads": 16},
    "rebased": {"width": 1792, "heads": 16},
    "linear-attention": {"width": 1024, "heads": 16, "feature_dim": 64},
    "cosformer": {"width": 1024, "heads": 16},
    "hedgehog": {"width": 1024, "heads": 16},
    "performer": {"width": 1024, "heads": 16},
    "rfa": {"width": 1024, "heads": 16},
    "retnet": {"width": 2048, "heads": 8},
    "gla": {"width": 2048},
    "gateloop": {"width": 1024, "heads": 16},
    "mamba-2": {"width": 2048},
    "rwkv-5": {"width": 2048},
    "delta-net": {"width": 2048, "heads": 16},
    "gated-delta-net": {"width": 2048, "heads": 16, "head_dim": 128, "value_heads": 32, "value_ratio": 1},
    "kimi-delta-attention": {"width": 2304, "heads": 32, "head_dim": 128},
    "rwkv-7": {"width": 2048, "heads": 32},
}
"""Options of models that people train, of every mixer whose state is a matrix per head."""


@dataclass(frozen=True)
class Moved:
    """Bytes of a row and layer: what a step reads and writes of S, without a ring and with one of 2 L tokens.

    Nothing else of a step depends on the ring: weights, activations, the inputs of a short convolution.
    """

    sums: int
    token: int
    """Of one token in the ring."""

    @property
    def without(self) -> int:
        return 2 * self.sums

    def replayed(self, length: int) -> float:
        """S is read, and written once in L steps; 1.5 L - 0.5 tokens are read on average, one is written."""
        return self.sums * (1 + 1 / length) + (1.5 * length + 0.5) * self.token

    def share(self, length: int) -> float:
        return self.replayed(length) / self.without

    def best(self) -> int:
        return min(LENGTHS_OF_RINGS, key=self.replayed)


def moved(config: MixerConfig) -> Moved:
    """Beside activations in bf16, from the states themselves.

    A mixer without a ring would have one of features and values, GateLoop of complex decays too, and RWKV-7
    of decays, two keys and two values, one of them as wide as S.
    """
    ringed = has_ring(config)
    if ringed:
        config = dataclasses.replace(config, replay=1)  # type: ignore[call-arg]
    with torch.device("meta"):
        state: Any = config.build().init_state(1, dtype=torch.bfloat16)
    sums = [getattr(state, name) for name in state._fields if name.startswith(("s_", "z_"))]
    heads, features, values = sums[0].shape[1:4]
    if ringed:
        ring = (state.k_BSGK, state.v_BSHV, state.log_decay_BSHX)
        token = sum(x.numel() * x.element_size() for x in ring) // 2
    elif config.name == "rwkv-7":
        token = heads * (2 * 2 * features + 4 * features + 2 * values + 4 * values)
    elif config.name == "prefix-linear-attention":
        token = 2 * heads * (config.feature_dim + values)  # type: ignore[attr-defined]
    else:
        token = heads * (2 * features + 2 * values + 8 * (config.name == "gateloop"))
    return Moved(sum(x.numel() * x.element_size() for x in sums), token)


def has_ring(config: MixerConfig) -> bool:
    return "replay" in {field.name for field in dataclasses.fields(config)}


def bytes_table() -> Iterator[str]:
    """By row: the default, at width 64, and a usual size."""
    yield "| mixer | width | S | moved | L = 16 | best L | ring |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for name, options in USUAL.items():
        entry = holdall.describe(name)
        for config in (entry.configure(), entry.configure(**options)):
            own = moved(config)
            best, ring = own.best(), "yes" if has_ring(config) else "no"
            yield (
                f"| {name} | {config.width} | {own.sums / 1024:,.0f} KB | {own.without / 1024:,.0f} KB | "
                f"{own.share(16):.2f} | {own.share(best):.2f} at {best} | {ring} |"
            )


# ------------------------------------------------------------------------------------------------- errors

LAST = 64
LENGTHS = (1024, 4096, 16_384)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Kind:
    """What is measured: a head of these sizes, with X log decays, by the delta rule or not."""

    key_dim: int
    value_dim: int
    taylor: bool = False
    decays: int = 0
    corrects: bool = False


KINDS = {
    "taylor": Kind(16, 112, taylor=True),
    "mamba-2": Kind(128, 64, decays=1),
    "gated-delta-net": Kind(128, 128, decays=1, corrects=True),
}
"""Decays are those of a head that forgets half in 256 tokens."""


def draw(kind: Kind, tokens: int) -> tuple[Tensor, ...]:
    """q, k, v, log decays and beta in fp32 of two rows; the second one's values have a mean of 1."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, 1, size, generator=generator).repeat(2, 1, 1, 1)
        for size in (kind.key_dim, kind.key_dim, kind.value_dim)
    )
    v[1] += 1
    log_decay = torch.full((2, tokens, 1), -0.6931471805599453 / 256)
    if not kind.taylor:  # of such lengths as mixers give them
        q, k = q * kind.key_dim**-0.5, k * kind.key_dim**-0.5
    beta = torch.rand(1, tokens, 1, generator=generator).repeat(2, 1, 1)
    return q, unit_length(k) if kind.corrects else k, v, log_decay, beta


def truth(kind: Kind, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    q, k, v, log_decay, beta = (x.double() for x in (q, k, v, log_decay, beta))
    if kind.taylor:
        return linear_attention(q, k, v, None, feature_map=FEATURE_MAPS["taylor"], normalise=True)[0]
    if not kind.corrects:
        return linear_attention(q, k, v, None, None, log_decay)[0]
    return delta_rule(q, k, v, beta, v.new_zeros(2, 1, kind.key_dim, kind.value_dim), log_decay)[0]


def start(kind: Kind, replay: int, dtype: str) -> Any:
    state = empty_replay(
        2, 1, kind.key_dim, kind.value_dim, replay, normalise=kind.taylor, decays=kind.decays,
        feature_map=FEATURE_MAPS["taylor"] if kind.taylor else IDENTITY, corrects=kind.corrects,
        dtype=torch.float32,
    )  # fmt: skip
    state = state._replace(s_BHFV=state.s_BHFV.to(DTYPES[dtype]))
    if dtype != "fp16":
        return state
    return ScaledReplayState(*state, torch.zeros(2, 1, dtype=torch.int32))


@torch.no_grad()
def measure(kind: Kind, replay: int, dtype: str, tokens: int) -> dict[int, tuple[float, float]]:
    """The error of both rows by length."""
    drawn = draw(kind, tokens)
    want_BTHV = truth(kind, *drawn)
    feature_map = FEATURE_MAPS["taylor"] if kind.taylor else IDENTITY
    state, ys, errors = start(kind, replay, dtype), [], {}  # type: ignore[var-annotated]
    for t in range(tokens):
        q, k, v, log_decay, beta = (x[:, t : t + 1] for x in drawn)
        y, state = replay_attention(
            q, k, v, state, log_decay if kind.decays else None, beta if kind.corrects else None,
            replay=replay, feature_map=feature_map, normalise=kind.taylor, inplace=True,
        )  # fmt: skip
        ys = [*ys[1 - LAST :], y]
        if t + 1 in LENGTHS:
            last_BTHV = want_BTHV[:, t + 1 - LAST : t + 1]
            apart_B = (torch.cat(ys, dim=1) - last_BTHV).flatten(1).norm(dim=1)
            first, second = (apart_B / last_BTHV.flatten(1).norm(dim=1)).tolist()
            errors[t + 1] = first, second
    return errors


def errors_table(name: str, tokens: int) -> Iterator[str]:
    lengths = [length for length in LENGTHS if length <= tokens]
    yield f"| {name}: S | L | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |"
    yield "| --- | ---: | " + " | ".join("---:" for _ in lengths) + " |"
    for dtype in DTYPES:
        for replay in (1, 16):
            errors = measure(KINDS[name], replay, dtype, tokens)
            cells = (f"{100 * first:.2g}% ({100 * second:.2g}%)" for first, second in errors.values())
            yield f"| {dtype} | {replay} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__.partition("\n")[0])
    parser.add_argument("table", choices=["bytes", "errors"])
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--tokens", type=int, default=max(LENGTHS))
    asked = parser.parse_args()
    if asked.table == "bytes":
        print("\n".join(bytes_table()))
        return
    for name in asked.kind or KINDS:
        for line in errors_table(name, asked.tokens):
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
