"""Recall on real text: which tokens a model must recall from its context, and its loss on them.

    x_0 ... the Maison Bergey bistro ... (723 tokens) ... sigh at the Maison Bergey
                                                                             ^ a recall hit

A model reads a window x_0 .. x_{N-1} and predicts the token after each: x_1 .. x_N. The prediction of x_t
completes the bigram (x_{t-1}, x_t), which is *repeated* if it equals (x_{s-1}, x_s) for some 1 <= s < t; its
distance is t - s for the largest such s. Each token is in one slice (Zoology, arXiv 2312.04927, section 3):

    hits        completes a repeated bigram that occurs at most `threshold` times in the training text (1250
                there, of 10 billion tokens): too rare to be memorised, so it has to come from the context
    repeated    completes a repeated bigram that is more frequent in the training text
    rest        completes a bigram that is new in this window

The paper's "other tokens" are `repeated` and `rest` together. All repetitions count, not only the first. The
context is everything that the model reads: an occurrence in an earlier document of the same window counts. A
bigram with the end-of-text token is in `rest`: it says where a document ends and recalls nothing. Training
counts are of adjacent tokens of the whole training split.

The share of a gap that the hits explain is, as published, computed from log-perplexities, weighted by tokens:

    share = (nll_hits(run) - nll_hits(reference)) |hits| / ((nll(run) - nll(reference)) |tokens|)

The paper's table caps it at 100%; here it is not capped, and exceeds 100% if a run is better than the
reference on other tokens. The paper's 82% is the mean over its four models of 125M. (Its shares follow from
its perplexities if hits are 7.0% of the tokens, which its columns "all", "hits" and "other" also imply.)

A model that reads a prefix of E tokens in both directions has seen what it would predict there. It is scored
on the tokens behind the prefix alone, x_E .. x_N, and compared with others on these: `Scores.behind`.

Letters: W windows, N predictions per window, X tokens per window: N + 1, and with a prefix E + N, K top
predictions, C predictions at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from holdall import files
from holdall.files import RunError
from holdall.model import Model, ModelConfig
from holdall.ops.cross_entropy import capped

THRESHOLD = 1250
"""Zoology's: a bigram that is more frequent in the training text counts as memorised."""
SLICES = ("hits", "repeated", "rest")
TOP = 5
FORMAT = "holdall-recall-1"
"""Format version in every recall.json; changes when older files can no longer be read."""


@runtime_checkable
class Tokens(Protocol):
    """A split of a corpus, or a numpy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: slice, /) -> np.ndarray: ...


# --------------------------------------------------------------------------------------------- the slices


def distances_loop(window_X: Sequence[int], end: int | None) -> list[int]:
    """The definition: for each of the N predictions, the distance of its bigram; 0 if it is not repeated."""
    last_seen: dict[tuple[int, int], int] = {}
    distance_N = []
    for t in range(1, len(window_X)):
        bigram = (window_X[t - 1], window_X[t])
        distance_N.append(t - last_seen[bigram] if bigram in last_seen and end not in bigram else 0)
        last_seen[bigram] = t
    return distance_N


def distances(windows_WX: np.ndarray, end: int | None) -> np.ndarray:
    """The distance of each prediction's bigram in tokens, (W, N) int32; 0 if it is not repeated.

    end: the end-of-text token, whose bigrams never count as repeated; None if there is none.
    """
    distance_WN = np.zeros((len(windows_WX), windows_WX.shape[1] - 1), np.int32)
    for window_X, distance_N in zip(windows_WX, distance_WN, strict=True):
        key_N = bigrams(window_X, int(window_X.max(initial=0)) + 1)
        order_N = np.argsort(key_N, kind="stable")  # equal bigrams adjacent, in order of time
        again = key_N[order_N[1:]] == key_N[order_N[:-1]]
        distance_N[order_N[1:][again]] = (order_N[1:] - order_N[:-1])[again]
    if end is not None:
        distance_WN[(windows_WX[:, 1:] == end) | (windows_WX[:, :-1] == end)] = 0
    return distance_WN


def bigrams(tokens_X: np.ndarray, vocab: int) -> np.ndarray:
    """A unique number for each pair of adjacent tokens, (..., X - 1) int64."""
    tokens_X = np.asarray(tokens_X, np.int64)
    return tokens_X[..., :-1] * vocab + tokens_X[..., 1:]


def slice_of(distance_WN: np.ndarray, count_WN: np.ndarray, threshold: int = THRESHOLD) -> np.ndarray:
    """The slice of each prediction as an index into SLICES, int8."""
    repeated = distance_WN > 0
    return np.where(repeated & (count_WN <= threshold), 0, np.where(repeated, 1, 2)).astype(np.int8)


def windows_of(tokens: Tokens, context_len: int, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Windows of a split, in order: all of them, or `rows` of them evenly spread.

    The model reads `context_len` tokens of each. Window w begins at the last token that window w - 1
    predicts, so every token but the first is predicted exactly once.

    Returns start_W, int64, and windows_WX, int32, X = context_len + 1.
    Raises RunError if the split is shorter than one window.
    """
    available = (len(tokens) - 1) // context_len
    if available < 1:
        raise RunError(
            f"the validation split has {len(tokens):,} tokens, too few for one window of {context_len:,}: "
            "choose a smaller --context, or make the corpus with a larger --valid"
        )
    count = available if rows is None else min(rows, available)
    start_W = np.arange(count) * available // count * context_len
    windows = [np.asarray(tokens[start : start + context_len + 1], np.int32) for start in start_W.tolist()]
    return start_W, np.stack(windows)


