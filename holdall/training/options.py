"""The settings of pretraining, one by one: each is a field of PretrainConfig and a flag of `holdall train`.

A field's docstring is the flag's help. Nothing here imports PyTorch, so that the help is instant.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdall.settings import (
    Betas,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    Seed,
    Share,
)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """How a language model is trained, on what; the defaults are those of the published presets."""

    data: str = ""
    """Folder of token shards that `holdall data` made; empty for the bundled text, as bytes."""
    data_hash: str = ""
    """Hash of the content of `data`, which must match; empty to accept any."""
    context_len: PositiveInt = 2048
    """Tokens of a row that the model reads."""
    batch: PositiveInt = 256
    """Rows per step, over all devices."""
    micro_batch: PositiveInt = 8
    """Rows per pass on one device; the gradients of a step's passes are summed."""
    steps: PositiveInt = 20_000
    """Training steps."""
    learning_rate: PositiveFloat = 8e-4
    """Peak learning rate, reached after the warm-up; it then falls along a cosine."""
    min_learning_rate: Share = 0.1
    """Where the cosine ends, as a share of the peak learning rate."""
    warmup: NonNegativeInt = 200
    """Steps over which the learning rate rises linearly; 0 for none."""
    betas: Betas = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegativeFloat = 0.1
    """AdamW's weight decay, of the matrices of linear layers, the embedding and the head."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of a step's gradient, which is scaled down to it; 0 for any."""
    seed: Seed = 0
    """Seed of the initial weights, of the order of the rows and of masked tokens."""
    precision: Precision = "fp32"
    """What a pass computes in (docs/training.md). On a GPU the default of `holdall train` is bf16."""
    compile: bool = False
    """Compile each block by torch.compile. On a GPU `holdall train` does so by default."""
    recompute: bool = False
    """Keep only each block's input and run the block again in the backward pass: activation checkpointing."""
    mlm_weight: NonNegativeFloat = 0.25
    """Weight of the masked-token loss of models with a prefix beside the next-token loss of what follows it
    (docs/jrt.md); 0 for none. Models without a prefix have none.
    """
    mlm_share: Share = 0.15
    """Share of the prefix's tokens that are masked, each drawn by itself; 0 for none."""
    evaluate_every: PositiveInt = 1000
    """Steps between evaluations on the validation text."""
    evaluate_rows: PositiveInt = 256
    """Rows of an evaluation, the first of the validation text."""
