"""The house is in order: small files, small rooms, and docs that name what there is."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "patchpipe"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES, MOST_FILES, LONGEST_FUNCTION = 400, 12, 80
FOLDERS = sorted({file.parent for file in PACKAGE.rglob("*.py")})


def test_no_file_is_too_long() -> None:
    lengths = {
        file.relative_to(PACKAGE).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in PACKAGE.rglob("*.py")
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_no_function_is_too_long() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{file}: {node.name}"


def test_no_room_is_too_full() -> None:
    full = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in FOLDERS}
    assert max(full.values()) <= MOST_FILES, full


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_room_says_what_lives_there(folder: Path) -> None:
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))


def test_the_drawing_of_the_rooms_is_the_contract() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    drawn = [line.split("│")[1].strip() for line in drawing.splitlines() if line.count("│") == 3]
    assert drawn == [layer for layer in layers if layer != "__main__"]


@cache
def sources() -> list[str]:
    """All Python files, but those of a virtual environment, which are thousands."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    return [file.as_posix() for folder in folders for file in folder.rglob("*.py")]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_files_that_docs_name_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:[\w-]+/)+\w+\.py)\b", text):
        assert any(path.endswith(f"/{name}") for path in sources()), name
