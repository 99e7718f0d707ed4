"""A trained model: one folder that stands alone, text in and out, refusals that name what is missing."""

import dataclasses
import itertools
import json
import math
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as library
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

import holdall
from holdall import checkpoints, files, language_model
from holdall.contract import StateError
from holdall.engine import EngineConfig, Request, Sampling, sampling, slow
from holdall.files import RunError
from holdall.language_model import LanguageModel, load
from holdall.mixers.attention import AttentionConfig
from holdall.mixers.base_conv import BaseConvConfig
from holdall.mixers.mamba import MambaConfig
from holdall.mixers.sliding_window import SlidingWindowConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import Model, ModelConfig, seeded
from holdall.text.shards import write_corpus
from holdall.text.tokenizers import END, Bytes, Filed, Tokenizer
from holdall.training.chassis import Stopped
from holdall.training.language_models import PretrainConfig, pretrain

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "data" / "run-0.1"
"""A run folder that version 0.1 left, of the embedded text: no tokenizer.json, no fingerprint, no `tied`."""
PROSE = "Ann sees Bob, and Bob sees Cleo. It's a café; naïve, isn't it — 12 times?\n"
CONFIG = ModelConfig(
    vocab=304,
    width=16,
    layers=(
        BaseConvConfig(width=16),
        TaylorConfig(width=16, feature_dim=4),
        SlidingWindowConfig(width=16, window=5),
        MambaConfig(width=16, state=4),
    ),
    mlp=32,
)


def byte_level() -> Filed:
    """A small tokenizer of GPT-2's kind, whose tokens may be parts of characters."""
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([PROSE] * 4, trainer)
    return Filed(made.to_str().encode(), "small", "small.json")


def with_spaces() -> Filed:
    """One of Llama's kind: words begin with a space, and unknown characters fall back to bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [*"abcdefghijklmnoprstuvwxyzABCIN.,'", "▁", "▁sees", "▁and", "▁Bob"]
    vocab = {word: i for i, word in enumerate(["</s>", "<unk>", *pieces, *words])}
    made = library.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    file = json.loads(made.to_str())
    file["model"] = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
    file["pre_tokenizer"] = None
    file["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    file["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    file["added_tokens"] = [
        {
            "id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
    ]  # fmt: skip
    return Filed(json.dumps(file).encode(), "llama-like", "llama.json")


TOKENIZERS = {"bytes": Bytes(), "byte-level": byte_level(), "with-spaces": with_spaces()}


def made(config: ModelConfig = CONFIG, tokenizer: Tokenizer | None = None, **options: Any) -> LanguageModel:
    """A model that nobody trained, with logits as far apart as those of a trained one."""
    with seeded(0):
        model = config.build()
    with torch.no_grad():
        model.head_weight.mul_(20)
    return LanguageModel(model.eval(), tokenizer or Bytes(), **options)


def trained(
    corpus: str, folder: Path, *, should_stop: Callable[[], bool] = lambda: False, **changes: Any
) -> None:
    layers = (BaseConvConfig(width=8), TaylorConfig(width=8, feature_dim=4))
    config = PretrainConfig(
        model=ModelConfig(vocab=304, width=8, layers=layers, norm="rms"),
        data=corpus,
        context_len=16,
        batch=4,
        micro_batch=4,
        steps=4,
        evaluate_every=2,
        evaluate_rows=2,
    )
    pretrain(dataclasses.replace(config, **changes), folder, should_stop=should_stop)


def write_text(folder: Path, tokenizer: Tokenizer) -> Path:
    """A corpus that the embedded text is not."""
    (folder / "text.txt").write_text("\n===\n".join(f"{n}: {PROSE}" * 3 for n in range(20)))
    write_corpus([folder / "text.txt"], folder / "corpus", tokenizer, valid=0.3, separator="\n===\n")
    return folder / "corpus"


@pytest.fixture(scope="module", params=["bytes", "byte-level"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose corpus is gone."""
    folder = tmp_path_factory.mktemp("run")
    corpus = write_text(folder, TOKENIZERS[request.param])
    trained(str(corpus), folder / "run")
    shutil.rmtree(corpus)
    return folder / "run"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    made().save(tmp_path / "saved")
    return tmp_path / "saved"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def with_header(path: Path, **changes: str | None) -> None:
    """The same tensors under another header."""
    header = {**metadata(path), **changes}
    save_file(load_file(path), path, {key: value for key, value in header.items() if value is not None})