# ------------------------------------------------------------------------------------- counts in training


def count_bigrams(tokens: Tokens, wanted: np.ndarray, vocab: int, *, piece: int = 1 << 22) -> np.ndarray:
    """The exact number of occurrences of each wanted bigram in the tokens, (len(wanted),) int64.

    wanted: bigrams to count, sorted and unique. piece: tokens in memory at once.
    """
    count = np.zeros(len(wanted), np.int64)
    for start in range(0, len(tokens) - 1, piece):
        sorted_piece = np.sort(bigrams(tokens[start : start + piece + 1], vocab))
        count += np.searchsorted(sorted_piece, wanted, "right") - np.searchsorted(
            sorted_piece, wanted, "left"
        )
    return count


def training_counts(corpus: Any) -> tuple[np.ndarray, np.ndarray]:
    """The unique bigrams of the validation split, sorted, and the count of each in the training split.

    Counted once per corpus and cached in its folder as bigrams.npz, together with the corpus's hash. If the
    folder is not writable, every call counts again.
    """
    path = Path(corpus.folder) / "bigrams.npz"
    wanted = np.unique(bigrams(corpus.valid[0 : len(corpus.valid)], corpus.vocab))
    with contextlib.suppress(RunError):  # missing or damaged: counted again
        cached = files.read_arrays(path)
        names = "corpus", "bigrams", "counts"
        corpus_hash, known, count = (cached.get(name, np.empty(0)) for name in names)
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
    """The training count of each prediction's bigram, (W, N) int64; `wanted` must contain all of them."""
    return count[np.searchsorted(wanted, bigrams(windows_WX, vocab))]


# ------------------------------------------------------------------------------------------------ predictions


class Predictions(NamedTuple):
    """A model's predictions of N tokens in each of W windows."""

    log_prob: np.ndarray
    """Log-probability of the true token in nats, (W, N) float32."""
    rank: np.ndarray
    """Number of tokens with a higher logit than the true one, (W, N) int32."""
    top: np.ndarray
    """The K most likely tokens, most likely first, (W, N, K) int32."""
    top_log_prob: np.ndarray
    """Their log-probabilities, (W, N, K) float16."""


