"""From logits to the next token, for rows that each have settings of their own.

Draws depend on logits, seed and position alone (holdall/ops/noise.py). So a seed's text depends on the model
alone, and a drafted token is right exactly if it is the one that the model draws there.

Letters: B rows, V vocabulary, K the likeliest tokens.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from holdall.contract import forms
from holdall.engine.request import Sampling, Token
from holdall.ops.noise import draw as draw_noisy
from holdall.ops.running import cumsum

LARGEST = torch.finfo(torch.float32).max
"""Settings beyond would be infinite in fp32, and -inf / inf is NaN."""


class Settings(NamedTuple):
    """Sampling's numbers for each row, (B,): integers int64, others fp32. The fields are Sampling's."""

    seed_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    repetition_B: Tensor
    presence_B: Tensor
    frequency_B: Tensor


class Occurrences(NamedTuple):
    """What penalties and biases are computed from.

    prompt_BV: whether a token is in the prompt, bool.
    count_BV: how often it is in the text so far, int32.
    bias_BV: what is added to its logit, fp32.
    """

    prompt_BV: Tensor
    count_BV: Tensor
    bias_BV: Tensor


def settings_of(samplings: Sequence[Sampling], device: torch.device | str = "cpu") -> Settings:
    """The settings of rows; a row without a seed gets one that nobody knows."""
    columns = [
        ([secrets.randbits(63) if s.seed is None else s.seed for s in samplings], torch.int64),
        ([min(s.temperature, LARGEST) for s in samplings], torch.float32),
        ([s.top_k for s in samplings], torch.int64),
        ([s.top_p for s in samplings], torch.float32),
        ([s.min_p for s in samplings], torch.float32),
        ([min(s.repetition_penalty, LARGEST) for s in samplings], torch.float32),
        ([s.presence_penalty for s in samplings], torch.float32),
        ([s.frequency_penalty for s in samplings], torch.float32),
    ]
    return Settings(*(torch.tensor(values, dtype=dtype, device=device) for values, dtype in columns))


def needs_filters(sampling: Sampling) -> bool:
    """Whether a row draws among some tokens only."""
    return bool(sampling.temperature) and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)


def needs_occurrences(sampling: Sampling) -> bool:
    """Whether a row's logits depend on the tokens before, or have biases."""
    penalties = sampling.presence_penalty or sampling.frequency_penalty
    return bool(sampling.repetition_penalty != 1 or penalties or sampling.logit_bias)


def draw(
    logits_BV: Tensor,
    position_B: Tensor,
    settings: Settings,
    *,
    noise: bool = True,
    filters: bool = True,
    occurrences: Occurrences | None = None,
) -> Tensor:
    """The next token of each row, (B,) int64; -1 where a row's logits are NaN or +infinite.

    Args:
        logits_BV: of the next token, fp32.
        position_B: how many tokens were read before it, int64.
        noise: whether any row has a temperature; else the likeliest tokens are all there is to find.
        filters: whether any row has top_k, top_p or min_p; else sorting is left out.
        occurrences: where any row has a penalty or bias.

    There are no data-dependent shapes and the host waits for nothing: it can be recorded in a CUDA graph.
    """
    z_BV = logits_BV.float()
    if occurrences is not None:
        z_BV = penalised(z_BV, settings, occurrences)
    if not noise:
        token_B = z_BV.argmax(-1)
        return torch.where(z_BV.gather(-1, token_B[:, None])[:, 0].isfinite(), token_B, -1)
    temperature_B = settings.temperature_B
    if filters:
        hot_B1 = (temperature_B > 0)[:, None]
        scale_B1 = torch.where(hot_B1, temperature_B[:, None], 1.0)
        keep_BV = kept((z_BV - z_BV.amax(-1, keepdim=True)) / scale_B1, settings)
        # NaN stays, so that the draw sees it
        z_BV = z_BV.masked_fill(~keep_BV & hot_B1 & ~z_BV.isnan(), -math.inf)
    form = "kernel" if forms.fused(z_BV, temperature_B) else "parallel"
    return draw_noisy(z_BV, temperature_B, settings.seed_B, position_B, form=form)


def penalised(z_BV: Tensor, settings: Settings, occurrences: Occurrences) -> Tensor:
    """Logits after biases and penalties.

    The repetition penalty is that of Keskar et al., 2019 (arXiv 1909.05858) as transformers has it; the
    others are OpenAI's.
    """
    prompt_BV, count_BV, bias_BV = occurrences
    z_BV, written_BV = z_BV + bias_BV, count_BV > 0
    repetition_B1 = settings.repetition_B[:, None]
    repeated_BV = torch.where(z_BV > 0, z_BV / repetition_B1, z_BV * repetition_B1)
    z_BV = torch.where(prompt_BV | written_BV, repeated_BV, z_BV)
    z_BV = z_BV - settings.frequency_B[:, None] * count_BV
    return z_BV - settings.presence_B[:, None] * written_BV


def kept(scaled_BV: Tensor, settings: Settings) -> Tensor:
    """Which tokens top_k, then top_p, then min_p leave; the likeliest always is.

    Of equally likely tokens top_k leaves all or none, and top_p those with the smallest ids.
    """
    vocab = scaled_BV.shape[-1]
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    rank_B1 = torch.where(settings.top_k_B > 0, settings.top_k_B, vocab).clamp(max=vocab)[:, None] - 1
    in_k_BV = sorted_BV >= sorted_BV.gather(-1, rank_B1)
    p_BV = sorted_BV.masked_fill(~in_k_BV, -math.inf).softmax(-1)
    before_BV = cumsum(p_BV, -1) - p_BV
    top_p_B1, min_p_B1 = settings.top_p_B[:, None], settings.min_p_B[:, None]
    in_p_BV = (before_BV < top_p_B1) | (top_p_B1 >= 1)
    likely_BV = sorted_BV >= sorted_BV[:, :1] + min_p_B1.log()
    keep_BV = in_k_BV & in_p_BV & likely_BV
    keep_BV[:, 0] = True
    return torch.zeros_like(keep_BV).scatter(-1, order_BV, keep_BV)


# --------------------------------------------------------------------------------------------- probabilities


def with_logprobs(logits_BV: Tensor, token_B: Tensor, most: int) -> list[Token]:
    """Tokens with the model's log-probabilities, and those of the `most` likeliest tokens, on the host.

    A token that is the likeliest has exactly the value that stands for it there.
    """
    logprob_BV = logits_BV.float().log_softmax(-1)
    own_B = logprob_BV.gather(-1, token_B[:, None])[:, 0]
    most = min(most, logits_BV.shape[-1])
    best_BK, id_BK = logprob_BV.topk(most, dim=-1)
    columns = (token_B.tolist(), own_B.tolist(), id_BK.tolist(), best_BK.tolist())
    return [
        Token(token, own, tuple(zip(ids, best, strict=True)))
        for token, own, ids, best in zip(*columns, strict=True)
    ]
