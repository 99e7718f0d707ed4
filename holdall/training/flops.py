"""What a pass over a language model costs: operations, counted, and memory."""

from __future__ import annotations

import warnings

import torch

from holdall.mixers.attention import AttentionConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.model import Model

DENSE_BF16 = {
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""bf16 operations per second of cards, by a part of their names, for which Lightning Fabric's table won't do.

It does not know the driver's names of the H200, GH200 and B200, takes an L40S for an L4, and has other
figures than dense bf16 with fp32 sums for the H100 NVL and the RTX 4090.
"""


def peak_flops(device: torch.device) -> float | None:
    """Operations per second that the maker promises of a device for dense bf16 products.

    None if it is not known: not a GPU, a card in neither table, or no package lightning-fabric for its table.
    """
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    for name, flops in DENSE_BF16.items():
        if set(name.split()) <= words:
            return flops
    try:
        from lightning_fabric.utilities.throughput import get_available_flops
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know the card
        return get_available_flops(device, torch.bfloat16)


def flops_per_token(model: Model, context_len: int, predictions: float | None = None) -> float:
    """Operations of training on one token: 6 per weight, and the products of softmax attention.

    Each weight takes part in one multiplication and one addition forward and two of each backward; an
    embedding only as the tied head, since looking it up multiplies nothing. Of softmax attention, whole or in
    a window, the products of queries with keys and of weights with values are counted where the mask leaves
    them: 12 D per key seen. What other mixers compute beside their projections is not counted, nor what
    `recompute` repeats.

    Args:
        context_len: tokens of a row. The maps that read a prefix alone take part in its share of them.
        predictions: of a row, on average, as the head takes part in no more; None for one at each token.
    """
    config, keys = model.config, 0.0
    looked_up = config.positions + (0 if config.tied else config.vocab)
    weights: float = model.parameter_count() - looked_up * config.width
    if predictions is not None:
        weights -= config.vocab * config.width * (1 - predictions / context_len)
    for layer in config.layers:
        if isinstance(layer, AttentionConfig):
            keys += (context_len + 1) / 2
        elif isinstance(layer, SlidingWindowConfig):
            window = min(layer.window, context_len)
            keys += window - window * (window - 1) / (2 * context_len)
        elif isinstance(layer, PrefixLinearAttentionConfig):
            of_prefix = layer.width * (layer.heads * layer.feature_dim + layer.width)
            weights -= of_prefix * max(1 - layer.prefix / context_len, 0)
    return 6 * weights + 12 * config.width * keys


def memory_bytes(device: torch.device) -> int:
    """The most memory that this process has used so far: of the GPU, or, without one, of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
