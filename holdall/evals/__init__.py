"""What language models are worth downstream: what they recall from documents, beside what their state costs.

    suites.py       the suites: their tasks, the file of each, and how it differs from the published set
    documents.py    questions about documents, from JSON lines
    windows.py      the part of a document that is shown, cut around the answer by the model's tokens
    prompts.py      the prompt of a question: the document once, or twice
    needles.py      needles in haystacks, drawn from a seed, which need no files
    scoring.py      whether an output holds an answer; statistics.py: intervals
    harness.py      these tasks as lm-eval's, whose YAML files lie in tasks/
    folder.py       the results folder; run.py: the runner

lm-eval is the harness. Only run.py needs it; prompts, windows, needles and intervals work without.
"""
