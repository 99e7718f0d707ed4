"""Prints how far converted hybrids and models of flash-linear-attention are from their originals:

    PYTHONPATH=.:tests python -m adapters.errors

The largest difference of the logits of 23 tokens, whole or token by token, over the largest logit.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.parity import DOUBLE, InDouble, converted, in_pieces


@torch.no_grad()
def errors(original: Any, length: int = 23) -> tuple[float, float]:
    """In fp32 and in fp64."""
    with tempfile.TemporaryDirectory() as folder:
        model = converted(original, Path(folder))
    tokens_BT = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(0))
    with InDouble():
        exact = type(original)(original.config).double().eval()
        exact.load_state_dict(original.state_dict())
        exact_BTV = exact(tokens_BT, use_cache=False).logits
    assert exact_BTV.dtype == DOUBLE
    found = []
    for kind, want_BTV in ((model, original(tokens_BT, use_cache=False).logits), (model.double(), exact_BTV)):
        got = [in_pieces(kind, tokens_BT, sizes) for sizes in ([length], [1] * length)]
        found.append(max(float((logits - want_BTV).abs().max() / want_BTV.abs().max()) for logits in got))
    return found[0], found[1]


def main() -> None:
    warnings.simplefilter("ignore")
    from adapters import test_fla, test_lfm2, test_olmo_hybrid, test_qwen
    from adapters.originals import in_plain_torch, randomised
    from transformers.models import lfm2, olmo_hybrid, qwen3_5, qwen3_next

    text = qwen3_5.Qwen3_5TextConfig(**test_qwen.SIZES)
    made = {
        "qwen3_next": test_qwen.next_model,
        "qwen3_5_text": lambda: randomised(qwen3_5.Qwen3_5ForCausalLM, text),
        "olmo_hybrid": test_olmo_hybrid.original,
        "lfm2": test_lfm2.original,
        "gla": lambda: test_fla.original("GLA"),
        "delta_net": lambda: test_fla.original("DeltaNet"),
        "gated_deltanet": lambda: test_fla.original("GatedDeltaNet", head_dim=16),
        "retnet": lambda: test_fla.original("RetNet"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in (lfm2, olmo_hybrid, qwen3_5, qwen3_next):
            in_plain_torch(patch, getattr(module, f"modeling_{module.__name__.rpartition('.')[2]}"))
        test_fla.by_definitions(patch)
        for name, make in made.items():
            print(f"{name:15} fp32 {{:.1e}}  fp64 {{:.1e}}".format(*errors(make())), flush=True)


if __name__ == "__main__":
    main()