# ---------------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("checkpoint", ["model", "best", "last"])
def test_a_run_folder_is_a_model_without_its_corpus(run: Path, tmp_path: Path, checkpoint: Any) -> None:
    for name in (f"{checkpoint}.safetensors", "config.json", "tokenizer.json"):
        shutil.copy(run / name, tmp_path)
    model = load(tmp_path)
    assert model.step == 4
    assert model.config == ModelConfig.from_dict(json.loads((run / "config.json").read_text())["model"])
    prefix = "model." if checkpoint == "last" else ""
    written = load_file(run / f"{checkpoint}.safetensors")
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, written[prefix + name]), name
    assert not model.model.training
    assert model.tokenizer.decode(model.tokenizer.encode_batch([PROSE])[0]) == PROSE


def test_a_run_is_a_model_from_its_first_checkpoint_on(tmp_path: Path) -> None:
    corpus = write_text(tmp_path, TOKENIZERS["byte-level"])
    with pytest.raises(Stopped):
        trained(str(corpus), tmp_path / "run", evaluate_every=1, should_stop=lambda: True)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert load(tmp_path / "run").step == 1
    assert load(tmp_path / "run", checkpoint="last").step == 1
    assert load(tmp_path / "run").tokenizer.name == "small"


def test_which_checkpoint_is_loaded(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    for name, step in (("model", 40), ("best", 20), ("last", 30)):
        with_header(folder / f"{name}.safetensors", step=str(step))
    assert load(folder).step == 40
    assert [load(folder, checkpoint=name).step for name in ("model", "best", "last")] == [40, 20, 30]
    (folder / "model.safetensors").unlink()
    assert load(folder).step == 20
    with pytest.raises(RunError, match="has no checkpoint 'model', but 'best'"):
        load(folder, checkpoint="model")
    (folder / "best.safetensors").unlink()
    assert load(folder).step == 30
    header = language_model.read_header(folder)
    assert (header.path.name, header.step) == ("last.safetensors", 30)
    assert header.fingerprint == load(folder).fingerprint


def test_what_is_saved_loads_elsewhere_as_it_was(tmp_path: Path) -> None:
    for name, tokenizer in TOKENIZERS.items():
        model = made(tokenizer=tokenizer, step=7)
        model.save(tmp_path / name)
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
        again = load(tmp_path / "elsewhere" / name)
        assert (again.step, again.config, again.fingerprint) == (7, CONFIG, model.fingerprint)
        assert again.tokenizer.describe() == tokenizer.describe()
        for (key, one), other in zip(
            model.model.state_dict().items(), again.model.state_dict().values(), strict=True
        ):
            assert torch.equal(one, other), key
        assert again.generate("Ann", max_tokens=9) == model.generate("Ann", max_tokens=9)
        assert sorted(path.name for path in (tmp_path / "elsewhere" / name).iterdir()) == [
            "config.json", "model.safetensors", "tokenizer.json",
        ]  # fmt: skip


def test_others_can_read_what_is_saved(tmp_path: Path) -> None:
    """With the libraries that wrote these formats alone."""
    for name, tokenizer in TOKENIZERS.items():
        made(tokenizer=tokenizer).save(tmp_path / name)
        theirs = library.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        for text in (PROSE, "\x00\x7f\n\t  \U0001f600 \U0001f600", "plain"):
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert ids == tokenizer.encode_batch([text])[0].tolist()
            assert theirs.decode(ids) == tokenizer.decode(ids)
        header = metadata(tmp_path / name / "model.safetensors")
        assert json.loads(header["model"]) == CONFIG.to_dict()
        assert json.loads(header["tokenizer"])["vocab"] == tokenizer.vocab
        assert len(header["fingerprint"]) == 64


def test_weights_can_be_saved_in_half_the_bytes(tmp_path: Path) -> None:
    model = made()
    model.save(tmp_path / "whole")
    model.save(tmp_path / "half", dtype="bf16")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    weights = model.model.parameter_count()
    assert sizes[0] - sizes[1] == pytest.approx(2 * weights, rel=0.05)
    half = load(tmp_path / "half")
    for (name, one), other in zip(
        model.model.state_dict().items(), half.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one.bfloat16().float(), other), name
    assert half.fingerprint != model.fingerprint


@pytest.mark.parametrize("there", ["file", "run", "saved", "link"])
def test_saving_replaces_nothing(there: str, run: Path, saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if there == "file":
        target.write_text("precious")
    elif there == "link":
        target.symlink_to(saved)
    else:
        shutil.copytree({"run": run, "saved": saved}[there], target)
    before = {path: path.read_bytes() for path in target.rglob("*")} if target.is_dir() else {}
    with pytest.raises(RunError, match=r"target (holds something already|is there already).*Choose another"):
        made().save(target)
    assert before == ({path: path.read_bytes() for path in target.rglob("*")} if target.is_dir() else {})


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        for name in ("new", "empty"):
            with pytest.raises(RunError, match="No space left"):
                made().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []
    made().save(tmp_path / "empty")
    made().save(tmp_path / "new" / "deeper")
    assert load(tmp_path / "empty").fingerprint == load(tmp_path / "new" / "deeper").fingerprint


def test_a_saved_model_is_no_run_to_resume(saved: Path, tmp_path: Path) -> None:
    corpus = write_text(tmp_path, Bytes())
    with pytest.raises(RunError, match="holds a saved model, not a run; choose another folder"):
        trained(str(corpus), saved)


# ------------------------------------------------------------------------------ folders of before


def old(folder: Path, **changes: Any) -> Path:
    """A copy of the old run, with changes to its config."""
    shutil.copytree(OLD, folder)
    config = json.loads((folder / "config.json").read_text())
    assert "tied" not in config["model"]
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_an_old_run_of_the_embedded_text_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no cache"))
    loaded = [load(OLD, checkpoint=checkpoint) for checkpoint in ("model", "best", "last")]
    assert [model.step for model in loaded] == [12, 12, 12]
    assert len({model.fingerprint for model in loaded}) == 1
    assert loaded[0].config.tied
    assert loaded[0].tokenizer.name == "bytes"
    # what its own version generated
    assert loaded[0].generate("Mr. Darcy", max_tokens=20, temperature=0) == 20 * " "
    assert not (tmp_path / "no cache").exists()
    loaded[0].save(tmp_path / "saved")
    assert load(tmp_path / "saved").generate("A", max_tokens=5) == loaded[0].generate("A", max_tokens=5)


def test_an_old_run_has_the_tokenizer_of_its_corpus(tmp_path: Path) -> None:
    corpus = write_text(tmp_path, TOKENIZERS["byte-level"])
    content = json.loads((corpus / "manifest.json").read_text())["content_hash"]
    folder = old(tmp_path / "run", data=str(corpus), data_hash=content)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["vocab"] = 304
    model = ModelConfig.from_dict(config["model"]).build()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("best", "last"):
        (folder / f"{name}.safetensors").unlink()
    checkpoints.write(folder / "model.safetensors", model.state_dict(), {"state": '{"step": 3}'})
    assert load(folder).tokenizer.describe() == TOKENIZERS["byte-level"].describe()
    with_header(folder / "model.safetensors", crc32=None)  # as files of other writers
    assert load(folder).fingerprint == LanguageModel(model, Bytes()).fingerprint
    (folder / "config.json").write_text(json.dumps({**config, "data_hash": "0" * 64}))
    with pytest.raises(RunError, match=r"no tokenizer\.json.* is not the one that the run was trained on"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.move(corpus, tmp_path / "moved")
    says = (
        r"run has no tokenizer\.json, as runs of an earlier.*corpus is not a folder.*or copy tokenizer\.json"
    )
    with pytest.raises(RunError, match=says):
        load(folder)
    shutil.copy(tmp_path / "moved" / "tokenizer.json", folder)
    assert load(folder).tokenizer.vocab == TOKENIZERS["byte-level"].vocab


def test_an_old_run_is_resumed_and_becomes_a_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = old(tmp_path / "run")
    config = PretrainConfig.read(folder / "config.json")
    assert pretrain(config, folder)["steps"] == 12
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(Bytes().to_json())
    (folder / "result.json").unlink()
    (folder / "model.safetensors").unlink()
    pretrain(config, folder)  # resumed at its end: the weights are written again, by this version
    for name, tensor in load_file(OLD / "model.safetensors").items():
        assert torch.equal(tensor, load_file(folder / "model.safetensors")[name]), name
    assert metadata(folder / "model.safetensors")["step"] == "12"


# ------------------------------------------------------------------------------ what identifies it


def test_the_fingerprint_is_of_config_and_weights(tmp_path: Path, run: Path) -> None:
    fingerprints = {load(run, checkpoint=checkpoint).fingerprint for checkpoint in ("model", "last")}
    assert len(fingerprints) == 1
    fingerprints |= {load(run, dtype=dtype).fingerprint for dtype in ("bf16", torch.float64)}
    assert len(fingerprints) == 1
    assert fingerprints == {metadata(run / "model.safetensors")["fingerprint"]}
    one = made()
    others = [made(), made(dataclasses.replace(CONFIG, eps=1e-6))]
    with torch.no_grad():
        others[0].model.norm.bias[3] += 1e-3
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert made().fingerprint == one.fingerprint
    one.save(tmp_path / "one")
    assert load(tmp_path / "one").fingerprint == one.fingerprint


def test_a_header_that_does_not_fit_its_weights_is_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    right = metadata(path)
    for changes, why in (
        ({"fingerprint": "0" * 64}, "its fingerprint is not that of"),
        ({"model": json.dumps(dataclasses.replace(CONFIG, eps=1e-3).to_dict())}, "another model than config"),
        ({"model": "{"}, "it is not JSON"),
        ({"step": "-1"}, "does not say which step"),
        ({"step": None}, "does not say which step"),
    ):
        with_header(path, **changes)
        with pytest.raises(RunError, match=rf"model\.safetensors is damaged: .*{why}"):
            load(saved)
        with_header(path, **right)
    weights = load_file(path)
    weights["norm.weight"][0] += 1
    save_file(weights, path, right)
    with pytest.raises(RunError, match=r"norm\.weight does not match its checksum"):
        load(saved)


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", r"holds no language model \(config.json is missing\); `holdall train` makes one"),
        ("model.safetensors", r"holds no language model \(model.safetensors is missing\); `holdall train`"),
        ("tokenizer.json", r"tokenizer.json is missing. Copy tokenizer.json from the folder that the model"),
    ],
)
def test_a_missing_file_is_named(saved: Path, name: str, says: str) -> None:
    (saved / name).unlink()
    with pytest.raises(RunError, match=says):
        load(saved)


def test_another_tokenizer_is_refused(saved: Path) -> None:
    (saved / "tokenizer.json").write_bytes(TOKENIZERS["byte-level"].to_json())
    with pytest.raises(RunError, match=r"not the tokenizer that the model was trained with\. Copy"):
        load(saved)
    (saved / "tokenizer.json").write_text("[]")
    with pytest.raises(RunError, match=r"tokenizer.json was altered"):
        load(saved)
    made(tokenizer=TOKENIZERS["byte-level"]).save(saved.with_name("filed"))
    for tokenizer in (Bytes(), TOKENIZERS["with-spaces"]):
        (saved.with_name("filed") / "tokenizer.json").write_bytes(tokenizer.to_json())
        with pytest.raises(RunError, match="not the tokenizer that the model was trained with"):
            load(saved.with_name("filed"))
    small = dataclasses.replace(CONFIG, vocab=256).build()
    with pytest.raises(ValueError, match="bytes has 257 tokens, more than the model's vocab 256"):
        LanguageModel(small, Bytes())


def test_the_layout_of_a_tokenizer_s_file_does_not_matter(saved: Path) -> None:
    path = saved / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert load(saved).tokenizer.name == "bytes"


def changed(**changes: Any) -> Callable[[Path], None]:
    """What changes config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed(format="holdall-model-2"), "has the format 'holdall-model-2', not holdall-model-1"),
        (changed(model={**CONFIG.to_dict(), "eps": 1e-3}), "describes another model than config.json"),
        (changed(model={**CONFIG.to_dict(), "layers": [{"name": "mine"}]}), "the mixer 'mine'.*--load FILE"),
        (changed(model=3), "config.json is damaged"),
        (changed(model={}), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text('{"points": []}'), "config.json describes none"),
        (lambda folder: (folder / "config.json").write_text("["), "config.json is damaged"),
    ],
)
def test_a_config_that_does_not_fit_is_named(saved: Path, change: Callable[[Path], None], says: str) -> None:
    change(saved)
    with pytest.raises(RunError, match=says):
        load(saved)


def test_what_cannot_be_loaded_is_said_with_the_way_out(saved: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no folder nowhere.*comes with Holdall: based-mini"):
        load("nowhere")
    with pytest.raises(RunError, match="Did you mean 'based-mini'"):
        load("based-mimi")
    with pytest.raises(RunError, match="is a file: name its folder"):
        load(saved / "model.safetensors")
    # where the type checker of the tests sees it first, in its words
    says = "checkpoint = 'end' must be one of model, best, last|typechecking parameter 'checkpoint'"
    with pytest.raises((ValueError, TypeError), match=says):
        load(saved, checkpoint="end")  # type: ignore[arg-type]
    for dtype in ("int8", torch.int8, torch.float8_e5m2):
        with pytest.raises(ValueError, match=r"dtype = .*8.* must be fp32, bf16, or torch's"):
            load(saved, dtype=dtype)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device is available here"):
            load(saved, device="cuda")
    begun = shutil.copytree(run, tmp_path / "begun")
    for name in ("model", "best", "last"):
        (begun / f"{name}.safetensors").unlink()
    with pytest.raises(RunError, match="has no checkpoint yet; give its `holdall train` command again"):
        load(begun)


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    before = torch.random.get_rng_state()
    load(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


# ------------------------------------------------------------------------------------------ precision


def test_a_dtype_is_that_of_the_blocks(saved: Path) -> None:
    text, exact = PROSE, load(saved, dtype=torch.float64)
    assert {weight.dtype for weight in exact.model.parameters()} == {torch.float64}
    for dtype, error in (("fp32", 1e-5), (None, 1e-5), ("bf16", 0.2), (torch.float16, 0.05)):
        model = load(saved, dtype=dtype)
        narrow = (
            language_model.DTYPES.get(dtype, torch.float32) if not isinstance(dtype, torch.dtype) else dtype
        )
        assert {weight.dtype for weight in model.model.blocks.parameters()} == {narrow}
        for part in (model.model.embed, model.model.norm):
            assert {weight.dtype for weight in part.parameters()} == {torch.float32}
        logits, states = model.model(torch.tensor([[1, 2, 3]]))
        assert logits.dtype == torch.float32
        assert states[1][0].dtype == torch.float32  # a recurrent state stays wide
        difference = (model.score(text).log_prob_T - exact.score(text).log_prob_T).abs()
        assert 0 < difference.max() < error


def test_numbers_that_are_complex_or_counts_keep_their_dtype() -> None:
    model = CONFIG.build()
    model.mixers[0].register_buffer("turn", torch.ones(3, dtype=torch.complex64))
    model.mixers[0].register_buffer("places", torch.arange(3))
    mixer = language_model.compute_in(torch.bfloat16, model).mixers[0]
    assert (mixer.turn.dtype, mixer.places.dtype) == (torch.complex64, torch.int64)


def test_the_form_is_the_one_for_the_dtype(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseConvConfig, "resolved_form", lambda self, device, dtype=torch.float32: str(dtype))
    assert load(saved, dtype="bf16").model.mixers[0].form == "torch.bfloat16"


# ------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["", "Ann sees", "caf", "naïve — \U0001f600"])
def test_the_text_is_its_pieces(name: str, prompt: str) -> None:
    """Also where tokens are drawn nearly at random, so that bytes seldom make characters."""
    tokenizer, untied = TOKENIZERS[name], dataclasses.replace(CONFIG, tied=False)
    model, pieces = made(untied, tokenizer), list[str]()
    options: dict[str, Any] = {"temperature": 2.0, "seed": 3}
    text = model.generate(prompt, max_tokens=60, on_text=pieces.append, **options)
    assert "".join(pieces) == text
    assert all(pieces)
    ids = [tokenizer.end, *tokenizer.encode_batch([prompt])[0].tolist()]
    asked = Request(prompt=tuple(ids), sampling=Sampling(max_tokens=60, **options))
    drawn = [token.id for piece in slow.generate(model.model, tokenizer, asked) for token in piece.tokens]
    new = list(itertools.takewhile(lambda token: token != tokenizer.end, drawn))
    assert len(new) > 10
    if name != "with-spaces":  # whose decoder takes back what it gave if bytes behind it are no character
        assert text == tokenizer.decode([*ids, *new]).removeprefix(tokenizer.decode(ids))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_comes_as_soon_as_its_characters_are_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, tokenizer = "café — \U0001f600\U0001f600 naïve Bob sees", TOKENIZERS[name]
    ids = tokenizer.encode_batch(["Ann" + text])[0].tolist()
    before = tokenizer.encode_batch(["Ann"])[0].tolist()
    assert ids[: len(before)] == before
    shown: list[tuple[int, str]] = []
    rest = iter([*ids[len(before) :], tokenizer.end, 65])
    taken = 0

    def scripted(logits_BV: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return torch.tensor([next(rest, 65)])

    monkeypatch.setattr(sampling, "draw", scripted)
    said = made(tokenizer=tokenizer).generate("Ann", on_text=lambda piece: shown.append((taken, piece)))
    assert said == text
    assert all("\ufffd" not in piece for _, piece in shown)
    for letter in "—\U0001f600":
        (piece,) = [at for at, piece in shown if letter in piece][:1]
        whole = next(
            n for n in range(1, 99) if letter in tokenizer.decode([*before, *ids[len(before) :][:n]])
        )
        assert piece == whole + 1  # a step is launched before the last one's token is looked at


def test_the_text_depends_on_the_seed_and_temperature_alone() -> None:
    model = made()
    cold = [model.generate("Ann", max_tokens=20, temperature=0, seed=seed) for seed in (0, 1)]
    hot = [model.generate("Ann", max_tokens=20, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert cold[0] == cold[1]
    assert hot[0] == hot[1] != hot[2]
    assert model.generate("Ann", max_tokens=0) == ""
    ids = [256, *b"Ann"]
    for _ in range(6):
        ids.append(int(model.model(torch.tensor([ids]))[0][0, -1, :257].argmax()))
    assert model.generate("Ann", max_tokens=6, temperature=0) == Bytes().decode(ids[4:])


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made().generate(PROSE, max_tokens=20, temperature=0)
    lengths, hidden = [], Model.hidden

    def seen(self: Model, tokens_BT: torch.Tensor, *args: Any, **options: Any) -> Any:
        lengths.append(tokens_BT.shape[1])
        return hidden(self, tokens_BT, *args, **options)

    monkeypatch.setattr(Model, "hidden", seen)
    model = made()
    monkeypatch.setattr(model, "_one_row", lambda tokens: model.engine(EngineConfig(rows=1, chunk=8)))
    assert model.generate(PROSE, max_tokens=20, temperature=0) == whole
    assert max(lengths) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": -1}, "max_tokens = -1 must be at least 0"),
        ({"temperature": -1.0}, r"temperature = -1\.0 must be"),
        ({"temperature": math.nan}, "temperature = nan must be"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made().generate("Ann", **options)


@pytest.mark.parametrize("layer", [None, AttentionConfig(width=16)], ids=["recurrent", "growing"])
def test_a_longer_text_after_a_short_one_has_room(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of one row is kept for the next text, if that fits."""
    monkeypatch.setattr(language_model, "ROOM", 32)
    model = made(CONFIG if layer is None else dataclasses.replace(CONFIG, layers=(*CONFIG.layers, layer)))
    for length in (3, 70, 5):
        assert len(model.generate("Ann", max_tokens=length, ignore_end=True, temperature=0)) >= length // 4


def test_generation_with_states_is_generation_without() -> None:
    model = made()
    ids = [256, *b"Ann sees"]
    for _ in range(12):
        ids.append(int(model.model(torch.tensor([ids]))[0][0, -1, :257].argmax()))
    want = Bytes().decode(list(itertools.takewhile(lambda token: token != 256, ids[9:])))
    assert model.generate("Ann sees", max_tokens=12, temperature=0) == want


@pytest.mark.parametrize("options", [{}, {"tokens": 3, "state_dtype": "fp16"}], ids=str)
def test_with_replay_the_text_is_the_same_and_sessions_are_its_own(
    options: dict[str, Any], tmp_path: Path
) -> None:
    able = (layer for layer in CONFIG.layers if not isinstance(layer, MambaConfig))
    layers = (TaylorConfig(width=16, feature_dim=4, heads=2), *able)
    model = made(dataclasses.replace(CONFIG, layers=layers))
    replayed = model.with_replay(**options)
    assert replayed.fingerprint == model.fingerprint
    text = model.generate(PROSE[:200], max_tokens=100, seed=1)
    assert replayed.generate(PROSE[:200], max_tokens=100, seed=1) == text
    kept = {type(state).__name__ for state in replayed.read("Ann").states}
    assert kept > {"ScaledReplayState" if options else "ReplayState"}
    weights = zip(model.model.parameters(), replayed.model.parameters(), strict=True)
    assert all(mine.data_ptr() == yours.data_ptr() for mine, yours in weights)
    replayed.save_session(replayed.read("Ann"), tmp_path / "session")
    with pytest.raises(ValueError, match="layer 0 needs"):
        model.load_session(tmp_path / "session")
    assert (model.model.rollback_limit, replayed.model.rollback_limit) == (0, options.get("tokens", 16))
    assert replayed.with_replay(0).config == model.config
    with pytest.raises(ValueError, match="layer 4, mamba of width 16, cannot take tokens back"):
        made(dataclasses.replace(CONFIG, layers=(*layers, MambaConfig(width=16)))).with_replay()


@pytest.mark.parametrize(
    "name",
    ["mamba-2", "gated-delta-net", *(pytest.param(n, marks=pytest.mark.full) for n in ("retnet", "gla"))],
)
def test_with_replay_other_layers_write_the_same_text(name: str) -> None:
    heads = {} if name == "mamba-2" else {"heads": 2}
    layer = holdall.describe(name).configure(width=16, **heads)
    model = made(dataclasses.replace(CONFIG, layers=(layer, CONFIG.layers[0])))
    replayed, options = model.with_replay(3), {"max_tokens": 60, "seed": 1}
    assert replayed.generate(PROSE[:100], **options) == model.generate(PROSE[:100], **options)
    assert replayed.model.mixers[0].rollback_limit == 3
    alone = made(dataclasses.replace(CONFIG, layers=(layer,)))
    with pytest.raises(ValueError, match=f"no layer stores its state in fp16: .* has {name}"):
        alone.with_replay(state_dtype="fp16")


def test_a_session_is_read_continued_forked_and_saved(tmp_path: Path) -> None:
    model, options = made(), {"max_tokens": 20, "seed": 5}
    session = model.read("Ann sees")
    want = model.generate("Ann sees Bob.", **options)
    assert [model.generate(" Bob.", session=session, **options) for _ in range(2)] == [want] * 2
    longer = model.read(" Bob.", session)
    assert (session.past.count, longer.past.count) == (9, 14)
    assert model.generate("", session=longer, **options) == want
    model.save_session(longer, tmp_path / "session.safetensors")
    again = made()
    assert again.generate("", session=again.load_session(tmp_path / "session.safetensors"), **options) == want
    other = made(dataclasses.replace(CONFIG, tied=False))
    with pytest.raises(StateError, match=f"has states of model {model.fingerprint}, not of this one"):
        other.load_session(tmp_path / "session.safetensors")


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-30, 1e-4])
def test_a_small_temperature_takes_the_likeliest_token(temperature: float) -> None:
    model = made()
    with torch.no_grad():
        model.model.embed.weight.mul_(40)  # logits as large as those of a trained model
    texts = [model.generate("Ann", max_tokens=30, temperature=t, seed=1) for t in (0, temperature)]
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("tied", [True, False])
def test_a_score_is_the_cross_entropy_after_the_end_of_the_document_before(tied: bool) -> None:
    model = made(dataclasses.replace(CONFIG, tied=tied))
    score = model.score(PROSE)
    ids = torch.tensor([256, *PROSE.encode()])
    logits_TV = model.model(ids[None, :-1])[0][0]
    wanted_T = -F.cross_entropy(logits_TV, ids[1:], reduction="none").detach().double()
    assert torch.equal(score.ids_T, ids[1:])
    torch.testing.assert_close(score.log_prob_T, wanted_T, rtol=1e-5, atol=1e-5)
    assert score.nats == pytest.approx(-wanted_T.sum().item(), rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(-wanted_T.mean().item()), rel=1e-6)
    alone = model.score(PROSE[0])
    assert alone.log_prob_T.shape == (1,)
    assert alone.log_prob_T[0].item() == pytest.approx(score.log_prob_T[0].item(), rel=1e-5)


