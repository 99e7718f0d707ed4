"""The noise of draws looks random by every test of a battery that numpy's Philox passes too.

Each test of the battery gives a z, normal with variance 1 for random words, or a p-value that is turned into
one. The words are fixed by the code, so that a test passes or fails for ever: nothing here is flaky.

Letters: S seeds, P positions, B pairs of both, V tokens.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from holdall.ops import noise

LIMIT = 5.5
"""|z| beyond which a test fails. One in 26 million; a battery here takes the largest of some 20,000."""

Words = Callable[[Tensor, Tensor, int], Tensor]
"""Like `noise.words`: of seeds (B,), positions (B,) and a vocabulary, the words (B, V)."""


def grid(words: Words, seeds: list[int], positions: list[int], vocab: int) -> np.ndarray:
    """The words of all seeds at all positions, (S, P, V) uint32."""
    seed_B = torch.tensor(seeds).repeat_interleave(len(positions))
    words_BV = words(seed_B, torch.tensor(positions).repeat(len(seeds)), vocab)
    return words_BV.numpy().astype(np.uint32).reshape(len(seeds), len(positions), vocab)


def bits(words_N: np.ndarray) -> np.ndarray:
    """The bits of words as -1 and 1, (N, 32) fp32: sums of them are exact up to 2^24."""
    by_byte = np.unpackbits(words_N.astype(">u4").view(np.uint8).reshape(-1, 4), axis=1)
    return by_byte.astype(np.float32) * 2 - 1


def of_counts(count: np.ndarray, expected: np.ndarray | float) -> float:
    """The z of a chi-square over bins."""
    total = float(((count - expected) ** 2 / expected).sum())
    return float(stats.norm.isf(stats.chi2.sf(total, count.size - 1)))


def alone(words_N: np.ndarray) -> Iterator[tuple[str, float]]:
    """Bits and bytes are as often each value, and the mean and variance are those of uniform numbers."""
    n = len(words_N)
    yield "bits", float(np.abs(bits(words_N).sum(0, dtype=np.float64)).max() / math.sqrt(n))
    for byte in range(4):
        yield f"byte {byte}", of_counts(np.bincount(words_N >> 8 * byte & 255, minlength=256), n / 256)
    u_N = (words_N + 0.5) * 2.0**-32
    yield "mean", float((u_N.mean() - 0.5) * math.sqrt(12 * n))
    yield "variance", float((((u_N - 0.5) ** 2).mean() - 1 / 12) * math.sqrt(180 * n))


def together(one_N: np.ndarray, other_N: np.ndarray) -> Iterator[tuple[str, float]]:
    """No bit of one says anything of a bit of the other, nor the size of one of the other's."""
    n = len(one_N)
    correlation = bits(one_N).T @ bits(other_N)
    yield "bit against bit", float(np.abs(correlation).max() / math.sqrt(n))
    one, other = ((words / 2.0**32 - 0.5) * math.sqrt(12) for words in (one_N, other_N))
    yield "size against size", float((one * other).sum() / math.sqrt(n))
    both = (one_N >> 28) * 16 + (other_N >> 28)
    yield "pairs of the highest bits", of_counts(np.bincount(both, minlength=256), n / 256)
    yield (
        "pairs of the lowest bits",
        of_counts(np.bincount((one_N & 15) * 16 + (other_N & 15), minlength=256), n / 256),
    )


def neighbours(words: Words) -> Iterator[tuple[str, float]]:
    """Seeds, positions and tokens that follow each other, one by one and two at once."""
    cube_SPV = grid(words, list(range(32)), list(range(64)), 128)
    yield from named("cube", alone(cube_SPV.ravel()))
    for axis, name in enumerate(("seed", "position", "token")):
        for lag in (1, 2, 16):
            ranges = (range(cube_SPV.shape[axis] - lag), range(lag, cube_SPV.shape[axis]))
            one, other = (np.take(cube_SPV, at, axis).ravel() for at in ranges)
            yield from named(f"{name} + {lag}", together(one, other))
            yield from named(f"{name} + {lag}, differences", alone(one ^ other))
    for lag in (1, 2):
        one, other = cube_SPV[lag:, :-lag].ravel(), cube_SPV[:-lag, lag:].ravel()
        yield from named(f"seed + {lag}, position - {lag}", together(one, other))
        one, other = cube_SPV[:, lag:, :-lag].ravel(), cube_SPV[:, :-lag, lag:].ravel()
        yield from named(f"position + {lag}, token - {lag}", together(one, other))


def one_bit_apart(words: Words) -> Iterator[tuple[str, float]]:
    """Every bit of the seed and of the position counts."""
    first_V = grid(words, [5], [9], 1 << 14)[0, 0]
    for bit in range(63):
        other_V = grid(words, [5 ^ 1 << bit], [9], 1 << 14)[0, 0]
        yield from named(f"seed's bit {bit}", together(first_V, other_V))
        other_V = grid(words, [5], [9 ^ 1 << bit], 1 << 14)[0, 0]
        yield from named(f"position's bit {bit}", together(first_V, other_V))


