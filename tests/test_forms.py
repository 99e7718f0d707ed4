"""The choice of a form belongs to the op: mixers name no kernel, and an op finds its kernel by its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import holdall
from holdall.contract import forms

PACKAGE = Path(holdall.__file__).parent
BACKENDS = {"kernels", "kernel_of", "triton", "fla", "importlib", "__import__"}


def names_in(tree: ast.AST) -> set[str]:
    """All names that code uses or imports, dotted ones in parts; not what docstrings and messages say."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found |= {part for module in modules for part in module.split(".")}
    return found


# __init__.py imports the mixers by their files' names
@pytest.mark.parametrize("path", sorted((PACKAGE / "mixers").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_mixer_names_no_kernel_and_no_backend(path: Path) -> None:
    assert not names_in(ast.parse(path.read_text())) & BACKENDS


@pytest.mark.parametrize(
    "line",
    [
        "from holdall.kernels.short_conv import short_conv",
        "from holdall import kernels",
        "import holdall.kernels.fla as backend",
        "import triton.language as tl",
        "y = forms.kernel_of(short_conv)(x)",
        "module = importlib.import_module(name)",
    ],
)
def test_it_would_be_seen(line: str) -> None:
    assert names_in(ast.parse(f"def forward(self):\n    {line}")) & BACKENDS


def functions_of(path: Path) -> set[str]:
    """What a file defines, or has from another one."""
    body = ast.parse(path.read_text()).body
    imported = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    return imported | {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_op_that_has_a_kernel_finds_it_by_its_name() -> None:
    twins = {}
    for path in sorted((PACKAGE / "ops").glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        asked = {
            call.args[0].id  # type: ignore[attr-defined]
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "kernel_of"
        }
        if asked:
            twins[path.stem] = asked
            assert asked <= functions_of(path) & functions_of(PACKAGE / "kernels" / path.name), path.stem
    assert len(twins) >= 15


def test_an_op_beside_one_with_a_kernel_has_a_plain_form() -> None:
    assert [forms.plain(form) for form in ("loop", "parallel", "kernel")] == ["loop", "parallel", "parallel"]
