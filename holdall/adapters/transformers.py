"""Holdall's models in the transformers library: generate, pipelines, Trainer, PEFT, lm-eval's HFLM.

    import holdall.adapters.transformers                                # registers the kind of model
    holdall.adapters.transformers.export(holdall.load(), "folder")      # or `holdall export`
    model = transformers.AutoModelForCausalLM.from_pretrained("folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained("folder")

A model's states are its cache: one value that is carried, whatever its mixers, so that beams and batches
select its rows. No mixer needs a mask. That of a batch of unequal prompts says where each row's text begins;
rows that begin together are read together, and their states joined.

The folder holds config.json with Holdall's own config under "holdall", the weights by Holdall's names behind
"model.", and the tokenizer; `holdall.load` reads it too.

Letters: B rows, T new tokens, V vocabulary, Q positions whose logits are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from holdall import checkpoints, files
from holdall.adapters.exported import MODEL_TYPE, PREFIX
from holdall.adapters.mamba import to_transformers
from holdall.adapters.reading import ForeignError
from holdall.contract import State, join_rows, map_state, select_rows
from holdall.language_model import TOKENIZER, LanguageModel
from holdall.model import Model, ModelConfig
from holdall.precision import choose_forms
from holdall.text.tokenizers import END, Tokenizer

ANY_LENGTH = 1 << 20
"""What programs that ask for the longest context are told of a model that has none."""


class HoldallConfig(PreTrainedConfig):
    """A ModelConfig as a dictionary, under the name that config.json has it by."""

    model_type = MODEL_TYPE

    def __init__(self, holdall: dict[str, Any] | None = None, **rest: Any) -> None:
        self.holdall = holdall or {}
        config = self.model_config if self.holdall else None
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            rest.pop(name, None)  # the model's own config says them
        self.vocab_size = config.vocab if config else 0
        self.hidden_size = config.width if config else 0
        self.num_hidden_layers = len(config.layers) if config else 0
        self.max_position_embeddings = (config.positions if config else 0) or ANY_LENGTH
        # one parameter serves both ends of a tied model, so that there is nothing to tie
        rest["tie_word_embeddings"] = False
        super().__init__(**rest)

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.checked(self.holdall, f"{MODEL_TYPE} in config.json")


class HoldallCache(Cache):
    """The states of a model, as what transformers calls its cache.

    Attributes:
        states: of all rows; None if nothing was read.
        length: positions of the batch that were read, padding included.
    """

    def __init__(self, states: list[State] | None = None, length: int = 0) -> None:
        super().__init__(layers=[])
        self.states, self.length = states, length

    def _change(self, function: Callable[[State], State]) -> None:
        if self.states is not None:
            self.states = [function(state) for state in self.states]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda state: select_rows(state, beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda state: select_rows(state, indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda state: map_state(state, lambda tensor: tensor.repeat_interleave(repeats, dim=0)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a Holdall cache cannot take tokens back here; generate without an assistant, or drafts by "
                "Holdall's own engine (docs/replay.md)"
            )

    def reset(self) -> None:
        self.states, self.length = None, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.states is None else len(self.states[0][0])

    @property
    def is_initialized(self) -> bool:
        return self.states is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    def __repr__(self) -> str:
        return f"HoldallCache({self.batch_size} rows, {self.length} positions)"


class HoldallForCausalLM(PreTrainedModel, GenerationMixin):
    """Holdall's model behind the calls of the transformers library."""

    config_class = HoldallConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _is_stateful = True  # a cache cannot be cropped: assisted decoding is refused by name
    _no_split_modules = ["Block"]  # noqa: RUF012 - as the base class has it

    def __init__(self, config: HoldallConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.model: Model = config.model_config.build()
        self._formed: tuple[torch.device, torch.dtype] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a model initialises itself when it is built."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **how: Any
    ) -> None:
        """A cache from the beginning, so that a prompt can be read in chunks."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **how)  # type: ignore[misc]
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HoldallCache()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, unless it is the embedding."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **how: Any) -> nn.Embedding:
        embed = super().resize_token_embeddings(*args, **how)
        self.model.config = dataclasses.replace(self.model.config, vocab=embed.num_embeddings)
        self.config.holdall = self.model.config.to_dict()
        return embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The logits of new tokens, and the cache after them.

        Args:
            input_ids: the next T tokens of each row, (B, T).
            attention_mask: (B, T), or with the positions of the cache before them: 0 where a row has no text.
                Rows may begin late. They may also end early, where no cache is wanted.
            past_key_values: what an earlier call gave, which is changed in place.
            labels: (B, T), -100 where there is none; the loss is that of the token before each.
            use_cache: by default where nothing is trained and no row ends early.
            logits_to_keep: how many of the last logits, or which; 0 for all.
            others: of the loss, such as num_items_in_batch.

        Raises ValueError, naming what a model with states cannot do.
        """
        for name in ("output_attentions", "output_hidden_states", "inputs_embeds", "position_ids"):
            given = others.pop(name, None)
            if given is not None and given is not False:
                raise ValueError(
                    f"{name} is not supported: a Holdall model reads input_ids, one after another"
                )
        if input_ids is None:
            raise ValueError("input_ids are missing")
        if past_key_values is not None and not isinstance(past_key_values, HoldallCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, where a Holdall model needs the "
                "HoldallCache that it returned, or None"
            )
        self._choose_forms()
        starts_B, ends_early = _starts(attention_mask, input_ids)
        if use_cache is None:
            use_cache = not (self.training or torch.is_grad_enabled() or ends_early) or (
                past_key_values is not None
            )
        if use_cache and ends_early:
            raise ValueError(
                "some rows end before others do, so that no cache can be continued: pad on the left "
                "(tokenizer.padding_side = 'left'), or pass use_cache=False"
            )
        h_BTD, states = self._hidden(input_ids, starts_B, past_key_values, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BQV = self.model.logits(self._beside_head(h_BTD[:, keep]))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BQV, labels=labels, vocab_size=logits_BQV.shape[-1], **others
            )
        cache = None
        if states is not None:
            cache = HoldallCache() if past_key_values is None else past_key_values
            cache.states, cache.length = states, cache.length + input_ids.shape[1]
        if return_dict is False or (return_dict is None and self.config.return_dict is False):
            return tuple(part for part in (loss, logits_BQV, cache) if part is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BQV, past_key_values=cache)

    def _hidden(
        self, tokens_BT: Tensor, starts_B: list[int], cache: HoldallCache | None, want_states: bool
    ) -> tuple[Tensor, list[State] | None]:
        """What the head reads, zeros before a row begins, and the states."""
        before = None if cache is None else cache.states
        inplace = want_states and before is not None and not torch.is_grad_enabled()
        read = functools.partial(self.model.hidden, want_states=want_states, run=self._run())
        length, groups = tokens_BT.shape[1], sorted(set(starts_B))
        if groups == [0]:
            return read(tokens_BT, before, inplace=inplace)
        rows, hiddens, parts = list[int](), list[Tensor](), list[list[State]]()
        for start in groups:
            group = [row for row, first in enumerate(starts_B) if first == start]
            rows += group
            own = None if before is None else [select_rows(state, group) for state in before]
            after: list[State] | None
            if start == length:  # nothing of these rows was read yet
                after = own or self.model.init_states(len(group), device=tokens_BT.device)
                h_GTD = self.model.norm.weight.new_zeros(len(group), 0, self.model.config.width)
            else:
                h_GTD, after = read(tokens_BT[group, start:], own)
            hiddens.append(nn.functional.pad(h_GTD, (0, 0, start, 0)))
            parts.append(after or [])
        order = torch.tensor(rows).argsort()
        h_BTD = torch.cat(hiddens)[order.to(tokens_BT.device)]
        if not want_states:
            return h_BTD, None
        return h_BTD, [select_rows(join_rows(of_layer), order) for of_layer in zip(*parts, strict=True)]

    def _beside_head(self, h_BQD: Tensor) -> Tensor:
        """What a tied head reads, on the device of the embedding, which need not be the last block's."""
        device = self.model.embed.weight.device
        if self.model.head is not None or device == h_BQD.device:
            return h_BQD
        if device.type == "meta":
            raise ValueError(
                "the embedding is the head too, so it cannot be offloaded: place model.embed on a device"
            )
        return h_BQD.to(device)

    def _run(self) -> Callable[..., Any] | None:
        """What calls a block: by itself, or again in the backward pass."""
        if not (self.gradient_checkpointing and self.training):
            return None

        def run(block: nn.Module, r: Tensor, state: State | None, **options: Any) -> Any:
            shared_BTD = options.pop("shared_BTD", None)  # has a gradient, so it must be an argument

            def again(r: Tensor, state: State | None, shared_BTD: Tensor | None) -> Any:
                return block(r, state, shared_BTD=shared_BTD, **options)

            return self._gradient_checkpointing_func(again, r, state, shared_BTD)

        return run

    def _choose_forms(self) -> None:
        """Loading puts weights into modules without a word to them; forms depend on device and dtype."""
        now = self.model.device, self.model.block_dtype
        if self._formed != now:
            self._formed = now
            choose_forms(self.model, now[1])


