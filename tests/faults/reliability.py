"""`python -m tests.faults.reliability`: writes the table of faults into docs/reliability.md from the tests' own marks.

Reads the tests as text, so that it needs none of what they import: a test stands for the rows that its
`@pytest.mark.covers("F1", ...)` names, or its module's `pytestmark`.
"""

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.faults.outcome import ROOT

PAGE = ROOT / "docs" / "reliability.md"
FAULTS = Path(__file__).with_name("faults.toml")
BEGIN, END = "<!-- faults: written by `python -m tests.faults.reliability` -->\n", "<!-- end of faults -->\n"


def faults() -> dict[str, dict[str, str]]:
    """Return {"fault", "outcome"} of each row, in the order of their numbers."""
    rows = tomllib.loads(FAULTS.read_text())
    return dict(sorted(rows.items(), key=lambda row: int(row[0].removeprefix("F"))))


def covered(tests: Path = ROOT / "tests") -> dict[str, list[str]]:
    """Return for each row the tests, as "folder/file.py::name", that say they stand for it."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(tests.rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        module = [name for node in tree.body if _assigns_pytestmark(node) for name in _covers(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = [name for decorator in node.decorator_list for name in _covers(decorator)]
                for name in dict.fromkeys([*module, *own]):
                    found[name].append(f"{path.relative_to(tests).as_posix()}::{node.name}")
    return dict(found)


def _assigns_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets
    )


def _covers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.covers":
            for argument in node.args:
                assert isinstance(argument, ast.Constant), f"line {node.lineno}: covers() takes plain text"
                yield str(argument.value)


def table(rows: Mapping[str, Mapping[str, str]], tests: Mapping[str, list[str]]) -> str:
    """Return the part of the page between its two marks."""
    lines = ["| | fault | what happens | shown by |", "|---|---|---|---|"]
    for name, row in rows.items():
        shown = "<br>".join(f"`{test}`" for test in tests.get(name, [])) or "**open**"
        lines.append(f"| {name} | {row['fault']} | {row['outcome']} | {shown} |")
    left = [name for name in rows if name not in tests]
    lines += ["", f"{len(rows) - len(left)} of {len(rows)} rows are shown by a test."]
    if left:
        lines[-1] += f" Open, so only meant to be so: {', '.join(left)}."
    return "\n".join(lines) + "\n"


def page(present: str) -> str:
    """Return the page with its table made new."""
    before, begin, rest = present.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE}: lacks one of the lines {BEGIN.strip()} and {END.strip()}"
    return before + BEGIN + "\n" + table(faults(), covered()) + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
