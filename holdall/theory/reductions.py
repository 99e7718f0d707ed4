"""Recall and set disjointness are one problem: each solves the other. The solver is given as a function.

    disjointness by recall    pairs (a, a) for a in A, and every b of B as a question: the sets meet if and
                              only if one of the questions has an answer. One call.
    recall by disjointness    is q among the keys?  disjoint(keys, {q}). Then bit i of its value: among the
                              keys whose value has bit i? disjoint(those, {q}). A call per bit, and one more.

So a bound for one of them is a bound for the other, up to the bits of a value: "Just read twice" (Arora et
al., 2024, arXiv 2407.05483), appendix G.25 and G.26, for general associative recall, where a key may be
missing. The paper's log2 c calls take a code of the value that is never all zeros; here the first call asks.

Letters: A and B the sets, a and b their elements, q a question, i a bit, c values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

Recall = Callable[[Sequence[tuple[int, int]], Sequence[int]], Sequence[int | None]]
"""From key-value pairs and questions to values, None for a key that is not there."""
Disjoint = Callable[[Collection[int], Collection[int]], bool]
"""Whether two sets have no common element."""


def disjoint_by_recall(recall: Recall) -> Disjoint:
    """What answers set disjointness with one call of something that recalls."""

    def disjoint(first: Collection[int], second: Collection[int]) -> bool:
        answers = recall([(element, element) for element in first], list(second))
        return all(answer is None for answer in answers)

    return disjoint


def recall_by_disjointness(disjoint: Disjoint, values: int) -> Recall:
    """What recalls values below `values` with 1 + ceil(log2 values) calls per question of something that
    tells whether sets are disjoint. Raises ValueError for a value out of this range."""

    def recall(pairs: Sequence[tuple[int, int]], questions: Sequence[int]) -> list[int | None]:
        held: Mapping[int, int] = dict(pairs)
        if not all(0 <= value < values for value in held.values()):
            raise ValueError(f"values must be from 0 to {values - 1}")
        bits = max(values - 1, 0).bit_length()
        keys_of_bit = [{key for key, value in held.items() if value >> bit & 1} for bit in range(bits)]
        answers: list[int | None] = []
        for question in questions:
            if disjoint(held.keys(), {question}):
                answers.append(None)
                continue
            found = (not disjoint(keys, {question}) for keys in keys_of_bit)
            answers.append(sum(1 << bit for bit, is_set in enumerate(found) if is_set))
        return answers

    return recall
