"""Drift from fp64: measured right, and seen where it is planted."""

import math

import pytest
import torch

from holdall import mixers
from holdall.analysis import soundness
from holdall.analysis.soundness import drift, length_for
from holdall.commands import guarded
from holdall.commands import zoo as shown
from holdall.files import read_lines
from holdall.mixers.retnet import RetNet


def config(name: str, **options):
    return mixers.entry(name).configure(width=16, **options)


def test_a_sound_mixer_errs_by_rounding_and_more_in_bf16():
    fine, coarse = (drift(config("retnet"), dtype, length=300) for dtype in (torch.float32, torch.bfloat16))
    assert 0 < fine.error < 1e-5 < 1e-4 < coarse.error < 0.1
    assert fine.length == coarse.length == 300
    assert fine.last <= fine.error


@pytest.mark.parametrize(("at", "late"), [(50, False), (290, True)])
def test_a_planted_error_is_found_where_it_is(monkeypatch, at, late):
    right = RetNet.forward

    def wrong(self, x_BTD, state=None, **how):
        y_BTD, after = right(self, x_BTD, state, **how)
        if x_BTD.dtype == torch.float32:
            y_BTD = y_BTD.clone()
            y_BTD[:, at] += 0.5 * y_BTD.abs().max()
        return y_BTD, after

    monkeypatch.setattr(RetNet, "forward", wrong)
    found = drift(config("retnet"), torch.float32, length=300)
    assert 0.4 < found.error < 0.6
    assert (found.last > 0.4) == late


def test_not_a_number_is_told(monkeypatch):
    right = RetNet.forward

    def wrong(self, x_BTD, state=None, **how):
        y_BTD, after = right(self, x_BTD, state, **how)
        return (y_BTD / 0 * 0 if x_BTD.dtype == torch.float32 else y_BTD), after

    monkeypatch.setattr(RetNet, "forward", wrong)
    assert math.isnan(drift(config("retnet"), torch.float32, length=20).error)


def test_quadratic_mixers_read_fewer_tokens():
    assert length_for(config("attention"), torch.float32) == soundness.MOST_PAIRS
    assert length_for(config("retnet"), torch.float32) == 100_000
    assert length_for(config("retnet"), torch.bfloat16) == 16_384
    assert length_for(config("attention"), torch.bfloat16, 50) == 50


def test_mixers_that_read_tokens_and_those_with_a_longest_text_are_measured_too():
    for name in ("repeat-attention", "linformer"):
        assert drift(config(name), torch.float32, length=2000).error < 1e-3


def test_a_mixer_whose_output_starts_at_zero_is_measured_too():
    assert 0 < drift(config("rwkv-4"), torch.float32, length=200).error < 1e-5


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch):
    assert shown.soundness(["retnet"], tmp_path, 16, 64, ()) == 0
    lines = read_lines(tmp_path / "soundness.jsonl")
    assert [(line["mixer"], line["dtype"]) for line in lines] == [
        ("retnet", "float32"),
        ("retnet", "bfloat16"),
    ]

    def fail(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(shown, "drift", fail)
    assert shown.soundness(["retnet"], tmp_path, 16, 64, ()) == 0
    assert read_lines(tmp_path / "soundness.jsonl") == lines
    assert guarded(lambda: shown.soundness(["retnt"], tmp_path, 16, 64, ())) == 2
