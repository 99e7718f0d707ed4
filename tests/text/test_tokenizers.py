"""Tokenizers: what goes in comes out, one end per document, pieces that can be read."""

import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from holdall.text import tokenizers
from holdall.text.sources import TextError
from holdall.text.tokenizers import END, Bytes, Filed, Tokenizer, from_manifest, tokenizer

PROSE = (
    "The quick brown fox, it's said, jumped over 12 lazy dogs.\n\n"
    "The dogs didn't mind; café au lait — fine!\n"
)


def byte_level(*special: str, prefix: bool = False) -> Filed:
    """A small tokenizer of GPT-2's kind."""
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([PROSE] * 4, trainer)
    made.enable_truncation(5)  # as files have it that somebody trained with
    made.enable_padding(length=8)
    return Filed(made.to_str().encode(), "small", "small.json")


GPT_LIKE = byte_level(END)


@pytest.mark.parametrize("each", [Bytes(), GPT_LIKE], ids=["bytes", "file"])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_texts_come_back_from_their_tokens(each: Tokenizer, texts: list[str]) -> None:
    encoded = each.encode_batch(texts)
    assert [each.decode(ids) for ids in encoded] == texts
    for ids in encoded:
        assert ids.dtype == np.uint16
        assert each.end not in ids
        assert len(each.pieces(ids)) == len(ids)


@pytest.mark.parametrize("each", [Bytes(), GPT_LIKE], ids=["bytes", "file"])
def test_ends_are_shown_between_documents(each: Tokenizer) -> None:
    first, second = each.encode_batch(["a dog", "it's"])
    ids = [each.end, *first.tolist(), each.end, *second.tolist(), each.end]
    assert each.decode(ids) == f"{END}a dog{END}it's{END}"
    assert "".join(each.pieces(ids)) == each.decode(ids)


def test_bytes_are_bytes() -> None:
    each = tokenizer("bytes")
    assert (each.vocab, each.end) == (257, 256)
    (ids,) = each.encode_batch(["aé\n"])
    assert ids.tolist() == [97, 0xC3, 0xA9, 10]
    assert each.pieces(ids) == ["a", "\\xc3", "\\xa9", "\n"]
    assert each.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_pieces_of_a_byte_level_file_are_text_or_say_their_bytes() -> None:
    (ids,) = GPT_LIKE.encode_batch([" dogs — 12"])
    pieces = GPT_LIKE.pieces(ids)
    assert len(pieces) < 10
    assert "".join(pieces).encode("latin-1", "replace").startswith(b" dogs ")
    (ids,) = GPT_LIKE.encode_batch(["🦊"])
    assert GPT_LIKE.pieces(ids) == ["\\xf0", "\\x9f", "\\xa6", "\\x8a"]
    assert GPT_LIKE.pieces([GPT_LIKE.end, 0]) == [END, END]
    assert Filed(GPT_LIKE.file, "x", "x").pieces([9999]) == ["<9999>"]


def test_a_text_that_mentions_a_special_token_is_text() -> None:
    (ids,) = GPT_LIKE.encode_batch([f"the token {END} ends"])
    assert GPT_LIKE.end == 0
    assert 0 not in ids
    assert GPT_LIKE.decode(ids) == f"the token {END} ends"


NAMES = (*tokenizers.ENDS, "<pad>", "[CLS]", "[MASK]")
LETTERS = sorted({*"the ship left at noon", *"".join(NAMES), *"\0#T▁"})