TOKENS_AT_ONCE = {"cpu": 1 << 12, "cuda": 1 << 15}
"""Tokens per forward pass, by device."""
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits in memory at once: those of a whole batch would be hundreds of times as large as activations."""


@torch.inference_mode()
def predict(model: Model, windows_WX: np.ndarray) -> Predictions:
    """Run a model over windows, on its own device and in its own dtypes, with fp32 logits.

    Of one with a prefix, the predictions of the tokens behind it. Raises ValueError if there are none.
    """
    first = max(model.prefix - 1, 0)
    count = windows_WX.shape[1] - 1 - first
    if count < 1:
        raise ValueError(
            f"the model's prefix of {model.prefix} tokens takes all of a window of "
            f"{windows_WX.shape[1] - 1}: none of its tokens is predicted; choose longer windows"
        )
    head_VD = model.head_weight.float()
    device, kind = head_VD.device, head_VD.device.type
    rows = max(1, TOKENS_AT_ONCE.get(kind, 1 << 12) // (windows_WX.shape[1] - 1))
    block = max(1, LOGITS_AT_ONCE.get(kind, 1 << 22) // len(head_VD))
    parts: list[list[torch.Tensor]] = []
    for batch_BX in torch.from_numpy(np.asarray(windows_WX, np.int64)).split(rows):
        batch_BX = batch_BX.to(device)
        h_BND, _ = model.hidden(batch_BX[:, :-1], want_states=False)
        h_ND, target_N = h_BND[:, first:].flatten(0, 1), batch_BX[:, first + 1 :].flatten()
        for h_CD, target_C in zip(h_ND.split(block), target_N.split(block), strict=True):
            logit_CV = capped(h_CD.float() @ head_VD.T, model.config.soft_cap)
            norm_C1 = logit_CV.logsumexp(-1, keepdim=True)
            true_C1 = logit_CV.gather(1, target_C[:, None])
            top = logit_CV.topk(min(TOP, len(head_VD)), dim=-1)
            # counted as "not lower or equal", so that no token is ranked first if logits are NaN
            rank_C = (~(logit_CV <= true_C1)).sum(-1, dtype=torch.int32)
            logs = (true_C1 - norm_C1)[:, 0], rank_C, top.indices.int(), (top.values - norm_C1).half()
            parts.append([part.cpu() for part in logs])
    joined = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Predictions(*(part.reshape(len(windows_WX), count, *part.shape[1:]) for part in joined))


# ----------------------------------------------------------------------------------------- a run's folder


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """A run's predictions on the validation windows, and the data that defines the slices."""

    label: str
    """The run's name: its folder's, unless another is given."""
    about: Mapping[str, Any]
    """Settings, corpus, step, number of parameters and more, as in recall.json."""
    start_W: np.ndarray
    """Index in the validation split of each window's first token."""
    tokens_WX: np.ndarray
    """The windows, the last N tokens of which are predicted."""
    distance_WN: np.ndarray
    """Distance of each prediction's bigram in tokens; 0 if it is not repeated."""
    count_WN: np.ndarray
    """Count of each prediction's bigram in the training split."""
    predictions: Predictions

    @property
    def first(self) -> int:
        """Place in a window of the first token that is predicted: 1, or the length of a prefix."""
        return self.tokens_WX.shape[1] - self.distance_WN.shape[1]

    def behind(self, prefix: int) -> Scores:
        """Those of the tokens behind a prefix, of so many tokens, of each window."""
        drop = max(prefix - self.first, 0)
        return dataclasses.replace(
            self,
            distance_WN=self.distance_WN[:, drop:],
            count_WN=self.count_WN[:, drop:],
            predictions=Predictions(*(part[:, drop:] for part in self.predictions)),
        )

    @property
    def nll(self) -> np.ndarray:
        """Negative log-likelihood of each true token in nats, (W, N) float64."""
        return -self.predictions.log_prob.astype(np.float64)

    @property
    def right(self) -> np.ndarray:
        """Whether the true token is the most likely one, (W, N) bool."""
        return self.predictions.rank == 0


def on_the_same_tokens(scored: Iterable[Scores]) -> list[Scores]:
    """Scores of several runs on those tokens that all of them predict: behind the longest prefix of any."""
    scored = list(scored)
    longest = max((run.first for run in scored), default=0)
    return [run.behind(longest) for run in scored]


