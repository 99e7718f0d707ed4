"""Read today, resume tomorrow: the state of a text in a file, whose size does not depend on the text.

    python examples/state_save_resume.py

It reads a text with the small model that comes with Holdall, saves what the model remembers, and resumes in
another process, which never sees the text. Then the same one level down, with the states of a mixer: rows are
selected, joined, saved, loaded and moved to bf16.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import holdall
from holdall import states

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
RESUME = """
import sys, holdall
model = holdall.load()
session = model.load_session(sys.argv[1])
print(model.generate("must be ", session=session, max_tokens=40, temperature=0.0))
"""


def of_a_text(folder: Path) -> None:
    model = holdall.load()
    for times in (1, 10):
        session = model.read(TEXT * times)
        print(f"{session.past.count:5,} tokens read: {session.nbytes:,} bytes")
    file = folder / "session.safetensors"
    session = model.read(TEXT)
    model.save_session(session, file)
    here = model.generate("must be ", session=session, max_tokens=40, temperature=0.0)
    there = subprocess.run(
        [sys.executable, "-c", RESUME, file], capture_output=True, text=True, check=True
    ).stdout.removesuffix("\n")
    print(f"in this process:    {here!r}")
    print(f"in another process: {there!r}")


def of_a_mixer(folder: Path) -> None:
    torch.manual_seed(0)
    mixer = holdall.build("delta-net", width=64)
    with torch.no_grad():
        _, state = mixer(torch.randn(3, 50, 64))  # three rows of 50 tokens
        _, other = mixer(torch.randn(1, 200, 64))  # and one of 200

        batch = states.join([states.select(state, [2, 0]), other])
        next_BTD = torch.randn(3, 1, 64)
        want_BTD, _ = mixer(next_BTD, batch)

        states.save(batch, folder / "batch.safetensors", tokens_read=[50, 50, 200])
        print("the file has rows that have read", states.describe(folder / "batch.safetensors").tokens_read)
        resumed = states.load(folder / "batch.safetensors", mixer)
        got_BTD, _ = mixer(next_BTD, resumed)
        print("resumed from the file, outputs are bit-identical:", torch.equal(got_BTD, want_BTD))

        mixer.bfloat16()
        resumed = states.to(resumed, mixer)
        got_BTD, _ = mixer(next_BTD.bfloat16(), resumed)
        dtypes = sorted({str(tensor.dtype) for tensor in resumed})
        error = (got_BTD - want_BTD).abs().max() / want_BTD.abs().max()
        print(f"in bf16, the state {' and '.join(dtypes)}: {error:.1%} off")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        of_a_text(Path(folder))
        of_a_mixer(Path(folder))


if __name__ == "__main__":
    main()