def bpe(names: Sequence[str], byte_level: bool, whole: bool) -> library.Tokenizer:
    """A tokenizer whose merges make every name, or which looks up whole words first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else LETTERS
    pieces = dict.fromkeys(["<unk>", *alphabet])
    merges = []
    for name in names:
        for end in range(1, len(name)):
            merges.append((name[:end], name[end]))
            pieces |= {name[: end + 1]: None}
    model = models.BPE(
        {each: i for i, each in enumerate(pieces)}, list(dict.fromkeys(merges)), unk_token="<unk>"
    )
    model.ignore_merges = whole
    made = library.Tokenizer(model)
    if byte_level:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not whole)
        made.decoder = decoders.ByteLevel()
    return made


def word_level(names: Sequence[str]) -> library.Tokenizer:
    words = {each: i for i, each in enumerate(["[UNK]", *names, "the", "ship", "left"])}
    made = library.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.normalizer = normalizers.NFKC()
    return made


def word_piece(names: Sequence[str]) -> library.Tokenizer:
    words = ["[UNK]", *names, *LETTERS, *(f"##{each}" for each in LETTERS)]
    made = library.Tokenizer(models.WordPiece({each: i for i, each in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def unigram(names: Sequence[str]) -> library.Tokenizer:
    words = [*((name, 0.0) for name in names), ("<unk>", 0.0), *((each, -3.0) for each in LETTERS)]
    made = library.Tokenizer(models.Unigram(words, unk_id=len(names)))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


KINDS: dict[str, Callable[[Sequence[str]], library.Tokenizer]] = {
    "BPE of bytes": lambda names: bpe(names, byte_level=True, whole=False),
    "BPE of bytes, words first": lambda names: bpe(names, byte_level=True, whole=True),
    "BPE of letters": lambda names: bpe(names, byte_level=False, whole=False),
    "WordLevel": word_level,
    "WordPiece": word_piece,
    "Unigram": unigram,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marked", [None, False, True], ids=["in the vocabulary", "added", "special"])
@given(st.data())
def test_no_text_makes_a_special_token(kind: str, marked: bool | None, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    made = KINDS[kind](names)
    if marked is not None:
        made.add_tokens([library.AddedToken(name, special=marked, normalized=False) for name in names])
    each = Filed(made.to_str().encode(), "made", "made.json")
    ends = [name for name in tokenizers.ENDS if name in names]
    assert each.end == (made.token_to_id(ends[0]) if ends else made.get_vocab_size())
    never = {each.end, *(made.token_to_id(name) for name in (names if marked else ()))}
    part = st.sampled_from(
        [*names, *(f"\0{name}\0" for name in names), "the", " ", "ship ", " <", "＜/s＞", "\n"]
    )
    text = "".join(data.draw(st.lists(part, max_size=9)))
    (ids,) = each.encode_batch([text])
    assert not never & set(ids.tolist())
    assert each.end not in ids
    if kind.startswith("BPE of bytes"):
        assert each.decode(ids) == text
    plain = " ".join(word for word in text.split() if word in ("the", "ship"))
    assert each.encode_batch([plain])[0].tolist() == made.encode(plain, add_special_tokens=False).ids


def test_what_is_unknown_does_not_end_a_document() -> None:
    made = library.Tokenizer(models.WordLevel({"</s>": 0, "the": 1}, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    each = Filed(made.to_str().encode(), "made", "made.json")
    assert each.end == 2
    assert each.encode_batch(["the ship </s> the"])[0].tolist() == [1, 0, 0, 1]


def test_chance_has_no_part_in_tokens() -> None:
    lucky = json.loads(GPT_LIKE.file)
    lucky["model"]["dropout"] = 0.5
    each = Filed(json.dumps(lucky).encode(), "lucky", "lucky.json")
    assert each.encode_batch([PROSE])[0].tolist() == GPT_LIKE.encode_batch([PROSE])[0].tolist()


@given(st.data())
def test_added_tokens_of_spaces_lie_across_no_cut(data: st.DataObject) -> None:
    """GPT-NeoX has tokens of two and more spaces that are found before a text is split."""
    made = library.Tokenizer.from_str(GPT_LIKE.file.decode())
    added = data.draw(st.sampled_from(["  ", "   ", "x y", "y\n", "\n\n"]))
    rstrip = data.draw(st.booleans())
    made.add_tokens([library.AddedToken(added, rstrip=rstrip, normalized=False)])
    each = Filed(made.to_str().encode(), "spaces", "spaces.json")
    text = "".join(data.draw(st.lists(st.sampled_from(["x", "y", " ", "  ", "\n", added]), max_size=20)))
    with pytest.MonkeyPatch.context() as patch:
        whole = each.encode_batch([text])[0].tolist()
        patch.setattr(tokenizers, "CUT", 1)
        assert each.encode_batch([text])[0].tolist() == whole


@pytest.mark.parametrize(
    "each", [Bytes(), GPT_LIKE, byte_level(END, prefix=True)], ids=["bytes", "gpt", "prefix"]
)
@given(text=st.text(st.sampled_from("aé🦊 \n\u00a0\u3000.'s1")), start=st.integers(1, 20))
def test_a_cut_lies_between_letters_and_changes_no_token(each: Tokenizer, text: str, start: int) -> None:
    data = text.encode()
    place = each.cut(data, start)
    assert start <= place or place == len(data)
    parts = each.encode_batch([data[:place].decode(), data[place:].decode()] if data[place:] else [text])
    assert np.concatenate(parts).tolist() == each.encode_batch([text])[0].tolist()


def test_a_file_without_an_end_gets_one_behind_its_last_token() -> None:
    each = byte_level()
    assert each.end == each.vocab - 1 == library.Tokenizer.from_str(each.file.decode()).get_vocab_size()
    assert each.decode([each.end]) == END
    assert byte_level("<pad>", "</s>").end == 1


def test_long_texts_are_cut_where_no_token_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        PROSE * 5 + "  two   spaces \n x\n\n\n y 1 2 3 a1 b2\u3000 \u00a0 \x1c é \u0301" * 9 + "unbroken" * 30
    )
    for each in (GPT_LIKE, byte_level(END, prefix=True)):
        whole = each.encode_batch([text, "", PROSE])
        assert len(list(each._parts(text))) == 1
        for size in (1, 2, 7, 50):
            monkeypatch.setattr(tokenizers, "CUT", size)
            assert len(list(each._parts(text))) > 5
            for a, b in zip(each.encode_batch([text, "", PROSE]), whole, strict=True):
                assert a.tolist() == b.tolist()
        monkeypatch.undo()


def test_a_tokenizer_that_minds_the_edges_of_a_text_is_not_given_more_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_edges = json.loads(GPT_LIKE.file)
    at_edges["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    strips = Filed(json.dumps(at_edges).encode(), "strips", "strips.json")
    unsplit = json.loads(GPT_LIKE.file)
    unsplit["pre_tokenizer"]["use_regex"] = False
    for merged in (("n", "Ġ"), ("nĠ", "f"), ("x", "Ġ")):  # tokens across the space that a letter follows
        unsplit["model"]["vocab"]["".join(merged)] = len(unsplit["model"]["vocab"])
        unsplit["model"]["merges"].insert(0, list(merged))
    whole_words = Filed(json.dumps(unsplit).encode(), "unsplit", "unsplit.json")
    for each in (strips, byte_level(END, prefix=True), whole_words):
        monkeypatch.setattr(tokenizers, "CUT", 1 << 18)
        whole = each.encode_batch([PROSE])[0].tolist()
        monkeypatch.setattr(tokenizers, "CUT", 1)
        assert each.encode_batch([PROSE])[0].tolist() == whole


def test_letters_stand_for_bytes_as_the_library_has_it() -> None:
    letters = tokenizers._bytes_of_letters()
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(letters.values()) == list(range(256))


def test_a_sentencepiece_vocabulary_reads_as_text() -> None:
    words = [("<unk>", 0.0), ("▁dog", -1.0), ("s", -2.0), ("▁", -3.0), ("<0xE2>", -9.0), ("</s>", 0.0)]
    made = library.Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    each = Filed(made.to_str().encode(), "pieces", "pieces.json")
    (ids,) = each.encode_batch(["dogs dog"])
    assert each.pieces(ids) == [" dog", "s", " dog"]
    assert each.pieces([4]) == ["\\xe2"]
    assert (each.vocab, each.end) == (6, 5)


def test_a_large_vocabulary_takes_four_bytes() -> None:
    made = library.Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    each = Filed(made.to_str().encode(), "words", "words.json")
    assert each.encode_batch(["w69999 w1"])[0].tolist() == [69_999, 1]
    assert each.dtype == np.uint32


def test_a_file_or_its_folder_may_be_named_and_the_manifest_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / "mine" / "tokenizer.json"
    path.parent.mkdir()
    path.write_bytes(GPT_LIKE.file)
    for name in (path, path.parent):
        each = tokenizer(str(name))
        assert each.name == "mine"
        again = from_manifest(json.loads(json.dumps(each.describe())), path.parent)
        assert again.describe() == each.describe()
        assert again.encode_batch([PROSE])[0].tolist() == each.encode_batch([PROSE])[0].tolist()


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no tokenizer 'gtp2' and no such file.*--tokenizer path/to"):
        tokenizer("gtp2")
    for text in ("no json", "[]", "{}", '{"model": {"vocab": {}}}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(TextError, match=r"a\.json is not a file of the tokenizers library"):
            tokenizer(str(tmp_path / "a.json"))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    each = byte_level(END)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TextError, match="pip install tokenizers"):
        each.decode([1])


def test_a_published_name_is_looked_up_in_the_cache_and_then_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(GPT_LIKE.file)
    cached = {("gpt2", "tokenizer.json"): str(path)}

    def refuse(repository: str, file: str) -> str:
        raise OSError("no network\nand more")

    hub = types.SimpleNamespace(
        try_to_load_from_cache=lambda repository, file: cached.get((repository, file)), hf_hub_download=refuse
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert tokenizer("gpt2").name == "gpt2"
    with pytest.raises(TextError, match=r"gpt-neox.*\(no network\)\. Give the path of its file"):
        tokenizer("gpt-neox")
    monkeypatch.setattr(hub, "hf_hub_download", lambda repository, file: str(path))
    assert tokenizer("gpt-neox").name == "gpt-neox"
