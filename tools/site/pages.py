"""The pages of the documentation site, `make docs`: the repository's own, under the same paths.

A page links to its neighbours as it does in the repository, so links need no care. What it links to that is
no page is made one (source files) or copied (pictures, results). The API reference is made of the names that
rooms export; everything is read, nothing imported, so that a site is built without PyTorch.

MkDocs calls the functions that begin with `on_`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ASSETS = ("tools/site/style.css", "tools/site/iframe-worker.js")
PAGES = ("*.md", "docs/*.md", "examples/*.md", "results/*.md", "results/*/*.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
"""What a Markdown link or image leads to, if it is a file."""

REFERENCE = {
    "holdall": ("build", "describe", "load", "names"),
    "holdall.states": (...,),
    "holdall.contract": ("Mixer", "MixerConfig", "register", "Paper", "Entry", "State", "StateError", ...),
    "holdall.language_model": ("LanguageModel", "Score"),
    "holdall.model": ("Model", "ModelConfig"),
    "holdall.engine": (...,),
    "holdall.tasks.data": ("DataConfig", "Segment", "Questions", "Task", "MQARData", "SingleQueryData"),
    "holdall.training.populations": ("TrainConfig", "Progress", "train", "trained"),
    "holdall.recipes": ("sweeps",),
    "holdall.sweeps": (...,),
    "holdall.report": (...,),
    "holdall.theory.by_hand": ("constructions", "configured", "right", "ByHandConfig", "HandBuilt", "Report"),
    "holdall.theory.circuits": ("Circuit", "Symbol"),
    "holdall.theory.compile": ("compile_circuit", "compile_formula", "Compiled", "CompileReport"),
    "holdall.theory.primitives": ("Layer", "Stack", "StackReport"),
    "holdall.theory.reductions": ("disjoint_by_recall", "recall_by_disjointness"),
    "holdall.theory.degree": ("degree_along", "degree_of_bits"),
    "holdall.theory.complexity": ("measure", "growth", "slope", "promised", "Cost"),
    "holdall.theory.sorting": ("Recall", "all_pairs", "by_sorting"),
    "holdall.testing.laws": ("Case", "cases", "Law", "LAWS", "Verdict", "judge"),
    "holdall.settings": ("Range",),
}
"""The modules of the reference, each with its public names; `...` are the others of its `__all__`."""


def exported(module: str) -> tuple[str, ...]:
    """The names in a module's `__all__`, constants last."""
    for node in ast.parse(file_of(module).read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(sorted(ast.literal_eval(node.value), key=str.isupper))
    raise ValueError(f"{module} has no __all__: name what is public in tools/site/pages.py")


def file_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def docstring_of(file: Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""


def reference_page(module: str, wanted: tuple[Any, ...]) -> str:
    """One module: its docstring, then each public name."""
    names = [name for name in wanted if name is not ...]
    if ... in wanted:
        names += [name for name in exported(module) if name not in names]
    lines = [f"# {module}", "", docstring_of(file_of(module)), ""]
    for name in names:
        lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


def source_page(file: Path) -> str:
    """A source file as a page: what it says of itself, then all of it."""
    text = file.read_text("utf-8")
    about, name = docstring_of(file), file.relative_to(ROOT).as_posix()
    return f"# {name}\n\n````text\n{about}\n````\n\n## Source\n\n````python\n{text}````\n"


def linked(page: Path) -> Iterator[Path]:
    """The files that a page links to."""
    for link in LINK.findall(page.read_text("utf-8")):
        target = (page.parent / link).resolve()
        if target.is_file() and target.is_relative_to(ROOT):
            yield target


def sources(path: Path) -> str:
    """The page of a source file: its own path and .md."""
    return path.relative_to(ROOT).as_posix() + ".md"


def on_files(files: Files, config: Any) -> Files:
    """The repository's files in place of those in docs/ alone; the theme's stay."""
    made = Files([file for file in files if file.src_dir != config.docs_dir])
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    targets = dict.fromkeys(target for page in pages for target in linked(page) if target not in pages)
    for path in (
        *pages,
        *(target for target in targets if target.suffix != ".py"),
        *map(ROOT.joinpath, ASSETS),
    ):
        made.append(
            File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        )
    for path in targets:
        if path.suffix == ".py":
            made.append(File.generated(config, sources(path), content=source_page(path)))
    for module, names in REFERENCE.items():
        content = reference_page(module, names)
        made.append(File.generated(config, f"reference/{module}.md", content=content))
    return made


def on_config(config: Any) -> Any:
    """The reference's pages in their place of the navigation."""
    pages = [f"reference/{module}.md" for module in REFERENCE]
    config.nav = [
        {"Reference": pages} if entry == {"Reference": "reference"} else entry for entry in config.nav
    ]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to source files lead to their pages."""
    here = (ROOT / page.file.src_uri).parent

    def led(match: re.Match[str]) -> str:
        target = (here / match[1]).resolve()
        return match[1] + ".md" if target.suffix == ".py" and target.is_file() else match[1]

    return LINK.sub(led, markdown) if "/" not in page.file.src_uri or page.file.abs_src_path else markdown
