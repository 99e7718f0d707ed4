"""A folder of another program as a language model: loaded, converted, its documents begun and ended."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import holdall
from holdall.adapters import foreign
from holdall.adapters.reading import ForeignError
from holdall.commands import convert as command
from holdall.files import RunError
from holdall.text.tokenizers import Filed, TextError, from_model_folder

library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers", reason="transformers is not installed")
        import transformers.models.gemma.modeling_gemma
        import transformers.models.llama.modeling_llama  # noqa: F401 - makes the submodules known
    return module


def tokenizer_file(special: tuple[str, ...] = ("<s>", "</s>", "<|eot|>")) -> str:
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=280, special_tokens=list(special), show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["the dog sees that the cat sees the other dog"] * 4, trainer)
    return made.to_str()


@pytest.fixture
def folder(transformers: ModuleType, tmp_path: Path) -> Path:
    """A tiny Llama in bf16, as its library writes it, with a tokenizer."""
    return written(transformers, "Llama", tmp_path / "llama")


def written(transformers: ModuleType, family: str, path: Path) -> Path:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, bos_token_id=0, eos_token_id=[1, 2],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.bfloat16().save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_file())
    return path


def test_it_is_loaded_converted_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    loaded = holdall.load(folder)
    assert (loaded.tokenizer.begin, loaded.tokenizer.end) == (0, 1)
    names: list[tuple[str, int, int]] = []
    foreign.convert(folder, tmp_path / "out", on_take=lambda *each: names.append(each))
    assert len(names) == names[-1][2] == 21
    assert [done for _, done, _ in names] == list(range(21))
    again = holdall.load(tmp_path / "out")
    assert again.config == loaded.config
    assert again.tokenizer.describe() == loaded.tokenizer.describe()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    # in the bytes that it had, since nothing needs more
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 2.5 * loaded.model.parameter_count() + 5000
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    assert again.generate("the dog", **options) == loaded.generate("the dog", **options)
    assert again.score("the dog").nats == pytest.approx(loaded.score("the dog").nats)
    assert holdall.load(folder, dtype="bf16").model.block_dtype == torch.bfloat16


def test_a_document_begins_with_the_token_that_the_config_names(folder: Path) -> None:
    model = holdall.load(folder)
    ids = model.tokenizer.encode_batch(["the dog"])[0].tolist()
    logits, _ = model.model(torch.tensor([[0, *ids[:-1]]]))
    want = logits[0].log_softmax(-1)[range(len(ids)), ids]
    torch.testing.assert_close(model.score("the dog").log_prob_T, want.detach().double())


def test_weights_that_need_more_digits_than_the_file_had_are_kept(
    transformers: ModuleType, tmp_path: Path
) -> None:
    """Gemma's norms multiply by 1 + w, which bf16 does not hold."""
    path = written(transformers, "Gemma", tmp_path / "gemma")
    foreign.convert(path, tmp_path / "out")
    before, after = holdall.load(path).model.state_dict(), holdall.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    foreign.convert(path, tmp_path / "narrow", dtype="bf16")
    narrow = holdall.load(tmp_path / "narrow").model.state_dict()
    assert any(not torch.equal(narrow[name], tensor) for name, tensor in before.items())


def change(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eos_token_id": 999}, "no token with the id 999"),
        ({"bos_token_id": 999}, "no token with the id 999, the begin"),
        ({"bos_token_id": "<s>"}, "bos_token_id = '<s>' is no id"),
        ({"eos_token_id": True}, "eos_token_id = True is no id"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"intermediate_size": 24}, r"mlp\.fc1\.weight has the shape"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder: Path, fields: dict[str, Any], message: str) -> None:
    change(folder, **fields)
    with pytest.raises(ForeignError, match=message):
        holdall.load(folder)


def test_without_names_of_ends_the_tokenizer_s_own_is_taken(folder: Path) -> None:
    change(folder, eos_token_id=None, bos_token_id=None)
    tokenizer = holdall.load(folder).tokenizer
    assert tokenizer.begin == tokenizer.end == 1  # </s>
    assert "begin" not in tokenizer.describe()


def test_a_tokenizer_that_cannot_be_used_is_called_by_its_own_name(folder: Path) -> None:
    file = folder / "tokenizer.json"
    parsed = json.loads(file.read_text())
    file.write_text(json.dumps({**parsed, "model": {**parsed["model"], "type": "Nonsense"}}))
    with pytest.raises(TextError, match=rf"^{file} is not a file that the tokenizers library can use"):
        holdall.load(folder).tokenizer.encode_batch(["the dog"])


def test_a_tokenizer_is_given_or_asked_for(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    (folder / "tokenizer.json").rename(other)
    with pytest.raises(RunError, match="--tokenizer FILE"):
        holdall.load(folder)
    assert holdall.load(folder, tokenizer=other).tokenizer.begin == 0
    assert holdall.load(folder, tokenizer=tmp_path).tokenizer.begin == 0
    with pytest.raises(ValueError, match="has its own tokenizer"):
        holdall.load("based-mini", tokenizer=other)
    with pytest.raises(ValueError, match="has one checkpoint, not 'best'"):
        holdall.load(folder, checkpoint="best")


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    specials = tuple(f"<{i}>" for i in range(60))
    (folder / "tokenizer.json").write_text(tokenizer_file(specials))
    with pytest.raises(ForeignError, match="more than the model's vocab 280"):
        holdall.load(folder)


def test_ends_are_ids_of_tokens_and_survive_a_copy(tmp_path: Path) -> None:
    file = tokenizer_file().encode()
    made = Filed(file, "made", "made.json", end=2, begin=0)
    assert (made.end, made.begin, made.decode([2])) == (2, 0, "<|endoftext|>")
    text = "the </s><|eot|><s> dog"
    assert not {0, 1, 2} & set(made.encode_batch([text])[0].tolist())
    (tmp_path / "tokenizer.json").write_bytes(file)
    again = from_model_folder(tmp_path, made.describe(), "")
    assert (again.end, again.begin) == (2, 0)
    with pytest.raises(TextError, match="was altered"):
        from_model_folder(tmp_path, {**made.describe(), "vocab": 5}, "")
    with pytest.raises(TextError, match="no token with the id 9999"):
        from_model_folder(tmp_path, {**made.describe(), "begin": 9999}, "")


def test_the_command_says_what_it_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.convert(folder, tmp_path / "out", None, None) == 0
    said = capsys.readouterr().out
    assert "2 layers of width 16: 2 attention" in said
    assert f"{holdall.load(folder).model.parameter_count():,} parameters" in said
    assert "of 277 (end 1, begin 0)" in said
    # keys and values of 2 layers of 2 heads of 4, and two counts in int64 in each layer
    size = 2 * (2 * 2 * 4 * 1000 * 2 + 2 * 8)
    assert f"state after 1,000 tokens in bf16: 62.5 KiB ({size:,} bytes)" in said
    with pytest.raises(RunError, match="holds something already"):
        command.convert(folder, tmp_path / "out", None, None)
    with pytest.raises(RunError, match="is no model of another program"):
        command.convert(tmp_path / "out", tmp_path / "more", None, None)
    with pytest.raises(RunError, match="there is no"):
        command.convert(tmp_path / "nothing", tmp_path / "more", None, None)
