"""Small data folders for the tests of evaluations: lines of every form."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdall.evals import suites

ROWS: dict[str, list[dict[str, Any]]] = {
    "fda": [
        {
            "id": f"K{number}",
            "text": "Class II device of Ames Labs. Glucose and Urea. Summary of information above... no",
            "attributes": {
                "regulatory_class": ["Class II"],
                "Made by": [": ames labs"],
                "Analyte(s)": ["Glucose", "Urea", "Iron"],
                "Empty": [],
                "Elsewhere": ["no"],
            },
        }
        for number in range(3)
    ],
    "squad": [
        {
            "id": "a",
            "context": "Normandy is in France.",
            "question": "Where? ",
            "answers": ["France", "France"],
        },
        {"id": "b", "context": "Vitamin C is in lemons.", "question": "Which?", "answers": ["C"]},
        {"id": "c", "context": "Nothing is said.", "question": "Who?", "answers": ["Somebody"]},
    ],
    "drop": [
        {
            "id": "a",
            "context": "They scored 24 points, the Bears 7.",
            "question": "Who?",
            "answer": {"spans": ["Bears", "They"], "number": "", "date": {}},
        },
        {
            "id": "b",
            "context": "They scored 24 points, the Bears 7.",
            "question": "How many?",
            "answer": {"spans": [], "number": "24", "date": {}},
        },
        {
            "id": "c",
            "context": "They scored 24 points, the Bears 7.",
            "question": "How many more?",
            "answer": {"spans": [], "number": "17", "date": {}},
        },
    ],
    "kv_retrieval": [
        {"id": "0", "ordered_kv_records": [["k1", "v1"], ["k2", "v2"]], "key": "k2", "value": "v2"}
    ],
}


def written(folder: Path, name: str, rows: list[Any], ending: str = ".jsonl") -> Path:
    """The file of a task, with these rows."""
    path = folder / f"{suites.named(name).file}{ending}"
    opened: Callable[..., Any] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opened(path, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path