def score(
    folder: Path,
    about: Mapping[str, Any],
    corpus: Any,
    model: Callable[[], Model],
    *,
    context_len: int,
    rows: int | None = None,
    prefix: int = 0,
    save_seconds: float = 30.0,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Scores:
    """Run a model over the validation windows of its corpus; the predictions are saved in the run folder.

    They are in recall.npz and recall.json. Saved predictions of the same settings are read, not computed
    again, and an interrupted call resumes from its last save.

    Args:
        about: what identifies the model: its config and step. Part of the settings.
        model: builds the model, on its device and in its dtypes; only called if something must be computed.
        rows: number of windows, evenly spread; None for all.
        prefix: the model's (`Model.prefix`), whose tokens are not scored.
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
        **({"prefix": prefix} if prefix else {}),
    }
    with contextlib.suppress(RunError):  # damaged: computed again
        saved = find(folder)
        if saved is not None and saved.about == {**saved.about, **settings}:
            return saved
    key = _key(settings)
    partial = folder / "recall.partial.npz"
    first = max(prefix - 1, 0)
    arrays = {
        "start_W": start_W,
        "tokens_WX": tokens_WX,
        "distance_WN": distances(tokens_WX, corpus.tokenizer.end)[:, first:],
        "count_WN": look_up(tokens_WX, corpus.vocab, *training_counts(corpus))[:, first:],
    }
    predictions = _unfinished(partial, key, (len(start_W), context_len - first))
    done = 0 if predictions is None else len(predictions.log_prob)
    runner = model()
    per_call = max(1, 4 * TOKENS_AT_ONCE.get(runner.device.type, 1 << 12) // context_len)
    pieces, began = [] if predictions is None else [predictions], time.monotonic()
    saved_at = began
    while done < len(start_W):
        on_progress(done, len(start_W))
        pieces.append(predict(runner, tokens_WX[done : done + per_call]))
        done += len(pieces[-1].log_prob)
        if time.monotonic() - saved_at > save_seconds and done < len(start_W):
            pieces = [_joined(pieces)]
            files.write_arrays(partial, {"key": np.array(key), **pieces[0]._asdict()})
            saved_at = time.monotonic()
    on_progress(done, len(start_W))
    predictions = _joined(pieces)
    measured = {
        "settings": key,
        "parameters": runner.parameter_count(),
        "seconds": round(time.monotonic() - began, 1),
    }
    scores = Scores(label=folder.name, about={**settings, **measured}, predictions=predictions, **arrays)
    files.write_arrays(folder / "recall.npz", {"key": np.array(key), **arrays, **predictions._asdict()})
    digest = hashlib.sha256((folder / "recall.npz").read_bytes()).hexdigest()
    files.write_json(
        folder / "recall.json", {**scores.about, "npz": digest, "slices": table(scores, THRESHOLD)}
    )
    partial.unlink(missing_ok=True)
    return scores


BESIDES = ("settings", "parameters", "seconds", "npz", "slices")
"""The keys of recall.json that are not settings."""


def find(folder: Path) -> Scores | None:
    """The scores saved in a run folder; None if there are none, or in another format.

    Raises RunError, which names the file, if it is damaged.
    """
    about_path, arrays_path = folder / "recall.json", folder / "recall.npz"
    if not about_path.exists() or not arrays_path.exists():
        return None
    way_out = f"Remove it, and `holdall recall` scores the model of {folder} again."
    about = files.read_json(about_path, way_out)
    if about.get("format") != FORMAT:
        return None
    settings = {name: value for name, value in about.items() if name not in BESIDES}
    counts = [
        about.get(name) for name in ("context_len", "windows", "of_windows", "train_tokens", "parameters")
    ]
    if about.get("settings") != _key(settings) or any(type(n) is not int or n < 1 for n in counts):
        raise files.damaged(about_path, "its settings were altered", way_out)
    arrays = files.read_arrays(arrays_path, way_out)
    # both files contain the key: a call interrupted between writing them leaves no mismatched pair
    if about["settings"] != str(arrays.pop("key", "")):
        return None
    if about.get("npz") not in (None, hashlib.sha256(files.read_bytes(arrays_path)).hexdigest()):
        raise files.damaged(arrays_path, "it does not match its hash", way_out)
    if wrong := _misfit(arrays, about["windows"], about["context_len"], about.get("prefix", 0)):
        raise files.damaged(arrays_path, wrong, way_out)
    predictions = Predictions(*(arrays.pop(name) for name in Predictions._fields))
    about = {name: value for name, value in about.items() if name not in ("npz", "slices")}
    return Scores(label=folder.name, about=about, predictions=predictions, **arrays)


def _misfit(arrays: Mapping[str, np.ndarray], windows: int, context_len: int, prefix: int) -> str:
    """What is wrong with the arrays of `windows` windows; empty if nothing is."""
    per_token = (windows, context_len - max(prefix - 1, 0))
    shapes = {
        "start_W": (windows,),
        "tokens_WX": (windows, context_len + 1),
        **dict.fromkeys(("distance_WN", "count_WN", "log_prob", "rank"), per_token),
    }
    if arrays.keys() != {*shapes, "top", "top_log_prob"}:
        return f"it holds {', '.join(sorted(arrays))}"
    shapes |= dict.fromkeys(
        ("top", "top_log_prob"), (*per_token, arrays["top"].shape[-1] if arrays["top"].ndim else 0)
    )
    for name, array in arrays.items():
        kind = "f" if "log_prob" in name else "i"
        if array.shape != shapes[name] or array.dtype.kind != kind:
            return f"{name} is {array.dtype} of shape {array.shape}, not {shapes[name]}"
        if kind == "i" and array.min(initial=0) < 0:
            return f"{name} has a value below 0"
        if kind == "f" and array.max(initial=0.0) > 1e-3:  # NaN is allowed: a model may have diverged
            return f"{name} has a probability above 1"
    return ""


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _unfinished(path: Path, key: str, shape: tuple[int, int]) -> Predictions | None:
    """The predictions that an interrupted call saved; None if there are none for this (windows, tokens)."""
    with contextlib.suppress(RunError):
        arrays = files.read_arrays(path)
        names = Predictions._fields
        if str(arrays.get("key")) == key and all(name in arrays for name in names):
            saved = Predictions(*(arrays[name] for name in names))
            if all(part.ndim > 1 and part.shape[:2] == (len(saved.log_prob), shape[1]) for part in saved):
                return saved if len(saved.log_prob) <= shape[0] else None
    return None


def _joined(pieces: Sequence[Predictions]) -> Predictions:
    return Predictions(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


# ------------------------------------------------------------------------------------------- the measures


def table(scores: Scores, threshold: int) -> dict[str, dict[str, float | None]]:
    """Tokens, their share, perplexity and accuracy of each slice, of "all", and of "other" (all but hits).

    Perplexity and accuracy of a slice without tokens are None.
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
    """The share of a gap that hits explain; both gaps are differences of mean nll. NaN if there is no gap."""
    return share_of_tokens * gap_hits / gap if gap > 0 else float("nan")


class Gap(NamedTuple):
    """The gap of a run to a reference run, in nats per token, and the contribution of the hits to it."""

    gap: float
    """Difference in mean nll; negative if the run is better than the reference."""
    hits: float
    """The part of the gap that is due to hits."""
    share: float
    """That part as a share of the gap; NaN if there is no positive gap."""
    low: float
    """Lower end of the share's 95% interval; infinite if it includes draws without a gap."""
    high: float
    """Upper end of it."""


def gap(run: Scores, reference: Scores, threshold: int, *, draws: int = 1000) -> Gap:
    """The gap of a run to a reference, and the share of it that the hits explain.

    The interval is a bootstrap over whole windows, since tokens of one window are not independent. It
    measures the uncertainty from this sample of text, not the variation between training runs.
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
    """The size of a model's state at the end of a context."""

    elements: int
    grows: bool
    """Whether it grows with the context."""


def carried(run: Scores) -> Carried | None:
    """The state size of a run's model; None if its recall.json has no config."""
    if "config" not in run.about:
        return None
    config, context_len = ModelConfig.from_dict(run.about["config"]["model"]), run.about["context_len"]
    whole, half = (config.state_elements(length) for length in (context_len, context_len // 2))
    return Carried(whole, whole > half)


def check_same(run: Scores, other: Scores) -> None:
    """Raise RunError unless both scored the same tokens of the same windows of a corpus."""
    same = (np.array_equal(getattr(run, name), getattr(other, name)) for name in ("tokens_WX", "count_WN"))
    if not all(same):
        texts = (
            f"{scores.label} on {scores.about['windows']} windows of {scores.about['context_len']} tokens of "
            f"corpus {scores.about['corpus'][:12]}, from token {scores.first}"
            for scores in (run, other)
        )
        raise RunError(f"{' and '.join(texts)}: only runs that read the same text can be compared")


class Curve(NamedTuple):
    """Mean nll by bins: bin b holds the values from low[b] to high[b], inclusive."""

    low: np.ndarray
    high: np.ndarray
    tokens: np.ndarray
    nll: np.ndarray


def curve(scores: Scores, by: str, threshold: int) -> Curve:
    """Mean nll of hits by distance, or of all repeated bigrams by training count, in bins of powers of two.

    by: "distance" or "frequency". The first bin of frequencies holds only 0. Empty bins are left out.
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