def _starts(mask: Tensor | None, tokens_BT: Tensor) -> tuple[list[int], bool]:
    """Where each row's text begins within these tokens, and whether one ends before they do."""
    rows, length = tokens_BT.shape
    if mask is None:
        return [0] * rows, False
    if mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, where ({rows}, at least {length}) is needed"
        )
    there_BT = mask[:, -length:].bool()
    if bool(there_BT.all()):
        return [0] * rows, False
    count_B = there_BT.sum(1)
    first_B = torch.where(count_B > 0, there_BT.int().argmax(1), length)
    end_B = first_B + count_B
    within_BT = torch.arange(length, device=mask.device) >= first_B[:, None]
    if not bool(
        (there_BT == (within_BT & (torch.arange(length, device=mask.device) < end_B[:, None]))).all()
    ):
        raise ValueError("attention_mask has zeros between tokens; a row's text must be in one piece")
    return first_B.tolist(), bool((end_B < length).any())


# ------------------------------------------------------------------------------------------- export


def export(
    model: LanguageModel,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    layout: Literal["auto", "transformers", "holdall"] = "auto",
) -> None:
    """Write a folder that the transformers library opens.

    Args:
        folder: is made, or is there and empty.
        dtype: of the weights; as they are by default.
        layout: "transformers" is the library's own, which every program knows, for models of Mamba or of
            Mamba-2 alone; "holdall" opens once holdall.adapters.transformers is imported; "auto" takes the
            first where it can.

    Raises RunError if the folder holds anything, or the layout cannot hold the model.
    """
    native = _native(model, layout)
    ends = _ends(model.tokenizer)
    stored = dtype or model.model.embed.weight.dtype
    config: Any
    if native is None:
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in model.model.state_dict().items()}
        config = HoldallConfig(
            holdall=model.config.to_dict(), architectures=[HoldallForCausalLM.__name__], dtype=stored, **ends
        )
    else:
        fields, tensors = native
        # by its name: a package may have registered a class of its own for this kind of model, as fla does
        kind = getattr(transformers, fields["architectures"][0]).config_class
        config = kind(**fields | ends | {"dtype": stored})
    weights = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    with files.new_folder(Path(folder), "Choose another folder, or remove it first.") as made:
        checkpoints.write(made / "model.safetensors", weights, {"format": "pt"})
        config.save_pretrained(made)
        GenerationConfig(**ends).save_pretrained(made)
        wrapped = tokenizer_of(model)
        wrapped.save_pretrained(made)
        files.write_atomically(made / TOKENIZER, _begun(model.tokenizer, wrapped.backend_tokenizer))


