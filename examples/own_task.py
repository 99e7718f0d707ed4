"""A task of your own in one file: who is where, after everybody has moved a few times.

A row reads "name room" pairs, in which names return with other rooms, and then asks for the room of each
name: its last mention. A sum of all that was read cannot tell the last room from those before; a memory that
overwrites can.

    python examples/own_task.py

It prints a row in words, and trains two small models on the task for seconds: a sum (linear attention) and
one that overwrites (DeltaNet). examples/own_recipe.py draws more of them into one picture.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from holdall.contract import MixerConfig
from holdall.mixers.delta_net import DeltaNetConfig
from holdall.mixers.linear_attention import LinearAttentionConfig
from holdall.model import ModelConfig
from holdall.recipes.patterns import after_conv
from holdall.settings import PositiveInt
from holdall.tasks.data import DataConfig, Questions, Segment
from holdall.training.populations import TrainConfig, train


@dataclass(frozen=True)
class LastMention:
    """Rows of `mentions` pairs, then one question per name. Tokens are names, then rooms, then the mark."""

    mentions: int
    names: int
    rooms: int

    @property
    def values(self) -> int:
        """Answers that a question may have: the information floor of pictures is drawn from this."""
        return self.rooms

    def generate(self, rows: int, seed: int) -> Questions:
        generator = torch.Generator().manual_seed(seed)

        def draw(high: int, *size: int) -> torch.Tensor:
            return torch.randint(high, size, generator=generator)

        who_BM, where_BM = draw(self.names, rows, self.mentions), draw(self.rooms, rows, self.mentions)
        who_BM[:, : self.names] = torch.arange(self.names)  # each name has a room before it is asked for
        order_BM = torch.rand(rows, self.mentions, generator=generator).argsort(dim=1)
        who_BM, where_BM = who_BM.gather(1, order_BM), where_BM.gather(1, order_BM)

        # the room of a name is that of its last mention
        is_BNM = who_BM[:, None] == torch.arange(self.names)[:, None]
        last_BN = (is_BNM * torch.arange(1, self.mentions + 1)).argmax(dim=2)
        answer_BN = where_BM.gather(1, last_BN)

        pairs_BT = torch.stack((who_BM, where_BM + self.names), dim=2).flatten(1)
        mark_B1 = torch.full((rows, 1), self.names + self.rooms)
        asked_BN = torch.arange(self.names).expand(rows, -1)
        tokens_BT = torch.cat((pairs_BT, mark_B1, asked_BN), dim=1)
        at_BN = asked_BN + 2 * self.mentions + 1
        return Questions(tokens_BT, at_BN.contiguous(), answer_BN + self.names)


@dataclass(frozen=True, kw_only=True)
class LastMentionData(DataConfig):
    """Rows of the task; a segment's length is its number of mentions."""

    names: PositiveInt
    """How many names there are; all are asked for."""
    rooms: PositiveInt
    """How many rooms there are."""

    kind = "last-mention"
    difficulty = "mentions"

    @property
    def about(self) -> str:
        return "last mention: a model reads who went where, names returning, and must say where each is now"

    def task(self, segment: Segment) -> LastMention:
        if segment.length < self.names or self.vocab != self.names + self.rooms + 1:
            raise ValueError("a row mentions each name, and the vocabulary is names, rooms and a mark")
        return LastMention(mentions=segment.length, names=self.names, rooms=self.rooms)

    def tag(self, segment: Segment) -> int:
        return segment.length

    def questions_per_row(self, segment: Segment) -> int:
        return self.names

    def row_length(self, segment: Segment) -> int:
        return 2 * segment.length + 1 + self.names


def data(
    steps: int, batch: int, *, mentions: tuple[int, ...] = (8, 16), names: int = 4, rooms: int = 8
) -> LastMentionData:
    """Rows for so many steps, of equal parts with each number of mentions."""
    return LastMentionData(
        vocab=names + rooms + 1,
        names=names,
        rooms=rooms,
        train=tuple(Segment(length=n, rows=steps * batch // len(mentions)) for n in mentions),
        test=tuple(Segment(length=n, rows=100) for n in mentions),
    )


def in_words(task: LastMention) -> str:
    """The first row of a seed, read aloud."""
    names = ["Ann", "Bob", "Cid", "Dot"]
    rooms = ["attic", "cellar", "garden", "hall", "kitchen", "loft", "porch", "study"]
    row = Questions(*(part[0] for part in task.generate(1, seed=0)))
    words = [*names[: task.names], *rooms[: task.rooms], "| where is"]
    read = " ".join(words[token] for token in row.tokens_BN)
    return f"{read}? {' '.join(words[token] for token in row.answer_BQ)}"


def main() -> None:
    print(in_words(LastMention(mentions=8, names=4, rooms=8)))
    steps, batch = 200, 32
    mixers: dict[str, MixerConfig] = {
        "a sum": LinearAttentionConfig(width=32),
        "one that overwrites": DeltaNetConfig(width=32),
    }
    for label, mixer in mixers.items():
        config = TrainConfig(
            model=ModelConfig(vocab=13, width=32, layers=after_conv(mixer)),
            data=data(steps, batch),
            learning_rates=(0.01,),
            batch=batch,
            weight_decay=0.01,
        )
        with tempfile.TemporaryDirectory() as folder:
            (result,) = train(config, Path(folder) / "run")
        by_mentions = ", ".join(
            f"{share:.0%} of {n}" for n, share in result["accuracy_by_difficulty"].items()
        )
        print(
            f"{label}, {steps} steps: {result['accuracy']:.0%} right, by mentions {by_mentions} (chance: 12%)"
        )


if __name__ == "__main__":
    main()
