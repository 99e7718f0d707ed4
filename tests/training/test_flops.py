"""The peak that a share of it is printed of."""

import sys

import pytest
import torch

from holdall.training.flops import peak_flops

CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "tera", "alone"),
    [
        ("NVIDIA H200", 989, True),
        ("NVIDIA GH200 480GB", 989, True),
        ("NVIDIA H100 NVL", 835, True),
        ("NVIDIA L40S", 362, True),
        ("NVIDIA GeForce RTX 4090", 165, True),
        ("NVIDIA H100 80GB HBM3", 989.4, False),
        ("NVIDIA H100 PCIe", 756, False),
        ("NVIDIA A100-SXM4-80GB", 312, False),
        ("NVIDIA L4", 121, False),
        ("NVIDIA Abacus", None, False),
    ],
)
def test_a_card_s_peak_is_its_dense_bf16_rate(
    name: str, tera: float | None, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alone`: also without Lightning Fabric, which the other cards' figures come from."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "lightning_fabric.utilities.throughput", None)
        found = peak_flops(CARD)
        assert found == (pytest.approx(tera * 1e12) if alone and tera else None)
    pytest.importorskip("lightning_fabric", reason="needs the package lightning-fabric")
    assert peak_flops(CARD) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
