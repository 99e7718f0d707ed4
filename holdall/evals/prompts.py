r"""The prompt of a question: the document once, or twice; pure functions of what is shown and asked.

With C the part of the document that is shown, without a full stop at its end:

              read once                     read twice
    key       C. Key:                       Information about Key. C.\nC. Key:
    passage   C.\nCLOZE                     QUESTION C.\nC.\nCLOZE
    question  C. CLOZE                      QUESTION C.\nC. CLOZE

These are the templates of "Just read twice" (arXiv 2407.05483) in its published code: "key" of FDA and SWDE,
"passage" of SQuAD, "question" of NQ and DROP. There CLOZE is the question as a statement that was cut before
its answer. The files here have questions, so CLOZE is "Question: ...\nAnswer:", for SQuAD on a new
line. "kv" is the prompt of key-value retrieval in "Lost in the middle" (arXiv 2307.03172).

Letters: C the part of the document that is shown.
"""

from __future__ import annotations

from collections.abc import Callable

FORMS = {
    "fda": "key",
    "swde": "key",
    "squad": "passage",
    "nq": "question",
    "drop": "question",
    "kv_retrieval": "kv",
}
"""The form of each task's prompts, by its name."""


def prompt(form: str, context: str, asked: str, reads: int | None) -> str:
    """The prompt of a form of the table above. Raises ValueError if it does not show documents so often."""
    made = _FORMS.get((form, reads or 1))
    if made is None:
        raise ValueError(f"there is no prompt of the form {form!r} that shows a document {reads} times")
    return made(context, asked)


def without_end(context: str, ending: str) -> str:
    """A document without copies of an ending, in any case, and without full stops and spaces at its ends."""
    while ending and context.lower().endswith(ending.lower()):
        context = context[: -len(ending)]
    return context.strip().strip(".").strip()


def _named(asked: str) -> str:
    return asked[:1].upper() + asked[1:]


def _key_once(context: str, asked: str) -> str:
    return f"{without_end(context, asked + ':')}. {_named(asked)}:"


def _key_twice(context: str, asked: str) -> str:
    shown, name = without_end(context, asked + ":"), _named(asked)
    return f"Information about {name}. {shown}.\n{shown}. {name}:"


def _cloze(asked: str) -> str:
    return f"Question: {asked}\nAnswer:"


def _passage_once(context: str, asked: str) -> str:
    return f"{without_end(context, asked)}.\n{_cloze(asked)}"


def _passage_twice(context: str, asked: str) -> str:
    shown = without_end(context, asked)
    return f"{asked} {shown}.\n{shown}.\n{_cloze(asked)}"


def _question_once(context: str, asked: str) -> str:
    return f"{without_end(context, asked)}. {_cloze(asked)}"


def _question_twice(context: str, asked: str) -> str:
    shown = without_end(context, asked)
    return f"{asked} {shown}.\n{shown}. {_cloze(asked)}"


def _kv(context: str, asked: str) -> str:
    return (
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{context}\n\nKey: "{asked}"\nCorresponding value:'
    )


_FORMS: dict[tuple[str, int], Callable[[str, str], str]] = {
    ("key", 1): _key_once,
    ("key", 2): _key_twice,
    ("passage", 1): _passage_once,
    ("passage", 2): _passage_twice,
    ("question", 1): _question_once,
    ("question", 2): _question_twice,
    ("kv", 1): _kv,
}
