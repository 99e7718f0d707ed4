"""Which tokens of real text a model has to recall from its context, and how well it does there.

    x_0 ... the Maison Bergey bistro ... (723 tokens) ... sigh at the Maison Bergey
                                                                             ^ a recall hit

A model reads a window x_0 .. x_{N-1} and predicts the token after each: x_1 .. x_N. The prediction of x_t
belongs to the bigram (x_{t-1}, x_t), which is *repeated* if it is also (x_{s-1}, x_s) for some 1 <= s < t;
t - s of the last such s is its distance. Every token is in one slice (Zoology, arXiv 2312.04927, section 3):

    hits        completes a repeated bigram that training has at most `threshold` times (1250 there, of 10
                billion tokens): too rare to be known by heart, so the context has to give it
    repeated    completes a repeated bigram that training has more often
    rest        completes a bigram that is new in this window

What the paper calls "other tokens" is `repeated` and `rest` together. Every later occurrence counts, not the
first alone. The context is all that the model reads: an occurrence in an earlier document of the same window
counts. A bigram with the end-of-text token in it is in `rest`: it says where a document ends and recalls
nothing. Training's counts are of adjacent tokens of the whole training split, each once.

The share of a gap that the hits explain is, as published, one of log-perplexities weighted by their tokens:

    share = (nll_hits(run) - nll_hits(reference)) |hits| / ((nll(run) - nll(reference)) |tokens|)

The paper's table caps it at 100%, beyond which a run beats the reference at all other tokens; here it is not
capped. Its 82% is the mean over the four models of 125M. (The shares there follow from its perplexities if
hits are 7.0% of the tokens, which is also what its columns all, hits and other imply.)

Letters: W windows, N predictions a window, X = N + 1 its tokens, K top predictions, C predictions at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from holdall import files
from holdall.files import RunError
from holdall.model import Model, ModelConfig, seeded

THRESHOLD = 1250
"""Zoology's: a bigram that training has more often is known by heart."""
SLICES = ("hits", "repeated", "rest")
TOP = 5
FORMAT = "holdall-recall-1"
"""Written into every recall.json; changes when a file of before can no longer be read."""


@runtime_checkable
class Tokens(Protocol):
    """A split of a corpus, or a numpy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: slice, /) -> np.ndarray: ...


# --------------------------------------------------------------------------------------------- the slices


def distances_loop(window_X: Sequence[int], end: int | None) -> list[int]:
    """The definition: for each of the N predictions, how far back its bigram was last; 0 if never."""
    last_seen: dict[tuple[int, int], int] = {}
    distance_N = []
    for t in range(1, len(window_X)):
        bigram = (window_X[t - 1], window_X[t])
        distance_N.append(t - last_seen[bigram] if bigram in last_seen and end not in bigram else 0)
        last_seen[bigram] = t
    return distance_N


def distances(windows_WX: np.ndarray, end: int | None) -> np.ndarray:
    """How far back the bigram of each prediction was last, (W, N) int32; 0 if never.

    end: the token that ends a document, in whose bigrams nothing is recalled; None if there is none.
    """
    distance_WN = np.zeros((len(windows_WX), windows_WX.shape[1] - 1), np.int32)
    for window_X, distance_N in zip(windows_WX, distance_WN, strict=True):
        key_N = bigrams(window_X, int(window_X.max(initial=0)) + 1)
        order_N = np.argsort(key_N, kind="stable")  # equal bigrams lie together, the earlier ones first
        again = key_N[order_N[1:]] == key_N[order_N[:-1]]
        distance_N[order_N[1:][again]] = (order_N[1:] - order_N[:-1])[again]
    if end is not None:
        distance_WN[(windows_WX[:, 1:] == end) | (windows_WX[:, :-1] == end)] = 0
    return distance_WN


def bigrams(tokens_X: np.ndarray, vocab: int) -> np.ndarray:
    """One number for each pair of adjacent tokens, int64."""
    tokens_X = np.asarray(tokens_X, np.int64)
    return tokens_X[..., :-1] * vocab + tokens_X[..., 1:]


def slice_of(distance_WN: np.ndarray, count_WN: np.ndarray, threshold: int = THRESHOLD) -> np.ndarray:
    """The slice of each prediction as an index into SLICES, int8."""
    repeated = distance_WN > 0
    return np.where(repeated & (count_WN <= threshold), 0, np.where(repeated, 1, 2)).astype(np.int8)


def windows_of(tokens: Tokens, context_len: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Windows of a split, in order: all of them, or `rows` spread evenly.

    The model reads `context_len` tokens of each, and no two share one that is predicted: window w begins at
    the token that window w - 1 predicts last, so all of them score every token but the first once.

    Returns start_W, int64, and windows_WX, int32, X = context_len + 1.
    Raises RunError if the split is shorter than one window.
    """
    there = (len(tokens) - 1) // context_len
    if there < 1:
        raise RunError(
            f"the validation split has {len(tokens):,} tokens, too few for one window of {context_len:,}: "
            "choose a smaller --context, or make the corpus with a larger --valid"
        )
    count = there if rows is None else min(rows, there)
    start_W = np.arange(count) * there // count * context_len
    windows = [np.asarray(tokens[start : start + context_len + 1], np.int32) for start in start_W.tolist()]
    return start_W, np.stack(windows)


