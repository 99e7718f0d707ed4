"""What `holdall export` wrote, read back: `holdall.adapters.transformers` says what such a folder holds.

The transformers library is not needed for that.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from holdall.adapters.reading import Fields, Weights
from holdall.model import ModelConfig

MODEL_TYPE = "holdall"
"""The `model_type` of such a folder, and the field of its config.json that holds the model's own config."""
PREFIX = "model."
"""How the names of the model's weights begin."""
# said by the model's own config too, for programs that ask every model for them
DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")


def holdall(fields: Fields, weights: Weights) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config as it was, and the weights by the names that they had."""
    config: Any = ModelConfig.checked(fields.take(MODEL_TYPE), f"{MODEL_TYPE} in {fields.where}")
    fields.ignore(*DERIVED)
    weights.rename({}, prefix=PREFIX)
    return config, {name: weights.take(name) for name in weights.names}