def test_a_long_text_is_scored_in_pieces_that_carry_states(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (*CONFIG.layers, AttentionConfig(width=16))
    model = made(dataclasses.replace(CONFIG, layers=layers, positions=200))
    model.model.double()
    whole = model.score(PROSE)
    monkeypatch.setattr(language_model, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 3 * 304)
    pieces = model.score(PROSE)
    torch.testing.assert_close(pieces.log_prob_T, whole.log_prob_T, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="the model has 200 learned positions"):
        model.score(PROSE * 9)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to score: the text is empty"):
        made().score("")
    broken = made()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        broken.score("Ann")
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        broken.generate("Ann")


# ------------------------------------------------------------------------------------ what is included


def test_the_model_that_comes_with_holdall_knows_its_book() -> None:
    model = holdall.load()
    assert language_model.pretrained() == ["based-mini"]
    assert model.fingerprint == holdall.load("based-mini").fingerprint
    assert (model.step, model.tokenizer.name, model.model.parameter_count()) == (500, "bytes", 742_272)
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune"
    assert model.score(text).perplexity < 4
    assert model.score(text[::-1]).perplexity > 20
    said = model.generate("It is", max_tokens=60, temperature=0)
    assert len(set(said)) > 8
    card = (language_model.PRETRAINED / "based-mini" / "README.md").read_text()
    assert model.fingerprint[:12] in card
    assert f"{model.model.parameter_count():,} parameters" in card


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made(step=3).save("based-mini")
    assert holdall.load("based-mini").step == 3
    assert holdall.load().step == 500


def test_it_is_in_the_package_and_small() -> None:
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "holdall"
    packed = {path for pattern in globs["holdall"] for path in package.glob(pattern)}
    there = {path for path in (package / "pretrained").rglob("*") if path.is_file()}
    assert {path.name for path in there} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert there <= packed
    assert sum(path.stat().st_size for path in there) < 1.6e6


def test_a_recurrent_model_with_learned_positions_generates() -> None:
    """Its states have a fixed size, and yet need to know how many positions there are."""
    model = made(dataclasses.replace(CONFIG, positions=40))
    assert model.model.needs_room
    assert len(model.generate("Ann", max_tokens=30, ignore_end=True, temperature=0)) > 0
    with pytest.raises(ValueError, match="the model has 40 positions"):
        model.generate("Ann", max_tokens=40)
    assert not made().model.needs_room
