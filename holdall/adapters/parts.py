"""What several families have in common: the kinds of layers, MLPs, embeddings with heads.

Letters: D width, I inner width of an MLP, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from holdall.adapters.reading import Fields, Weights, head_of


def gated_mlp(weights: Weights, gate: str, up: str, down: str) -> dict[str, Tensor]:
    """A SwiGLU MLP's weights by Holdall's names; `gate` and `up` are the names of (I, D) weights.

    Where `up` is not there, `gate` has both, the gate's rows first, as older versions of fla store it.
    """
    if up in weights:
        gate_ID, up_ID = weights.take(gate), weights.take(up)
    else:
        gate_ID, up_ID = weights.take(gate).chunk(2)
    return {"fc1.weight": torch.cat((up_ID, gate_ID)), "fc2.weight": weights.take(down)}


def outer_weights(
    weights: Weights, embedding: str, norm: str, *, tied: bool, offset: float = 0.0
) -> dict[str, Tensor]:
    """The weights before the first layer and after the last: the embedding, the last norm, an untied head.

    Args:
        embedding, norm: names of the embedding and of the weight of the last norm.
        tied: whether the config says that the head is the embedding.
        offset: what the norm adds to its weight.
    """
    embed_VD = weights.take(embedding)
    tensors = {"embed.weight": embed_VD, "norm.weight": shifted(weights.take(norm), offset)}
    if (head_VD := head_of(weights, "lm_head.weight", embed_VD, tied=tied)) is not None:
        tensors["head.weight"] = head_VD
    return tensors


def block(
    depth: int, norm: Tensor, mixer: dict[str, Tensor], mlp_norm: Tensor, mlp: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of a layer by their names in the model."""
    own = {"norm.weight": norm, "mlp_norm.weight": mlp_norm}
    own |= {f"mixer.{name}": tensor for name, tensor in mixer.items()}
    own |= {f"mlp.{name}": tensor for name, tensor in mlp.items()}
    return {f"blocks.{depth}.{name}": tensor for name, tensor in own.items()}


def normalised(embed_VD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """An embedding after a layer norm, in at least fp32."""
    dtype = torch.promote_types(embed_VD.dtype, torch.float32)
    return F.layer_norm(embed_VD.to(dtype), weight_D.shape, weight_D.to(dtype), bias_D.to(dtype), eps)


def shifted(weight: Tensor, offset: float) -> Tensor:
    """A norm's weight with what the norm adds to it, in fp32, as the norms compute it."""
    return weight.float() + offset if offset else weight


def layer_kinds(fields: Fields, kinds: tuple[str, ...], otherwise: list[str]) -> list[str]:
    """The kind of each layer, out of `layer_types` or, where it is not there, `otherwise`."""
    layers = fields.number("num_hidden_layers")
    given = fields.take("layer_types", otherwise)
    if not isinstance(given, list) or len(given) != layers or not set(given) <= set(kinds):
        raise fields.refused("layer_types", given, f"{layers} of {' and '.join(map(repr, kinds))}")
    return given
