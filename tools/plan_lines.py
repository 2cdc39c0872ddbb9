"""How many lines each plan takes, as ``ruff format`` writes them, and the table of them in docs/models.md.

A plan's lines are those of its own statement, and of every name in its file, or another, that it needs and no other
plan does. What several plans need is vocabulary, and counted by itself. Imports, comments between statements and
docstrings are not counted.

    python -m tools.plan_lines          # the table
    python -m tools.plan_lines --write  # put into docs/models.md
"""

from __future__ import annotations

import argparse
import ast
import statistics
from pathlib import Path

from patchpipe.models import PLANS
from tools.documents import replaced

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ROOT / "patchpipe" / "models" / "families"
Name = tuple[str, str]  # module and name


class Statements:
    """The top-level names of the families' files: their lines, and the other names each of them needs."""

    def __init__(self) -> None:
        self.lines: dict[Name, int] = {}
        self.needs: dict[Name, set[Name]] = {}
        self.plans: dict[str, Name] = {}
        self.branches: list[str] = []
        for file in sorted(FAMILIES.rglob("*.py")):
            self._read(file)

    def _read(self, file: Path) -> None:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        branching = (ast.If, ast.IfExp, ast.Match, ast.While, ast.Try)
        self.branches += [f"{module}:{node.lineno}" for node in ast.walk(tree) if isinstance(node, branching)]
        known: dict[str, Name] = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                known |= {alias.name: (node.module or "", alias.name) for alias in node.names}
        for node in tree.body:
            names = _named(node)
            for name in names:
                known[name] = (module, name)
                self.lines[module, name] = ((node.end_lineno or 0) - node.lineno + 1) if name == names[0] else 0
            used = {known[each.id] for each in ast.walk(node) if isinstance(each, ast.Name) and each.id in known}
            for name in names:
                self.needs[module, name] = used - {(module, name)} | {(module, names[0])} - {(module, name)}
                model = _model_of(node)
                if model:
                    self.plans[model] = (module, name)

    def reached(self, name: Name) -> set[Name]:
        """A name and all that it needs, of these files; another plan counts as shared."""
        found, left = set(), [name]
        while left:
            at = left.pop()
            if at in self.lines and at not in found:
                found.add(at)
                left += self.needs[at]
        return found


def _named(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _model_of(node: ast.stmt) -> str | None:
    """The class a statement describes, if it makes a plan."""
    call = node.value if isinstance(node, ast.Assign) else None
    keywords = call.keywords if isinstance(call, ast.Call) else []
    said = [each.value for each in keywords if each.arg == "model"]
    return str(said[0].value) if said and isinstance(said[0], ast.Constant) else None


def plan_lines() -> dict[str, int]:
    """Lines of each plan, by its class, the longest first."""
    statements = Statements()
    reached = {model: statements.reached(name) for model, name in statements.plans.items()}
    own = {
        model: sum(
            statements.lines[name]
            for name in names
            if name == statements.plans[model] or all(name not in other for at, other in reached.items() if at != model)
        )
        for model, names in reached.items()
    }
    return dict(sorted(own.items(), key=lambda entry: (-entry[1], entry[0])))


def shared_lines() -> int:
    """Lines of what several plans need."""
    return sum(Statements().lines.values()) - sum(plan_lines().values())


def table() -> str:
    """The table in docs/models.md."""
    lines = plan_lines()
    by_count: dict[int, list[str]] = {}
    for model, count in lines.items():
        by_count.setdefault(count, []).append(f"`{model}`")
    rows = "".join(f"| {count} | {', '.join(models)} |\n" for count, models in by_count.items())
    return (
        f"{len(lines)} plans: median {statistics.median(lines.values()):g} lines, longest {max(lines.values())}, "
        f"shortest {min(lines.values())}; and {shared_lines()} lines that several plans share.\n\n"
        f"| lines | plans |\n| --- | --- |\n{rows}"
    )


def main() -> None:
    """Prints the table, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/models.md")
    if not parser.parse_args().write:
        print(table())
        return
    page = ROOT / "docs" / "models.md"
    page.write_text(replaced(page.read_text(encoding="utf-8"), "plan lines", table()), encoding="utf-8")


if __name__ == "__main__":
    assert {plan.model for plan in PLANS} == set(plan_lines())
    main()
