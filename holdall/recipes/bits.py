"""Ten models that recall on the quick recipe's task, for `holdall bits` to store in fewer bits.

Attention and a window, whose cache is written once; linear attention of three feature maps, whose state is a
sum over all tokens; Mamba-2, whose sum decays; and delta rules, which replace what a key held. Each recalls
enough in fp32 to have something to lose.
"""

from __future__ import annotations

from holdall.contract import MixerConfig
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.gated_delta_net import GatedDeltaNetConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.mixers.mamba_2 import Mamba2Config
from holdall.mixers.rfa import RfaConfig
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.recipes.quick import WIDTH, point
from holdall.sweeps import SweepConfig


def sweeps(seeds: int = 1) -> tuple[SweepConfig, ...]:
    """One model a family but for Taylor, of which there are two sizes."""
    mixers: dict[str, MixerConfig] = {
        "RWKV-7": RWKV7Config(width=WIDTH),
        "Gated DeltaNet": GatedDeltaNetConfig(width=WIDTH),
        "DeltaNet": DeltaNetConfig(width=WIDTH),
        "Mamba-2": Mamba2Config(width=WIDTH),
        "Taylor, f = 16": TaylorConfig(width=WIDTH, feature_dim=16),
        "Taylor, f = 8": TaylorConfig(width=WIDTH, feature_dim=8),
        "RFA": RfaConfig(width=WIDTH),
        "ELU + 1": LinearAttentionConfig(width=WIDTH, feature_dim=16),
        "window 32": SlidingWindowConfig(width=WIDTH, window=32),
        "attention": AttentionConfig(width=WIDTH),
    }
    points = tuple(point(label, label.partition(",")[0], mixer, seeds) for label, mixer in mixers.items())
    return (SweepConfig(recipe="bits", points=points),)
