"""Figure 2 of "Just read twice": set disjointness against bytes of state, for both orders of the sets.

Arora et al., 2024, arXiv 2407.05483, section 3 and its published configs: four layers, a short convolution
and Taylor linear attention twice, of five widths and four feature dimensions, once causal and once not, which
then reads the whole input at every token. Trained on sets of 4 to 256 tokens in both orders, tested on up to
768. In the paper the causal models answer clearly better with the short set first, by less the larger their
state is; the others beat them with the long set first at every size, and hardly depend on the order.

    holdall frontier jrt-figure2 --dry-run
    holdall frontier jrt-figure2 --width 64 --steps 30000 --rates 0.0005 0.001 0.002      a piece of it

Twelve sizes of 20,000 rows in 48 epochs are 90,000 steps of 128 rows; `--steps` takes fewer, whose learning
rate moves at every step. They are rounded down, by less than 12 in each epoch, to as many for each size; the
command says to what. `--passes 2` reads each row's whole input twice: then causal models have seen both
sets before they choose what to keep.

Deviations:
- no dropout (published: 0.1 of embeddings), and passes in bf16 (holdall/precision.py);
- a layer has no MLP and adds its mixer's output alone, where the published code adds the normalised stream
  once more and the paper has an MLP; `mlp` of `sweeps` puts one there;
- causal outputs are divided by the sum of their weights over the past, which the published quadratic form
  divides by the token's own weight;
- models that read the whole input have keys and values of their own for that, as JRT-RNN does, where the
  published ones use those of the causal part;
- convolutions are causal in all models: the published ones that are not see the row's end at its first two
  tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdall.contract import MixerConfig
from holdall.mixers.prefix_linear_attention import PrefixLinearAttentionConfig
from holdall.mixers.taylor import TaylorConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.settings import Precision
from holdall.sweeps import Point, SweepConfig
from holdall.tasks.data import SetDisjointnessData, SetSegment
from holdall.training.populations import TrainConfig

VOCAB, BATCH, ROWS, EPOCHS, HEADS = 2048, 128, 20_000, 48, 2
WIDTHS, FEATURE_DIMS = (36, 48, 64, 96, 128), (4, 8, 16, 24)
RATES = (0.0001, 0.0005, 0.0008)
CAUSAL, WHOLE = "causal Based", "non-causal Based"

TRAIN = ((4, 16), (8, 32), (16, 64), (4, 128), (16, 256), (4, 256))
TEST = ((1, 32), (4, 32), (4, 128), (16, 256), (4, 256), (16, 512), (4, 512), (8, 768), (16, 768), (4, 768))
"""Sizes of the two sets; each is there in both orders."""


def both_orders(sizes: Sequence[tuple[int, int]], rows: int) -> tuple[SetSegment, ...]:
    """So many rows of each pair of sizes, and of each in the other order."""
    return tuple(
        SetSegment.of(*order, rows) for short, long in sizes for order in ((short, long), (long, short))
    )


def data(steps: int | None = None, *, vocab: int = VOCAB, passes: int = 1) -> SetDisjointnessData:
    """The published rows, or those of so many steps, of which an epoch has no more than is published.

    Raises ValueError for fewer steps than one of each size and order.
    """
    rows = ROWS
    if steps is not None:
        if steps < 2 * len(TRAIN):
            raise ValueError(f"{steps} steps are fewer than one for each of {2 * len(TRAIN)} sizes of sets")
        rows = BATCH * (steps // (2 * len(TRAIN) * epochs(steps)))
    return SetDisjointnessData(
        vocab=vocab, reads=passes, train=both_orders(TRAIN, rows), test=both_orders(TEST, 1000)
    )


def epochs(steps: int | None) -> int:
    """Epochs of so many steps; the published ones for None."""
    return EPOCHS if steps is None else -(-steps // (2 * len(TRAIN) * -(-ROWS // BATCH)))


def points(
    data: SetDisjointnessData,
    sizes: Sequence[tuple[int, int]],
    seeds: int,
    *,
    batch: int,
    epochs: int,
    rates: Sequence[float],
    schedule: str = "step",
    depth: int = 4,
    mlp: int = 0,
    weight_decay: float = 0.1,
    evaluate_every: int = 0,
    precision: Precision = "fp32",
) -> tuple[Point, ...]:
    """A causal model and one that is not, of each (width, feature dimension).

    mlp: the width of each layer's MLP in widths of the model; 0 for none.
    Raises ValueError for an odd depth: a convolution and a mixer take turns.
    """
    if depth % 2:
        raise ValueError(f"depth {depth} is odd; a convolution and a mixer take turns")
    found = []
    for width, f in sizes:
        mixers: dict[str, MixerConfig] = {
            CAUSAL: TaylorConfig(width=width, feature_dim=f, heads=HEADS),
            WHOLE: PrefixLinearAttentionConfig(width=width, feature_dim=f, heads=HEADS, prefix=data.longest),
        }
        for family, mixer in mixers.items():
            train = TrainConfig(
                model=ModelConfig(
                    vocab=data.vocab, width=width, layers=after_conv(mixer) * (depth // 2), mlp=mlp * width
                ),
                data=data,
                learning_rates=tuple(rates),
                seeds=tuple(range(seeds)),
                batch=batch,
                epochs=epochs,
                schedule=schedule,  # type: ignore[arg-type]
                weight_decay=weight_decay,
                evaluate_every=evaluate_every,
                precision=precision,
            )
            found.append(Point(label=f"{family}, f = {f}", family=family, train=train))
    return tuple(found)


def sweeps(
    seeds: int = 1,
    *,
    passes: int = 1,
    vocab: int = VOCAB,
    width: Sequence[int] = WIDTHS,
    depth: int = 4,
    steps: int | None = None,
    rates: Sequence[float] = RATES,
    mlp: int = 0,
) -> tuple[SweepConfig, ...]:
    """Twenty sizes of both kinds at three learning rates, 48 epochs of 240,000 rows; the paper has two seeds.

    steps: instead of the epochs. mlp: the width of each layer's MLP in widths of the model; 4 is the paper's.
    """
    found = points(
        data(steps, vocab=vocab, passes=passes),
        [(size, f) for size in width for f in FEATURE_DIMS],
        seeds,
        batch=BATCH,
        epochs=epochs(steps),
        rates=rates,
        schedule="epoch" if steps is None else "step",
        depth=depth,
        mlp=mlp,
        precision="bf16",
    )
    return (SweepConfig(recipe="jrt-figure2", points=found),)
