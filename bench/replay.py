"""What it costs a Taylor state to be rounded when it is written: error of the outputs, token by token.

    python -m bench.replay [--tokens N]       prints the table of docs/replay.md; a minute on a free core

One head of Based's sizes, K 16 and V 112, reads standard normal queries, keys and values, and the same with
values whose mean is as large as their spread. Outputs are compared with those of plain linear attention in
fp64 over the last 64 tokens before each length, by the norm of the difference over that of the outputs. The
ring and the products are in fp32, so that what is measured is the rounding of S alone.

Letters: B row, T time, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from holdall.ops.linear_attention import FEATURE_MAPS, linear_attention
from holdall.ops.replay import ScaledReplayState, empty_replay, replay_attention

TAYLOR = FEATURE_MAPS["taylor"]
KEY_DIM, VALUE_DIM, LAST = 16, 112, 64
LENGTHS = (1024, 4096, 16_384)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def draw(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in fp32 of two rows; the second one's values have a mean of 1."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, 1, size, generator=generator).repeat(2, 1, 1, 1)
        for size in (KEY_DIM, KEY_DIM, VALUE_DIM)
    )
    v[1] += 1
    return q, k, v


def start(replay: int, dtype: str) -> Any:
    state = empty_replay(2, 1, KEY_DIM, VALUE_DIM, replay, feature_map=TAYLOR, dtype=torch.float32)
    state = state._replace(s_BHFV=state.s_BHFV.to(DTYPES[dtype]))
    if dtype != "fp16":
        return state
    return ScaledReplayState(*state, torch.zeros(2, 1, dtype=torch.int32))


@torch.no_grad()
def measure(replay: int, dtype: str, tokens: int) -> dict[int, tuple[float, float]]:
    """The error of both rows by length."""
    q, k, v = draw(tokens)
    truth, *_ = linear_attention(q.double(), k.double(), v.double(), None, feature_map=TAYLOR, normalise=True)
    state, ys, errors = start(replay, dtype), [], {}  # type: ignore[var-annotated]
    for t in range(tokens):
        now = slice(t, t + 1)
        y, state = replay_attention(
            q[:, now], k[:, now], v[:, now], state, replay=replay, feature_map=TAYLOR, inplace=True
        )
        ys = [*ys[1 - LAST :], y]
        if t + 1 in LENGTHS:
            want_BTHV = truth[:, t + 1 - LAST : t + 1]
            apart_B = (torch.cat(ys, dim=1) - want_BTHV).flatten(1).norm(dim=1)
            first, second = (apart_B / want_BTHV.flatten(1).norm(dim=1)).tolist()
            errors[t + 1] = first, second
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=max(LENGTHS))
    tokens = parser.parse_args().tokens
    lengths = [length for length in LENGTHS if length <= tokens]
    print("| S | L |", " | ".join(f"{length:,} tokens" for length in lengths), "|")
    print("| --- | ---: |", " | ".join("---:" for _ in lengths), "|")
    for dtype in DTYPES:
        for replay in (1, 16):
            errors = measure(replay, dtype, tokens)
            cells = (f"{100 * first:.2g}% ({100 * second:.2g}%)" for first, second in errors.values())
            print(f"| {dtype} | {replay} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
