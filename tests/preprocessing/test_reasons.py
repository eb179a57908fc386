"""One list of reasons: the code uses no other, and the page says the same."""

import ast
import re
from pathlib import Path

from preprocessing.reasons import REASONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/preprocessing.md"
NOT_REASONS = {"icc_converted", "icc_unusable"}


def used_in_code() -> set[str]:
    """Return what stands in `Rejection("...")`, in (reason, condition) pairs, and in what problem functions return."""
    found: set[str] = set()
    for path in (ROOT / "preprocessing").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Rejection" and node.args:
                found |= texts(node.args[0])
            if isinstance(node, ast.FunctionDef) and node.name.endswith(("_problem", "_broken", "_reason")):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        found |= texts(inner.value)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("checks", "problems"):
                found |= texts(node.value)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "RawSample" and len(node.args) > 3:
                found |= texts(node.args[3])
    return {text for text in found if re.fullmatch(r"[a-z0-9_]+", text)} - NOT_REASONS


def texts(node: ast.AST) -> set[str]:
    return {
        inner.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    }


def test_the_code_uses_every_reason_and_no_other() -> None:
    used = used_in_code()
    header_fields = {"reason", "txt", "json", "bytes"}
    assert set(REASONS) - used == set()
    assert used - set(REASONS) - header_fields == set()


def test_the_page_lists_them_with_the_same_words() -> None:
    rows = dict(re.findall(r"^\| `([a-z0-9_]+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert rows == REASONS