def large_vocabulary(words: Words) -> Iterator[tuple[str, float]]:
    yield from alone(grid(words, [7], [0, 1, 2, 3], 50_257).ravel())


def repeats(words: Words) -> Iterator[tuple[str, float]]:
    """No two of a million pairs of seed and position have the same noise: in 64 bits, 3e-8 would."""
    word_SPV = grid(words, list(range(1 << 10)), list(range(1 << 10)), 2).astype(np.uint64)
    both_SP = word_SPV[..., 0] << np.uint64(32) | word_SPV[..., 1]
    yield "pairs with the same noise", 100.0 * (both_SP.size - len(np.unique(both_SP)))


def named(where: str, tests: Iterator[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    return ((f"{where}: {name}", z) for name, z in tests)


BATTERY = (neighbours, one_bit_apart, large_vocabulary, repeats)
Part = Callable[[Words], Iterator[tuple[str, float]]]


def failures(part: Part, words: Words) -> dict[str, float]:
    return {name: round(z, 1) for name, z in part(words) if not abs(z) < LIMIT}


@pytest.mark.parametrize("part", BATTERY)
def test_the_noise_passes(part: Part) -> None:
    assert failures(part, noise.words) == {}


def philox(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    """The control: numpy's generator, one stream for all that is asked for at once."""
    generator = np.random.Philox([int(seed_B.sum()), int(position_B.sum()), vocab])
    return torch.from_numpy(np.random.Generator(generator).integers(0, 1 << 32, (len(seed_B), vocab)))


@pytest.mark.full
@pytest.mark.parametrize("part", BATTERY)
def test_philox_passes(part: Part) -> None:
    assert failures(part, philox) == {}


def one_key(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    """All that is known of seed and position in one word: what stood here first, and failed."""
    key_B = torch.full_like(seed_B, 0x9E3779B9)
    for word_B in (seed_B & noise.MASK, seed_B >> 32, position_B & noise.MASK, position_B >> 32):
        key_B = noise._mixed((key_B + word_B) & noise.MASK)
    other_B = noise._mixed((key_B + 0x85EBCA6B) & noise.MASK)
    word_BV = (torch.arange(vocab) + key_B[:, None]) & noise.MASK
    return noise._mixed(noise._mixed(word_BV) ^ other_B[:, None])


def low_words_only(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    return noise.words(seed_B & noise.MASK, position_B, vocab)


def mixed_too_little(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    """Half a round for the tokens."""
    one_B, _ = noise._keys(seed_B, position_B)
    word_BV = (torch.arange(vocab) + one_B[:, None]) & noise.MASK
    return (word_BV ^ word_BV >> 16) * 0x7FEB352D & noise.MASK


def seed_plus_position(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    return noise.words(seed_B + position_B, torch.zeros_like(position_B), vocab)


def biased(seed_B: Tensor, position_B: Tensor, vocab: int) -> Tensor:
    """The highest bit is 1 in 51% of words."""
    word_BV = noise.words(seed_B, position_B, vocab)
    return torch.where(word_BV % 100 < 2, word_BV | 1 << 31, word_BV)


@pytest.mark.parametrize(
    ("words", "part", "test"),
    [
        (one_key, repeats, "pairs with the same noise"),
        (low_words_only, one_bit_apart, "seed's bit 40: bit against bit"),
        (mixed_too_little, neighbours, "token + 1: bit against bit"),
        (seed_plus_position, neighbours, "seed + 1, position - 1: size against size"),
        (biased, large_vocabulary, "bits"),
    ],
)
def test_the_battery_sees_bad_noise(words: Words, part: Part, test: str) -> None:
    assert test in failures(part, words)


def test_gumbel_noise_has_its_distribution() -> None:
    seed_B = torch.arange(8)
    noise_BV = noise.gumbel(seed_B, torch.zeros_like(seed_B), 1 << 15)
    assert stats.kstest(noise_BV.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    # the largest values, which decide draws: E is exponential, so that below 1e-4 it is nearly uniform
    tail_N = (-noise_BV[noise_BV > -math.log(1e-3)]).exp().double().numpy()
    assert stats.kstest(tail_N, lambda e: -np.expm1(-e) / -np.expm1(-1e-3)).pvalue > 1e-3


def test_the_noise_of_extreme_words_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "words", lambda *_: torch.tensor([[0, noise.MASK - 1, noise.MASK]]))
    largest, second, least = noise.gumbel(torch.zeros(1), torch.zeros(1), 3)[0].tolist()
    assert largest == pytest.approx(33 * math.log(2), rel=1e-6)  # of u = 2^-33
    assert second == least == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)  # of u = 1 - 2^-24


EXPECTED = [
    [82677089, 3610068758, 2265907812],
    [3819578830, 3782328715, 2758479220],
    [81578648, 1303353107, 3608405731],
]


def test_words_are_these() -> None:
    """A seed's text is the same in the next version: a change of the hash is seen here."""
    seed_B, position_B = torch.tensor([0, 1, 2**63 - 1]), torch.tensor([0, 1, 2**40])
    assert noise.words(seed_B, position_B, 3).tolist() == EXPECTED
