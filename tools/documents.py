"""Tables in docs that a program writes: what stands between two comments."""

from __future__ import annotations


def marks(name: str) -> tuple[str, str]:
    """The comments around a table."""
    return f"<!-- {name}: written by a program -->\n", f"<!-- end of {name} -->\n"


def replaced(page: str, name: str, text: str) -> str:
    """The page with another text between its comments."""
    start, end = marks(name)
    before, rest = page.split(start)
    return f"{before}{start}\n{text.strip()}\n\n{end}{rest.split(end)[1]}"
