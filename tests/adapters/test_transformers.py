"""Holdall's models in transformers: what generate, pipelines and Trainer do there is what Holdall does.

Greedy text is held to the slow generator, token by token in fp64; logits with a cache to those of the whole.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_docs import blocks
from torch import Tensor

from holdall import cli, mixers
from holdall.adapters import foreign
from holdall.contract import StateError
from holdall.engine import Request, Sampling, slow
from holdall.files import RunError
from holdall.language_model import LanguageModel
from holdall.mixers.rwkv_7 import RWKV7Config
from holdall.model import ModelConfig, seeded
from holdall.text.tokenizers import Bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers: ModuleType = pytest.importorskip("transformers", reason="transformers is not installed")
    import holdall.adapters.transformers as adapter

VOCAB, WIDTH = Bytes().vocab + 7, 16
HYBRID = ("base-conv", "taylor", "sliding-window", "mamba")


def language_model(*names: str, dtype: torch.dtype = torch.float64, **options: Any) -> LanguageModel:
    """A tiny model in which what was read matters."""
    layers = tuple(mixers.entry(name).configure(width=WIDTH) for name in names)
    config = ModelConfig(vocab=VOCAB, width=WIDTH, layers=layers, mlp=24, mlp_kind="swiglu", **options)
    with seeded(0):
        model = config.build()
    for block in model.blocks:
        for parameter in block.parameters():
            parameter.data.mul_(2)
    model.embed.weight.data.mul_(20)
    return LanguageModel(model.to(dtype).eval(), Bytes())


def opened(made: LanguageModel, folder: Path, **how: Any) -> Any:
    """The same model, out to a folder and into transformers."""
    adapter.export(made, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how).eval()


def ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(Bytes().end, (length,), generator=draw).tolist() for length in lengths]


def greedy(made: LanguageModel, prompt: list[int], new: int) -> list[int]:
    """What the definition of generation writes."""
    asked = Sampling(max_tokens=new, temperature=0, ignore_end=True)
    request = Request(prompt=tuple(prompt), sampling=asked)
    return [
        token.id for piece in slow.generate(made.model, made.tokenizer, request) for token in piece.tokens
    ]


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    rows = [[Bytes().end] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def written(model: Any, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """Greedy text of a batch; only Holdall's tokenizer's ids may be drawn, as its own generators have it."""
    shown = padded(prompts)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": Bytes().end, **options}
    beyond = list(range(Bytes().vocab, VOCAB))
    out = model.generate(**shown, max_new_tokens=new, suppress_tokens=beyond, **options)
    return out[:, shown["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any]:
    made = language_model(*HYBRID, positions=64)
    return made, opened(made, tmp_path_factory.mktemp("hybrid") / "out")


@pytest.mark.parametrize("name", mixers.names())
@torch.no_grad()
def test_every_mixer(name: str, tmp_path: Path) -> None:
    """With a cache as without, one row or several of unequal lengths, and as Holdall generates."""
    made = language_model(name)
    model = opened(made, tmp_path / "out")
    for own, there in zip(made.model.state_dict().values(), model.model.state_dict().values(), strict=True):
        assert torch.equal(own, there)
    prompts = ids(9, 4)
    tokens_BT = torch.tensor([prompts[0]])
    want_BTV = made.model(tokens_BT)[0]
    near = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(model(tokens_BT, use_cache=False).logits, want_BTV, **near)
    if mixers.entry(name).causal:
        cache, logits = None, []
        for piece_BT in tokens_BT.split([4, 1, 4], dim=1):
            result = model(piece_BT, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            logits.append(result.logits)
        assert cache.get_seq_length() == 9
        torch.testing.assert_close(torch.cat(logits, dim=1), want_BTV, **near)
    if name == "linformer":  # each of whose calls is bidirectional
        with pytest.raises(ValueError, match="cannot read a text in pieces"):
            greedy(made, prompts[0], 5)
        return
    assert written(model, prompts, 5) == [greedy(made, prompt, 5) for prompt in prompts]


def test_greedy_is_recomputing_everything(hybrid: tuple[LanguageModel, Any]) -> None:
    made, model = hybrid
    prompts = ids(9, 1, 9, 17)
    want = [greedy(made, prompt, 12) for prompt in prompts]
    assert written(model, prompts, 12) == want
    assert written(model, prompts, 12, use_cache=False) == want
    assert written(model, prompts, 12, prefill_chunk_size=4) == want


def test_beams_and_samples_are_the_same_with_a_cache_and_without(hybrid: tuple[LanguageModel, Any]) -> None:
    _, model = hybrid
    prompts = ids(7, 3)
    for options in (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    ):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(written(model, prompts, 9, use_cache=use_cache, **options))
        assert texts[0] == texts[1]
        assert len(texts[0]) == 2 * options["num_return_sequences"]


def test_a_returned_cache_is_resumed_and_reads_only_what_is_new(hybrid: tuple[LanguageModel, Any]) -> None:
    made, model = hybrid
    (prompt,) = ids(11)
    how = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 256,
        "suppress_tokens": list(range(257, VOCAB)),
    }
    first = model.generate(torch.tensor([prompt]), max_new_tokens=4, return_dict_in_generate=True, **how)
    longer_BT = torch.cat((first.sequences, torch.tensor([[5, 6, 7]])), dim=1)
    read: list[int] = []
    hidden = model.model.hidden
    model.model.hidden = lambda tokens_BT, *args, **options: (
        read.append(tokens_BT.shape[1]) or hidden(tokens_BT, *args, **options)  # type: ignore[func-returns-value]
    )
    try:
        second = model.generate(longer_BT, past_key_values=first.past_key_values, max_new_tokens=5, **how)
    finally:
        del model.model.hidden
    assert read == [4, 1, 1, 1, 1]  # the last token of before, and three more
    assert second[0, longer_BT.shape[1] :].tolist() == greedy(made, longer_BT[0].tolist(), 5)


@torch.no_grad()
def test_masks_say_where_rows_begin_and_end(hybrid: tuple[LanguageModel, Any]) -> None:
    made, model = hybrid
    prompts = ids(3, 6, 3)
    shown = padded(prompts)
    logits_BTV = model(**shown).logits
    for row, prompt in enumerate(prompts):
        want_TV = made.model(torch.tensor([prompt]))[0][0]
        torch.testing.assert_close(logits_BTV[row, 6 - len(prompt) :], want_TV)
    flipped = {name: tensor.flip(1) for name, tensor in shown.items()}  # padded on the right
    result = model(**flipped)
    assert result.past_key_values is None
    want_TV = made.model(flipped["input_ids"][:1])[0][0]
    torch.testing.assert_close(result.logits[0, :3], want_TV[:3])
    with pytest.raises(ValueError, match="pad on the left"):
        model(**flipped, use_cache=True)
    holes = torch.tensor([[1, 0, 1]])
    with pytest.raises(ValueError, match="in one piece"):
        model(torch.tensor([[1, 2, 3]]), attention_mask=holes)


def test_what_models_with_states_cannot_do_is_refused_by_name(hybrid: tuple[LanguageModel, Any]) -> None:
    _, model = hybrid
    tokens_BT = torch.tensor([[1, 2, 3]])
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=name):
            model(tokens_BT, **{name: True})
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, WIDTH))
    with pytest.raises(ValueError, match="DynamicCache"):
        model(tokens_BT, past_key_values=transformers.DynamicCache())
    cache = model(tokens_BT, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="take tokens back"):
        cache.crop(1)
    with pytest.raises(StateError, match="2 rows"):
        model(torch.tensor([[1], [2]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"(?i)assisted"):
        model.generate(tokens_BT, assistant_model=model, max_new_tokens=2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_keeps_every_bit(tied: bool, tmp_path: Path) -> None:
    made = language_model(*HYBRID, dtype=torch.float32, tied=tied, norm="rms")
    model = opened(made, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "b")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
        tokenizer.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        back = foreign.load(tmp_path / folder)
        assert back.config == made.config
        assert back.fingerprint == made.fingerprint
        assert back.generate("and", max_tokens=7) == made.generate("and", max_tokens=7)
    with pytest.raises(RunError, match="Choose another folder"):
        adapter.export(made, tmp_path / "a")


def test_an_export_in_bf16(tmp_path: Path) -> None:
    made = language_model(*HYBRID, dtype=torch.float32)
    adapter.export(made, tmp_path / "a", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto").eval()
    assert model.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    text = written(model, ids(5, 3), 4)
    assert [len(row) for row in text] == [4, 4]


def test_a_text_begins_as_in_holdall(tmp_path: Path) -> None:
    """The tokenizer puts the end of a document in front, and a pipeline gives Holdall's text."""
    made = language_model(*HYBRID, dtype=torch.float32)
    model = opened(made, tmp_path / "a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer("héllo").input_ids == [256, *"héllo".encode()]
    assert tokenizer.decode(tokenizer("héllo").input_ids, skip_special_tokens=True) == "héllo"
    assert tokenizer.padding_side == "left"
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["It is", "a", "and so it was"]
    model.generation_config.suppress_tokens = list(range(257, VOCAB))
    how = {"do_sample": False, "max_new_tokens": 6, "return_full_text": False, "batch_size": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = [one[0]["generated_text"] for one in pipe(texts, **how)]
    want = [made.tokenizer.decode(greedy(made, [256, *text.encode()], 6)) for text in texts]
    assert got == want


def test_embeddings_are_resized(tmp_path: Path) -> None:
    for tied in (True, False):
        made = language_model(*HYBRID, dtype=torch.float32, tied=tied)
        model = opened(made, tmp_path / f"a{tied}")
        tokens_BT = torch.tensor(ids(5))
        before = model(tokens_BT).logits
        model.resize_token_embeddings(VOCAB + 9)
        after = model(tokens_BT).logits
        assert after.shape[-1] == VOCAB + 9 == model.config.vocab_size
        torch.testing.assert_close(after[..., :VOCAB], before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(tmp_path / f"b{tied}")
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"b{tied}").eval()
        assert torch.equal(again(tokens_BT).logits, after)


def sharing() -> LanguageModel:
    """Whose later layers read the values of the first."""
    layers = tuple(RWKV7Config(width=WIDTH, value_rank=3) for _ in range(3))
    with seeded(0):
        model = ModelConfig(vocab=VOCAB, width=WIDTH, layers=layers).build().double()
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return LanguageModel(model.eval(), Bytes())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [lambda: language_model(*HYBRID), sharing], ids=["hybrid", "sharing"])
def test_checkpointed_gradients_are_the_same(make: Any, reentrant: bool, tmp_path: Path) -> None:
    model = opened(make(), tmp_path / "a").train()
    tokens_BT = torch.tensor(ids(12, 12))
    calls = []
    model.model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        calls.clear()
        model(tokens_BT, labels=tokens_BT).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    assert len(calls) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that transformers will call it otherwise
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = gradients()
    assert len(calls) == 2  # forward, and once more on the way back
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_is_that_of_the_next_token(hybrid: tuple[LanguageModel, Any]) -> None:
    made, model = hybrid
    tokens_BT = torch.tensor(ids(8, 8))
    labels_BT = tokens_BT.clone()
    labels_BT[0, :4] = -100
    loss = model(tokens_BT, labels=labels_BT).loss
    logits_BTV = made.model(tokens_BT)[0]
    want = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss.float(), want)
    assert copy.deepcopy(model)(tokens_BT, logits_to_keep=2).logits.shape[1] == 2


def test_the_config_says_what_programs_ask_for(hybrid: tuple[LanguageModel, Any], tmp_path: Path) -> None:
    made, model = hybrid
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (VOCAB, WIDTH, 4)
    assert config.max_position_embeddings == 64
    config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.model_config == made.config
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "holdall"


def test_the_command_writes_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["holdall", "export", "based-mini", "--out", str(tmp_path / "out"), "--precision", "bf16"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.dtype, model.config.hidden_size) == (torch.bfloat16, 128)


def test_the_page_s_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs" / "interop.md"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile("".join(blocks(page, "python")), page.name, "exec"), {})
    assert "It is a truth" in capsys.readouterr().out
