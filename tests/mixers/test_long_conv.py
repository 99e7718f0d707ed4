"""The long convolution against torch's own, its filter's start, and where its memory ends."""

import pytest
import torch
import torch.nn.functional as F

from holdall.mixers.long_conv import LongConv, LongConvConfig
from holdall.testing import laws

DOUBLE = torch.float64


def build(**options) -> LongConv:
    return laws.build(LongConvConfig(width=6, **options)).to(DOUBLE)


@pytest.mark.claim("mixers/long_conv.py", "the squashed filter")
@pytest.mark.parametrize("squash", [0.0, 0.05])
@pytest.mark.parametrize("length", [3, 20, 60])
@torch.no_grad()
def test_it_is_torchs_conv1d_beside_the_input(squash: float, length: int) -> None:
    mixer = build(max_length=20, squash=squash)
    x_BTD = laws.draw(2, length, 6, dtype=DOUBLE)
    filter_LD = mixer.filter_LD.sign() * (mixer.filter_LD.abs() - squash).clamp(min=0)
    assert squash == 0 or 0 < filter_LD.count_nonzero() < filter_LD.numel()
    y_BDT = F.conv1d(F.pad(x_BTD.mT, (19, 0)), filter_LD.flip(0).T[:, None], groups=6)
    laws.assert_close("y", mixer(x_BTD)[0], x_BTD + y_BDT.mT)


@torch.no_grad()
def test_a_token_is_forgotten_after_max_length() -> None:
    mixer = build(max_length=20)
    x_BTD = laws.draw(1, 40, 6, dtype=DOUBLE)
    other_BTD = x_BTD.clone()
    other_BTD[:, 0] += 1
    moved_T = (mixer(x_BTD)[0] - mixer(other_BTD)[0]).abs().amax((0, 2))
    assert moved_T[:20].min() > 1e-3
    assert moved_T[20:].max() < 1e-12
    assert mixer(x_BTD)[1].past_BPD.equal(x_BTD[:, 21:])


def test_filters_start_as_published() -> None:
    torch.manual_seed(0)
    plain = LongConvConfig(width=64, max_length=1000).build().filter_LD.detach()
    assert plain.std().item() == pytest.approx(1, rel=0.02)
    squashed = LongConvConfig(width=64, max_length=1000, squash=0.003).build().filter_LD.detach()
    assert squashed[:10].std().item() == pytest.approx(0.02, rel=0.2)
    # the slowest channel falls to 1 / e over the filter, the fastest by (D / 2)^(63 / 64) times that rate
    assert squashed[-100:, 0].std().item() == pytest.approx(0.02 * 0.387, rel=0.25)
    assert squashed[200:300, -1].abs().max().item() < 0.08 * torch.e ** (-0.2 * 32 ** (63 / 64))


@pytest.mark.parametrize("options", [{"max_length": 1}, {"squash": -0.1}])
def test_bad_settings_name_the_numbers(options: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        LongConvConfig(width=6, **options)