def _native(model: LanguageModel, layout: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The model in the library's own layout; None for Holdall's."""
    if layout == "holdall":
        return None
    try:
        return to_transformers(model.model)
    except ForeignError:
        if layout == "transformers":
            raise
        return None


def _ends(tokenizer: Tokenizer) -> dict[str, int]:
    end = tokenizer.end
    return {"bos_token_id": tokenizer.begin, "eos_token_id": end, "pad_token_id": end}


def tokenizer_of(model: LanguageModel) -> PreTrainedTokenizerFast:
    """The tokenizer as the transformers library has it, with the same ids.

    A text begins behind the token that begins a document, as in training and in `LanguageModel.generate`;
    batches are padded on the left. The name of a special token in a text is that token, as is usual there.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    library, end = Library.from_str(model.tokenizer.to_json().decode()), model.tokenizer.end
    word, first = (library.id_to_token(one) for one in (end, model.tokenizer.begin))
    if word is None or first is None:
        raise ValueError(
            f"the tokenizer {model.tokenizer.name} has no token for the end of a document, to which "
            f"Holdall gave the id {end}: add {END} with that id to its file"
        )
    own = [library.post_processor] if library.post_processor is not None else []
    begin = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, model.tokenizer.begin)]
    )
    # of what files have here, only that of byte-level ones adds no tokens
    own = [processor for processor in own if isinstance(processor, processors.ByteLevel)]
    library.post_processor = processors.Sequence([*own, begin]) if own else begin
    return PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token=first, eos_token=word, pad_token=word, padding_side="left",
        model_max_length=model.config.positions or ANY_LENGTH, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _begun(tokenizer: Tokenizer, library: Any) -> bytes:
    """A tokenizer's own file, but that a text begins as the library's copy of it has it."""
    parsed = files.loads(tokenizer.to_json())
    parsed["post_processor"] = files.loads(library.to_str())["post_processor"]
    return (json.dumps(parsed, indent=1, ensure_ascii=False) + "\n").encode()


AutoConfig.register(MODEL_TYPE, HoldallConfig, exist_ok=True)
AutoModelForCausalLM.register(HoldallConfig, HoldallForCausalLM, exist_ok=True)
