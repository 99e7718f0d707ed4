"""Hyena and H3 on short rows, forward and backward: beside their parallel forms in plain PyTorch.

1024 rows of 256 tokens, width 128, bf16: what a step of four models of the recipe based-figure2 reads. The
fewest bytes: the input and the gradient of the output read, the output and the gradient of the input written.
Products: the projections, and one matrix of 256 x 256 per filter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from bench.gpu import Case
from holdall.contract import MixerConfig
from holdall.mixers.h3 import H3Config
from holdall.mixers.hyena import HyenaConfig

ROWS, LENGTH, WIDTH = 1024, 256, 128


def cases() -> Iterator[Case]:
    pairs = (("Hyena", HyenaConfig(width=WIDTH), 1), ("H3", H3Config(width=WIDTH, state=32, head_dim=2), 3))
    return (case(*each) for each in pairs)


def case(name: str, config: MixerConfig, convolutions: int) -> Case:
    """`convolutions` per channel of the width."""
    x = torch.randn(ROWS, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    up, ways = torch.randn_like(x), {}
    for form in ("kernel", "parallel"):
        mixer = dataclasses.replace(config, form=form).build().to("cuda", torch.bfloat16)
        leaves = [x, *mixer.parameters()]

        def step(mixer: torch.nn.Module = mixer, leaves: list[torch.Tensor] = leaves) -> object:
            return torch.autograd.grad(mixer(x, want_state=False)[0], leaves, up)

        ways["ours" if form == "kernel" else "plain PyTorch"] = step
    per_token = 2 * WIDTH * (4 * WIDTH + convolutions * LENGTH)
    return Case(
        what=f"{name}, forward and backward",
        shape=f"{ROWS} x {LENGTH} x {WIDTH}",
        bytes=4 * x.numel() * x.element_size(),
        flops=3 * per_token * ROWS * LENGTH,
        ways=ways,
    )
