"""Mamba, Mamba-2 and Falcon Mamba of transformers, read and written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import parity
from safetensors.torch import save_file
from torch import nn

from holdall.adapters import foreign
from holdall.adapters.mamba import to_transformers
from holdall.adapters.reading import ForeignError, Weights
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.mamba_2 import Mamba2Config
from holdall.model import Model, ModelConfig, seeded

WIDTH, VOCAB = 16, 40
SIZES = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 6}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", {}),
    "mamba, other sizes": (
        "Mamba",
        {"expand": 1, "conv_kernel": 3, "time_step_rank": 3, "layer_norm_epsilon": 1e-2, "use_bias": True},
    ),
    "mamba, untied": ("Mamba", {"tie_word_embeddings": False, "use_conv_bias": False}),
    # of these two the width counts
    "falcon mamba": (
        "FalconMamba",
        {"mixer_rms_eps": 1e-2, "time_step_rank": 3, "expand": 16, "intermediate_size": 2 * WIDTH},
    ),
    "mamba-2": ("Mamba2", {"num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "mamba-2, tied": (
        "Mamba2",
        {
            "num_heads": 2, "head_dim": 16, "n_groups": 1, "conv_kernel": 3, "use_bias": True,
            "use_conv_bias": False, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-2,
        },
    ),
}  # fmt: skip


def original(kind: str, **options: Any) -> Any:
    """A tiny one with random weights everywhere: initial zeros and ones would hide what is forgotten."""
    config = getattr(parity.transformers(), f"{kind}Config")(**SIZES | options)
    with seeded(0):
        model = getattr(parity.transformers(), f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("case", OPTIONS)
def test_it_is_what_it_was_there(case: str, tmp_path: Path) -> None:
    kind, options = OPTIONS[case]
    theirs = original(kind, **options)
    model = parity.check(theirs, tmp_path)
    assert model.config.tied == theirs.config.tie_word_embeddings


def config_json(kind: str, **fields: Any) -> dict[str, Any]:
    options = {"num_heads": 4, "head_dim": 8, "n_groups": 1} if kind == "Mamba2" else {}
    return getattr(parity.transformers(), f"{kind}Config")(**SIZES | options).to_diff_dict() | fields


REFUSED = [
    ("Mamba", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("Mamba", {"intermediate_size": 47}, "intermediate_size = 47"),
    ("Mamba", {"d_inner": 48}, "d_inner = 48"),
    ("Mamba", {"d_model": 17}, "d_model = 17"),
    ("Mamba", {"n_layer": 3}, "n_layer = 3"),
    ("Mamba", {"rms_norm": False}, "rms_norm = False"),
    ("Mamba", {"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg = "),
    ("Mamba", {"time_step_rank": "half"}, "time_step_rank = 'half'"),
    ("Mamba", {"use_bias": 1}, "use_bias = 1"),
    ("Mamba", {"use_conv_bias": "no"}, "use_conv_bias = 'no'"),
    ("Mamba", {"expand": 1.5}, "expand = 1.5"),
    ("Mamba", {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
    ("Mamba", {"mixer_rms_eps": 1e-6}, "mixer_rms_eps = 1e-06"),
    ("FalconMamba", {"twist": 3}, "twist = 3"),
    ("Mamba2", {"time_step_limit": [0.0, 0.5]}, r"time_step_limit = \[0.0, 0.5\]"),
    ("Mamba2", {"time_step_limit": [0.1, {"__float__": "Infinity"}]}, r"time_step_limit = \[0.1, "),
    ("Mamba2", {"time_step_limit": 3}, "time_step_limit = 3"),
    ("Mamba2", {"num_heads": 5}, "num_heads = 5"),
    ("Mamba2", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    ("Mamba2", {"intermediate_size": 48}, "intermediate_size = 48"),
    ("Mamba2", {"rms_norm": False}, "rms_norm = False"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_represented_is_refused_by_name(
    kind: str, fields: dict[str, Any], message: str
) -> None:
    options = {"num_heads": 4, "head_dim": 8, "n_groups": 1} if kind == "Mamba2" else {}
    tensors = dict(original(kind, **options).state_dict())
    with pytest.raises(ForeignError, match=message):
        foreign.read(config_json(kind, **fields), Weights(tensors, "weights"), "config.json")


def test_weights_that_the_config_denies_are_refused() -> None:
    tensors = dict(original("Mamba").state_dict())
    with pytest.raises(ForeignError, match=r"conv1d\.bias"):
        foreign.read(config_json("Mamba", use_conv_bias=False), Weights(tensors, "weights"), "config.json")


def test_the_fields_and_names_of_the_first_models_are_read(tmp_path: Path) -> None:
    """What the released state-spaces models have: mamba_ssm's fields too, and the name `embedding`."""
    theirs = original("Mamba")
    first = {
        "d_model": WIDTH, "d_inner": 2 * WIDTH, "n_layer": 2, "rms_norm": True, "ssm_cfg": {},
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "time_step_rank": "auto",
    }  # fmt: skip
    tensors = {name.replace("embeddings.", "embedding."): x for name, x in theirs.state_dict().items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
    config, got = foreign.read(config_json("Mamba", **first), Weights(tensors, "weights"), "config.json")
    theirs.save_pretrained(tmp_path)
    want = parity.converted(theirs, tmp_path)
    assert config == want.config
    assert all(torch.equal(got[name], tensor) for name, tensor in want.state_dict().items())


def test_the_fields_of_the_first_models_of_mamba_2_are_read() -> None:
    theirs = original("Mamba2", num_heads=4, head_dim=8, n_groups=1)
    first = {
        "norm_before_gate": True, "rms_norm": True, "intermediate_size": 2 * WIDTH, "time_step_scale": 1.0,
        "time_step_init_scheme": "random", "time_step_limit": (0.0, math.inf), "_name_or_path": "a/folder",
    }  # fmt: skip
    weights = [Weights(dict(theirs.state_dict()), "weights") for _ in range(2)]
    config, _ = foreign.read(config_json("Mamba2", **first), weights[0], "config.json")
    assert config == foreign.read(config_json("Mamba2"), weights[1], "config.json")[0]


# ------------------------------------------------------------------------------------------ the way back


LAYERS = {
    "mamba": MambaConfig(width=WIDTH, state=4),
    "mamba, other sizes": MambaConfig(width=WIDTH, state=4, expand=3, kernel=3, dt_rank=5, bias=True),
    "falcon mamba": MambaConfig(width=WIDTH, state=4, inner_norm=True, eps=1e-3, form="loop"),
    "mamba-2": Mamba2Config(width=WIDTH, state=4, head_dim=8, groups=2, bias=True, replay=4),
    "mamba-2, one head": Mamba2Config(width=WIDTH, state=4, expand=1, head_dim=64),
}


def ours(*layers: Any, **options: Any) -> Model:
    with seeded(1):
        model = ModelConfig(vocab=VOCAB, width=WIDTH, layers=layers, **{"norm": "rms"} | options).build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", LAYERS)
@torch.no_grad()
def test_transformers_opens_what_is_written(case: str, tied: bool, tmp_path: Path) -> None:
    layer = LAYERS[case]
    model = ours(layer, dataclasses.replace(layer, chunk=8), tied=tied)
    fields, tensors = to_transformers(model)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    kind = getattr(parity.transformers(), fields["architectures"][0])  # fla registers classes of its own
    theirs: nn.Module = kind.from_pretrained(tmp_path, dtype=torch.float32)
    tokens_BT = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))
    got_BTV, _ = model(tokens_BT)
    want_BTV = theirs.eval()(tokens_BT, use_cache=False).logits
    assert (got_BTV - want_BTV).abs().max() <= 1e-5 * want_BTV.abs().max()
    assert theirs.config.eos_token_id is None
    config, back = foreign.read(fields, Weights(tensors, "weights"), "config.json")
    assert config.tied == tied
    state = foreign.built(config, back, "weights").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ((AttentionConfig(width=WIDTH),), {}, "a layer of attention"),
        ((LAYERS["mamba"], LAYERS["mamba-2"]), {}, r"layer 1 \(mamba-2\) is another"),
        ((LAYERS["mamba"], LAYERS["mamba, other sizes"]), {}, r"layer 1 \(mamba\) is another"),
        ((LAYERS["mamba"],), {"norm": "layer"}, "norm = 'layer'"),
        ((LAYERS["mamba"],), {"mlp": 8}, "mlp = 8"),
        ((LAYERS["mamba"],), {"positions": 8}, "positions = 8"),
        ((LAYERS["mamba-2"],), {"eps": 1e-3}, "eps = 1e-05 and the model 0.001"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(
    layers: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ForeignError, match=message):
        to_transformers(ours(*layers, **options))


if __name__ == "__main__":  # PYTHONPATH=.:tests python -m adapters.test_mamba
    for case, (kind, options) in OPTIONS.items():
        parity.show_errors(case, original(kind, **options))