# ------------------------------------------------------------------------------------- counts in training


def count_bigrams(tokens: Tokens, wanted: np.ndarray, vocab: int, *, piece: int = 1 << 22) -> np.ndarray:
    """How often each wanted bigram occurs in the tokens, exactly, (len(wanted),) int64.

    wanted: sorted bigrams without repeats; others are not counted. piece: tokens in memory at once.
    """
    count = np.zeros(len(wanted), np.int64)
    for start in range(0, len(tokens) - 1, piece):
        found = np.sort(bigrams(tokens[start : start + piece + 1], vocab))
        count += np.searchsorted(found, wanted, "right") - np.searchsorted(found, wanted, "left")
    return count


def training_counts(corpus: Any) -> tuple[np.ndarray, np.ndarray]:
    """All bigrams of the validation split, sorted, and how often the training split has each.

    Counted once per corpus: the result lies in its folder as bigrams.npz, under the corpus's hash. A folder
    that cannot be written to is no error; the next call counts again.
    """
    path = Path(corpus.folder) / "bigrams.npz"
    wanted = np.unique(bigrams(corpus.valid[0 : len(corpus.valid)], corpus.vocab))
    with contextlib.suppress(RunError):  # missing or damaged: counted again
        kept = files.read_arrays(path)
        names = "corpus", "bigrams", "counts"
        corpus_hash, known, count = (kept.get(name, np.empty(0)) for name in names)
        same = str(corpus_hash) == corpus.content_hash and np.array_equal(known, wanted)
        if same and (count.shape, count.dtype) == (wanted.shape, np.int64) and count.min(initial=0) >= 0:
            return wanted, count
    count = count_bigrams(corpus.train, wanted, corpus.vocab)
    with contextlib.suppress(RunError):
        files.write_arrays(
            path, {"corpus": np.array(corpus.content_hash), "bigrams": wanted, "counts": count}
        )
    return wanted, count


def look_up(windows_WX: np.ndarray, vocab: int, wanted: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The training count of each prediction's bigram, (W, N) int64; all of them are among `wanted`."""
    return count[np.searchsorted(wanted, bigrams(windows_WX, vocab))]


# ------------------------------------------------------------------------------------------ what a model says


class Predictions(NamedTuple):
    """What a model says of the N tokens of each window that it predicts; `top` is (W, N, K)."""

    log_prob: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    top_log_prob: np.ndarray


TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 15}
"""Tokens that go through the model together, by device."""
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits that exist at once: all of a batch would be hundreds of times its activations."""


@torch.inference_mode()
def predict(model: Model, windows_WX: np.ndarray) -> Predictions:
    """Run a model over windows, on its own device and in its own dtypes; logits are fp32.

    Returns log_prob (W, N) float32 in nats; rank (W, N) int32, how many tokens got a higher logit than the
    true one; top (W, N, K) int32, most likely first, and top_log_prob float16.
    """
    head_VD = model.embed.weight.float()
    device, kind = head_VD.device, head_VD.device.type
    count = windows_WX.shape[1] - 1
    rows = max(1, TOKENS_AT_ONCE.get(kind, 1 << 12) // count)
    block = max(1, LOGITS_AT_ONCE.get(kind, 1 << 22) // len(head_VD))
    parts: list[list[torch.Tensor]] = []
    for batch_BX in torch.from_numpy(np.asarray(windows_WX, np.int64)).split(rows):
        batch_BX = batch_BX.to(device)
        h_BND, _ = model.hidden(batch_BX[:, :-1], want_states=False)
        h_ND, target_N = h_BND.flatten(0, 1), batch_BX[:, 1:].flatten()
        for h_CD, target_C in zip(h_ND.split(block), target_N.split(block), strict=True):
            logit_CV = h_CD.float() @ head_VD.T
            norm_C1 = logit_CV.logsumexp(-1, keepdim=True)
            true_C1 = logit_CV.gather(1, target_C[:, None])
            top = logit_CV.topk(min(TOP, len(head_VD)), dim=-1)
            # as "not lower or equal", so that logits that are no numbers make nothing right
            rank_C = (~(logit_CV <= true_C1)).sum(-1, dtype=torch.int32)
            logs = (true_C1 - norm_C1)[:, 0], rank_C, top.indices.int(), (top.values - norm_C1).half()
            parts.append([part.cpu() for part in logs])
    joined = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Predictions(*(part.reshape(len(windows_WX), count, *part.shape[1:]) for part in joined))


# ----------------------------------------------------------------------------------------- a run's folder


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What one run says of the validation windows, and all that the slices need.

    Attributes:
        label: the run's name, its folder's unless told otherwise.
        about: settings, corpus, step, parameters and more, as recall.json holds them.
        start_W: where in the validation split each window begins.
        tokens_WX: the windows.
        distance_WN, count_WN: of each prediction's bigram: how far back it was last (0: never), and how often
            training has it.
        said: what the model says.
    """

    label: str
    about: Mapping[str, Any]
    start_W: np.ndarray
    tokens_WX: np.ndarray
    distance_WN: np.ndarray
    count_WN: np.ndarray
    said: Predictions

    @property
    def nll(self) -> np.ndarray:
        """In nats, (W, N) float64."""
        return -self.said.log_prob.astype(np.float64)

    @property
    def right(self) -> np.ndarray:
        """Whether the true token is the most likely one, (W, N)."""
        return self.said.rank == 0


