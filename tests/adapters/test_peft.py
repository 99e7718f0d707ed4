"""LoRA, Trainer and accelerate's hooks on exported models: what they put in a layer's place is what runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from replaced import linear_layers

from holdall import mixers
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import holdall.adapters.transformers as adapter

WIDTH = 16
TEXTS = ["It is a truth universally acknowledged", "that a single man", "in possession of a good fortune"]


def made(*names: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model in transformers, without a folder."""
    layers = tuple(mixers.entry(name).configure(width=WIDTH) for name in names)
    config = ModelConfig(
        vocab=264, width=WIDTH, layers=layers, mlp=24, mlp_kind="swiglu", norm="rms", tied=False
    )
    ends = dict.fromkeys(("eos_token_id", "pad_token_id"), Bytes().end)
    with seeded(0):
        model = adapter.HoldallForCausalLM(adapter.HoldallConfig(holdall=config.to_dict(), **ends)).to(dtype)
        for block in model.model.blocks:  # a projection that begins with zeros would hide those before it
            for parameter in block.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def adapted(model: Any, **options: Any) -> Any:
    how = {"r": 2, "target_modules": linear_layers(model), "init_lora_weights": False, **options}
    with warnings.catch_warnings(), seeded(1):
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**how))


@pytest.mark.parametrize("name", mixers.names())
@torch.no_grad()
def test_lora_on_each_projection_of_each_mixer_changes_what_it_says(name: str) -> None:
    model = made(name).eval()
    tokens_BT = torch.randint(5, (2, 9), generator=torch.Generator().manual_seed(0))
    before_BTV = model(tokens_BT).logits
    wrapped = adapted(model).eval()
    changes = {name: weight for name, weight in wrapped.named_parameters() if "lora_B" in name}
    assert len(changes) == len(linear_layers(made(name)))
    kept = {name: weight.clone() for name, weight in changes.items()}
    for weight in changes.values():
        weight.zero_()
    torch.testing.assert_close(wrapped(tokens_BT).logits, before_BTV)
    for layer, weight in changes.items():
        weight.copy_(30 * kept[layer])
        assert not torch.allclose(wrapped(tokens_BT).logits, before_BTV), layer
        weight.zero_()
    for layer, weight in changes.items():
        weight.copy_(kept[layer])
    alone_BTV = wrapped(tokens_BT).logits
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(tokens_BT).logits, alone_BTV)


def test_lora_is_trained_saved_and_generates(tmp_path: Path) -> None:
    names = ("base-conv", "taylor", "mamba")
    wrapped = adapted(made(*names), task_type="CAUSAL_LM", init_lora_weights=True)
    tokens_BT = torch.tensor([list(TEXTS[0].encode())])
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = wrapped(tokens_BT, labels=tokens_BT).loss
        loss.backward()
        trained = [name for name, p in wrapped.named_parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert trained
    assert all("lora" in name for name in trained)
    wrapped.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(made(*names), tmp_path).eval()
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    text_BT = wrapped.generate(input_ids=tokens_BT, **how)
    assert torch.equal(again.generate(input_ids=tokens_BT, **how), text_BT)
    for at in range(tokens_BT.shape[1], text_BT.shape[1]):  # with a cache as without
        assert int(wrapped(text_BT[:, :at], use_cache=False).logits[0, -1].argmax()) == int(text_BT[0, at])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_trains(checkpointing: bool, tmp_path: Path) -> None:
    """On texts of unequal lengths, with gradient accumulation, with and without checkpointing: the same."""
    rows = [{"input_ids": list(text.encode())} for text in TEXTS * 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from holdall.language_model import LanguageModel

        model = made("taylor", "sliding-window", dtype=torch.float32)
        tokenizer = adapter.tokenizer_of(LanguageModel(model.model, Bytes()))
        how = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=3, use_cpu=True,
            gradient_accumulation_steps=2, learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1,
            report_to=[], save_strategy="no", gradient_checkpointing=checkpointing, disable_tqdm=True, seed=0,
        )  # fmt: skip
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = transformers.Trainer(model=model, args=how, train_dataset=rows, data_collator=collator)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.8 * losses[0]
        trainer.save_model(tmp_path / "out")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens_BT = torch.tensor([rows[0]["input_ids"]])
    torch.testing.assert_close(again.eval()(tokens_BT).logits, model.eval()(tokens_BT).logits)


@torch.no_grad()
def test_layers_that_accelerate_dispatches_run(tmp_path: Path) -> None:
    model = made("base-conv", "taylor", "gla", "mamba", dtype=torch.float32).eval()
    tokens_BT = torch.tensor([list(TEXTS[1].encode())])
    want_BTV = model(tokens_BT).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        placed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
        torch.testing.assert_close(placed(tokens_BT).logits, want_BTV)
        accelerate.cpu_offload(placed, torch.device("cpu"))  # weights come when a layer is called, and go
    assert placed.model.blocks[0].mixer.projection.weight.device.type == "meta"
    torch.testing.assert_close(placed(tokens_BT).logits, want_BTV)
