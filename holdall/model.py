"""The one backbone: embeddings, pre-norm blocks of mixers, tied head. Only the mixers differ.

    r = embed(tokens) (+ learned positions)
    each layer:  r = r + mixer(norm(r));  r = r + mlp(norm(r))  if there is an MLP
    logits = norm(r) embed^T

A hybrid is a list of different mixers. Letters: B row, T time, Q positions asked for, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdall.contract import Config, Mixer, MixerConfig, State, bytes_per_row


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """A language model, or a synthetic task's model.

    layers: the mixers from bottom to top, all of the model's width.
    mlp: inner width of each layer's MLP; 0 for none.
    positions: how many learned positions; 0 for none. A longer context is an error.
    norm: "layer" with bias, or "rms".
    """

    vocab: int
    width: int
    layers: tuple[MixerConfig, ...]
    mlp: int = 0
    mlp_kind: Literal["gelu", "swiglu"] = "gelu"
    positions: int = 0
    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5

    def validate(self) -> None:
        if self.vocab < 2 or self.width < 1 or self.mlp < 0 or self.positions < 0:
            raise ValueError(
                f"vocab {self.vocab} must be at least 2, width {self.width} positive, mlp {self.mlp} and "
                f"positions {self.positions} not negative"
            )
        if not self.layers:
            raise ValueError("a model needs at least one layer")
        for depth, layer in enumerate(self.layers):
            if layer.width != self.width:
                raise ValueError(
                    f"layer {depth} ({layer.name}) has width {layer.width}, the model {self.width}"
                )

    def build(self) -> Model:
        """The model, freshly initialised from torch's random state."""
        return Model(self)


class Position(NamedTuple):
    """How many tokens a row has read; carried by models with learned positions."""

    seen_B: Tensor


class MLP(nn.Module):
    """GELU MLP with biases, or SwiGLU without: fc2(a * silu(g)) with [a | g] = fc1(x)."""

    def __init__(self, width: int, inner: int, kind: str) -> None:
        super().__init__()
        self.gated = kind == "swiglu"
        self.fc1 = nn.Linear(width, 2 * inner if self.gated else inner, bias=not self.gated)
        self.fc2 = nn.Linear(inner, width, bias=not self.gated)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            a, gate = self.fc1(x).chunk(2, dim=-1)
            return self.fc2(a * F.silu(gate))
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A mixer and perhaps an MLP, each behind a norm and beside a residual."""

    def __init__(self, config: ModelConfig, layer: MixerConfig) -> None:
        super().__init__()
        norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
        self.norm = norm(config.width, eps=config.eps)
        self.mixer: Mixer = layer.build()
        self.mlp_norm = norm(config.width, eps=config.eps) if config.mlp else None
        self.mlp = MLP(config.width, config.mlp, config.mlp_kind) if config.mlp else None

    def after_mixer(self, r: Tensor) -> Tensor:
        """The part that works on each token alone."""
        if self.mlp is None or self.mlp_norm is None:
            return r
        return r + self.mlp(self.mlp_norm(r))


class Model(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.position_embed = nn.Embedding(config.positions, config.width) if config.positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(config.width, eps=config.eps)
        self._init_weights()

    def _init_weights(self) -> None:
        """GPT-2's initialisation, as Zoology uses it: N(0, 0.02), zero biases, and the projections that end a
        residual branch (named out_proj and fc2) scaled by 1 / sqrt(2 layers). Mixers with `own_init` keep
        theirs, apart from that scale."""
        own = {id(m) for b in self.blocks if b.mixer.own_init for m in b.mixer.modules()}  # type: ignore[union-attr]
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and id(module) not in own:
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            if name.endswith((".out_proj", ".fc2")):
                with torch.no_grad():
                    module.weight.div_(math.sqrt(2 * len(self.blocks)))

    @property
    def mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def hidden(
        self,
        tokens_BT: Tensor,
        states: Sequence[State] | None = None,
        *,
        at_BQ: Tensor | None = None,
        inplace: bool = False,
        want_states: bool = True,
    ) -> tuple[Tensor, list[State] | None]:
        """What the head reads, after the last norm, at all positions or those asked for.

        Args:
            tokens_BT: the next T tokens of each row.
            states: what an earlier call returned; None if nothing was read yet.
            at_BQ: positions within these T tokens; after the last mixer only they are computed.
            inplace, want_states: as in `Mixer.forward`.

        Returns:
            h_BTD or h_BQD, and the states, one per layer (and one more of learned positions).
        """
        r = self.embed(tokens_BT)
        after: list[State] = []
        position: Position | None = None
        if self.position_embed is not None:
            position = Position(tokens_BT.new_zeros(tokens_BT.shape[0])) if states is None else states[-1]  # type: ignore[assignment]
            assert position is not None
            if states is None and tokens_BT.shape[1] > self.config.positions:
                length, positions = tokens_BT.shape[1], self.config.positions
                raise ValueError(f"{length} tokens, but the model has {positions} learned positions")
            index_BT = position.seen_B[:, None] + torch.arange(tokens_BT.shape[1], device=r.device)
            r = r + self.position_embed(index_BT)
        for depth, block in enumerate(self.blocks):
            state = None if states is None else states[depth]
            ids = {"tokens_BT": tokens_BT} if block.mixer.reads_tokens else {}  # type: ignore[union-attr]
            x, state = block.mixer(block.norm(r), state, inplace=inplace, want_state=want_states, **ids)  # type: ignore[operator]
            if at_BQ is not None and depth == len(self.blocks) - 1:
                index_BQ1 = at_BQ[..., None].expand(-1, -1, r.shape[-1])
                r, x = r.gather(1, index_BQ1), x.gather(1, index_BQ1)
            r = block.after_mixer(r + x)  # type: ignore[operator]
            if want_states:
                after.append(state)
        if position is not None:
            after.append(Position(position.seen_B + tokens_BT.shape[1]))
        return self.norm(r), after if want_states else None

    def forward(
        self, tokens_BT: Tensor, states: Sequence[State] | None = None, **options: Any
    ) -> tuple[Tensor, list[State] | None]:
        """Logits at all positions or those asked for; arguments as in `hidden`."""
        h, after = self.hidden(tokens_BT, states, **options)
        return h @ self.embed.weight.T, after

    @torch.no_grad()
    def state_bytes(self, context_len: int) -> int:
        """Bytes of one row's states, all layers, counted from what is carried after `context_len` tokens."""
        tokens = torch.zeros(1, context_len, dtype=torch.long, device=self.embed.weight.device)
        _, states = self.hidden(tokens)
        assert states is not None
        return sum(map(bytes_per_row, states))

    def parameter_count(self) -> int:
        """Trained numbers, the tied embedding once."""
        return sum(p.numel() for p in self.parameters())