def score(
    folder: Path,
    about: Mapping[str, Any],
    corpus: Any,
    model: Callable[[], Model],
    *,
    context_len: int,
    rows: int | None = None,
    save_seconds: float = 30.0,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Scores:
    """Run a model over the validation windows of its corpus and keep what it says in the run folder.

    recall.npz and recall.json hold it. What is there for the same settings is read, not computed again, and a
    call that was interrupted goes on from the last save.

    Args:
        about: what tells this model from any other: its config and step. Part of the settings.
        model: makes the model, on its device and in its dtypes; only called if something is left to compute.
        rows: windows, spread evenly; None for all.
    """
    start_W, tokens_WX = windows_of(corpus.valid, context_len, rows)
    settings = {
        "format": FORMAT,
        **about,
        "corpus": corpus.content_hash,
        "context_len": context_len,
        "windows": len(start_W),
        "of_windows": (len(corpus.valid) - 1) // context_len,
        "train_tokens": len(corpus.train),
    }
    with contextlib.suppress(RunError):  # damaged: computed again
        kept = find(folder)
        if kept is not None and kept.about == {**kept.about, **settings}:
            return kept
    key = _key(settings)
    partial = folder / "recall.partial.npz"
    arrays = {
        "start_W": start_W,
        "tokens_WX": tokens_WX,
        "distance_WN": distances(tokens_WX, corpus.tokenizer.end),
        "count_WN": look_up(tokens_WX, corpus.vocab, *training_counts(corpus)),
    }
    said = _unfinished(partial, key, (len(start_W), context_len))
    done = 0 if said is None else len(said.log_prob)
    runner = model()
    per_call = max(1, 4 * TOKENS_AT_ONCE.get(runner.embed.weight.device.type, 1 << 12) // context_len)
    pieces, began = [] if said is None else [said], time.monotonic()
    saved = began
    while done < len(start_W):
        on_progress(done, len(start_W))
        pieces.append(predict(runner, tokens_WX[done : done + per_call]))
        done += len(pieces[-1].log_prob)
        if time.monotonic() - saved > save_seconds and done < len(start_W):
            pieces = [_joined(pieces)]
            files.write_arrays(partial, {"key": np.array(key), **pieces[0]._asdict()})
            saved = time.monotonic()
    on_progress(done, len(start_W))
    said = _joined(pieces)
    found = {
        "settings": key,
        "parameters": runner.parameter_count(),
        "seconds": round(time.monotonic() - began, 1),
    }
    scores = Scores(label=folder.name, about={**settings, **found}, said=said, **arrays)
    files.write_arrays(folder / "recall.npz", {"key": np.array(key), **arrays, **said._asdict()})
    digest = hashlib.sha256((folder / "recall.npz").read_bytes()).hexdigest()
    files.write_json(
        folder / "recall.json", {**scores.about, "npz": digest, "slices": table(scores, THRESHOLD)}
    )
    partial.unlink(missing_ok=True)
    return scores


BESIDES = ("settings", "parameters", "seconds", "npz", "slices")
"""What recall.json says besides the settings."""


def find(folder: Path) -> Scores | None:
    """What `score` left in a run folder; None if there is nothing, or of another format.

    Raises RunError, which names the file, if it is damaged.
    """
    said, numbers = folder / "recall.json", folder / "recall.npz"
    if not said.exists() or not numbers.exists():
        return None
    way_out = f"Remove it, and `holdall recall` scores the model of {folder} again."
    about = files.read_json(said, way_out)
    if about.get("format") != FORMAT:
        return None
    settings = {name: value for name, value in about.items() if name not in BESIDES}
    counts = [
        about.get(name) for name in ("context_len", "windows", "of_windows", "train_tokens", "parameters")
    ]
    if about.get("settings") != _key(settings) or any(type(n) is not int or n < 1 for n in counts):
        raise files.damaged(said, "its settings were altered", way_out)
    arrays = files.read_arrays(numbers, way_out)
    # both name what they are of, so that a call that ended between the two leaves no false pair
    if about["settings"] != str(arrays.pop("key", "")):
        return None
    if about.get("npz") not in (None, hashlib.sha256(files.read_bytes(numbers)).hexdigest()):
        raise files.damaged(numbers, "it is not what was written", way_out)
    if wrong := _misfit(arrays, about["windows"], about["context_len"]):
        raise files.damaged(numbers, wrong, way_out)
    found = Predictions(*(arrays.pop(name) for name in Predictions._fields))
    about = {name: value for name, value in about.items() if name not in ("npz", "slices")}
    return Scores(label=folder.name, about=about, said=found, **arrays)


def _misfit(arrays: Mapping[str, np.ndarray], windows: int, context_len: int) -> str:
    """What is wrong with the arrays of so many windows; empty if nothing is."""
    each = (windows, context_len)
    shapes = {
        "start_W": (windows,),
        "tokens_WX": (windows, context_len + 1),
        **dict.fromkeys(("distance_WN", "count_WN", "log_prob", "rank"), each),
    }
    if arrays.keys() != {*shapes, "top", "top_log_prob"}:
        return f"it holds {', '.join(sorted(arrays))}"
    shapes |= dict.fromkeys(
        ("top", "top_log_prob"), (*each, arrays["top"].shape[-1] if arrays["top"].ndim else 0)
    )
    for name, array in arrays.items():
        kind = "f" if "log_prob" in name else "i"
        if array.shape != shapes[name] or array.dtype.kind != kind:
            return f"{name} is {array.dtype} of shape {array.shape}, not {shapes[name]}"
        if kind == "i" and array.min(initial=0) < 0:
            return f"{name} has a value below 0"
        if kind == "f" and array.max(initial=0.0) > 1e-3:  # a NaN is what a model may say
            return f"{name} has a probability above 1"
    return ""


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _unfinished(path: Path, key: str, shape: tuple[int, int]) -> Predictions | None:
    """What an interrupted call has left of so many windows and tokens; None if that cannot be used."""
    with contextlib.suppress(RunError):
        kept = files.read_arrays(path)
        names = Predictions._fields
        if str(kept.get("key")) == key and all(name in kept for name in names):
            said = Predictions(*(kept[name] for name in names))
            if all(part.ndim > 1 and part.shape[:2] == (len(said.log_prob), shape[1]) for part in said):
                return said if len(said.log_prob) <= shape[0] else None
    return None


def _joined(pieces: Sequence[Predictions]) -> Predictions:
    return Predictions(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


# ------------------------------------------------------------------------------------------- the measures


def table(scores: Scores, threshold: int) -> dict[str, dict[str, float | None]]:
    """Per slice, and for "all" and "other" (all but hits): tokens, their share, perplexity and accuracy.

    A slice without tokens has None for a perplexity and an accuracy.
    """
    slice_WN, nll_WN = slice_of(scores.distance_WN, scores.count_WN, threshold), scores.nll
    masks = {"all": slice_WN >= 0, **{name: slice_WN == k for k, name in enumerate(SLICES)}}
    masks["other"] = slice_WN > 0
    lines: dict[str, dict[str, float | None]] = {}
    for name, mask in masks.items():
        count = int(mask.sum())
        lines[name] = {
            "tokens": count,
            "share": count / mask.size,
            "perplexity": float(np.exp(nll_WN[mask].mean())) if count else None,
            "accuracy": float(scores.right[mask].mean()) if count else None,
        }
    return lines


def gap_share(share_of_tokens: float, gap_hits: float, gap: float) -> float:
    """The share of a gap that hits explain; both are differences of mean nll. NaN if there is no gap."""
    return share_of_tokens * gap_hits / gap if gap > 0 else float("nan")


class Gap(NamedTuple):
    """A run's gap to a reference in mean nll, below zero for one that is ahead, and what the hits add to it.

    share: of the gap, with its 95% interval; NaN for a run that is not behind, infinite where it may not be.
    """

    gap: float
    hits: float
    share: float
    low: float
    high: float


def gap(run: Scores, reference: Scores, threshold: int, *, draws: int = 1000) -> Gap:
    """How far a run is behind a reference, and what share of that the hits explain.

    The interval is of bootstrap draws of whole windows, since tokens of one window are not independent. It
    says how well the share is known from this text, not how it would vary over trainings.
    """
    check_same(run, reference)
    hits_WN = slice_of(run.distance_WN, run.count_WN, threshold) == 0
    behind_WN = run.nll - reference.nll
    sums_W2 = np.stack([(behind_WN * hits_WN).sum(1), behind_WN.sum(1)], 1)
    on_hits, overall = sums_W2.sum(0).tolist()
    count, hits = behind_WN.size, int(hits_WN.sum())
    share = gap_share(hits / count, on_hits / max(hits, 1), overall / count)
    weight_DW = np.random.default_rng(0).multinomial(
        len(sums_W2), np.full(len(sums_W2), 1 / len(sums_W2)), draws
    )
    drawn_D2 = weight_DW @ sums_W2
    with np.errstate(divide="ignore", invalid="ignore"):
        share_D = np.where(
            drawn_D2[:, 1] > 0, drawn_D2[:, 0] / drawn_D2[:, 1], np.copysign(np.inf, drawn_D2[:, 0])
        )
    low, high = np.quantile(share_D, [0.025, 0.975], method="nearest") if overall > 0 else (share, share)
    return Gap(overall / count, on_hits / count, share, float(low), float(high))


class Carried(NamedTuple):
    """What a model carries from token to token at the end of a context: how many numbers, and whether they
    become more with every token."""

    numbers: int
    grows: bool


def carried(run: Scores) -> Carried | None:
    """The state of a run's model; None where its recall.json does not say what the model is."""
    if "config" not in run.about:
        return None
    config, context_len = ModelConfig.from_dict(run.about["config"]["model"]), run.about["context_len"]
    with seeded(0):
        built = {layer: layer.build() for layer in set(config.layers)}
    whole, half = (
        sum(built[layer].state_elements(length) for layer in config.layers)
        for length in (context_len, context_len // 2)
    )
    return Carried(whole, whole > half)


def check_same(run: Scores, other: Scores) -> None:
    """Raise RunError unless both scored the same windows of a corpus."""
    same = (np.array_equal(getattr(run, name), getattr(other, name)) for name in ("tokens_WX", "count_WN"))
    if not all(same):
        texts = (
            f"{each.label} on {each.about['windows']} windows of {each.about['context_len']} tokens of "
            f"corpus {each.about['corpus'][:12]}"
            for each in (run, other)
        )
        raise RunError(f"{' and '.join(texts)}: only runs that read the same text can be compared")


class Curve(NamedTuple):
    """A mean over bins: bin b holds the values from low[b] up to and including high[b]."""

    low: np.ndarray
    high: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray


def curve(scores: Scores, by: str, threshold: int) -> Curve:
    """Mean nll by powers of two of the distance (of hits) or of the training count (of all repeated bigrams).

    by: "distance" or "frequency". Bins of frequency begin with 0 alone. Empty bins are left out.
    """
    slice_WN = slice_of(scores.distance_WN, scores.count_WN, threshold)
    mask = slice_WN == 0 if by == "distance" else slice_WN <= 1
    values, nll = (
        {"distance": scores.distance_WN, "frequency": scores.count_WN}[by][mask],
        scores.nll[mask],
    )
    bin_of = np.frexp(values.astype(np.float64))[1]  # 0: 0; 1: 1; 2: 2, 3; 3: 4 .. 7; and so on
    tokens = np.bincount(bin_of)
    there = np.flatnonzero(tokens)
    mean = np.bincount(bin_of, nll)[there] / tokens[there]
    low = np.where(there > 0, 2.0 ** (there - 1), 0)
    return Curve(low, np.where(there > 0, 2.0**there - 1, 0), tokens[there], mean)
