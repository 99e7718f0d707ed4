"""A field or weight that nobody took is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from holdall.adapters import foreign
from holdall.adapters.reading import Fields, ForeignError, Weights, head_of, weights_in
from holdall.files import RunError, write_json


def test_fields_that_nobody_took_are_refused_by_name() -> None:
    fields = Fields({"hidden_size": 8, "model_type": "x", "twist": 3, "empty": None}, "config.json")
    assert fields.number("hidden_size") == 8
    with pytest.raises(ForeignError, match=r"config.json has twist = 3"):
        fields.finish()
    fields.ignore("twist")
    fields.finish()


def test_a_field_that_cannot_be_represented_is_refused_by_name() -> None:
    fields = Fields({"hidden_act": "relu", "layers": True, "bias": 1}, "config.json")
    with pytest.raises(ForeignError, match="hidden_act = 'relu' cannot be represented; it must be 'silu'"):
        fields.only("hidden_act", "silu")
    with pytest.raises(ForeignError, match="layers = True"):
        fields.number("layers")
    with pytest.raises(ForeignError, match="bias = 1"):
        fields.only("bias", False, True)
    with pytest.raises(ForeignError, match="no field 'width'"):
        fields.take("width")
    assert fields.only("tied", True, False) is True


def test_weights_are_taken_once_and_those_left_are_refused() -> None:
    weights = Weights(
        {"a.x": torch.ones(2), "a.y": lambda: torch.zeros(3), "copy": torch.ones(1)}, "model.bin"
    )
    weights.rename({"a.": "b."})
    assert weights.take("b.y").shape == (3,)
    weights.drop("copy", "not there")
    with pytest.raises(ForeignError, match=r"model.bin has weights .*: b\.x"):
        weights.finish()
    with pytest.raises(ForeignError, match=r"no weight 'b\.y'"):
        weights.take("b.y")
    weights.take("b.x")
    weights.finish()


def test_a_tied_head_may_be_there_twice_but_not_be_another() -> None:
    embed, other = torch.ones(3, 2), torch.zeros(3, 2)
    for there in ({}, {"head": embed.clone()}, {"head": embed}):
        weights = Weights(there, "model.bin")
        assert head_of(weights, "head", embed, tied=True) is None
        weights.finish()
    assert head_of(Weights({"head": other}, "model.bin"), "head", embed, tied=False) is other
    with pytest.raises(ForeignError, match=r"config ties .* head is another"):
        head_of(Weights({"head": other}, "model.bin"), "head", embed, tied=True)
    with pytest.raises(ForeignError, match="no weight 'head'"):
        head_of(Weights({}, "model.bin"), "head", embed, tied=False)


def test_parts_are_read_by_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    there = {"a": "one.safetensors", "b": "two.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": there})
    with weights_in(tmp_path) as weights:
        assert sorted(weights.names) == ["a", "b"]
        assert torch.equal(weights.take("a"), torch.ones(2))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_pickle_is_read_as_tensors_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, path)
    with weights_in(tmp_path) as weights:
        assert torch.equal(weights.take("a"), torch.ones(2))
    torch.save({"a": Evil()}, path)
    with pytest.raises(RunError, match="tensors alone"), weights_in(tmp_path):
        pass
    assert capsys.readouterr().out == ""
    path.unlink()
    with (
        pytest.raises(RunError, match=r"has no model\.safetensors, and no pytorch_model\.bin"),
        weights_in(tmp_path),
    ):
        pass


def test_a_kind_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert foreign.is_foreign(tmp_path)
    with pytest.raises(ForeignError, match="model_type = 'bert'"):
        foreign.load(tmp_path)


def test_a_config_may_say_infinity(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert foreign.is_foreign(tmp_path)
    assert foreign.read_config(path)["time_step_limit"] == [0.0, float("inf")]
    path.write_text("[]")
    with pytest.raises(RunError, match="does not hold a JSON object"):
        foreign.read_config(path)


def test_every_kind_of_model_has_its_function() -> None:
    assert list(foreign.FAMILIES) == sorted(foreign.FAMILIES)
    for kind in foreign.FAMILIES:
        assert callable(foreign.family_of({"model_type": kind}, "config.json"))
