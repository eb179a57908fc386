"""docs/reliability.md says what the tests say, and full starts of the stack stay within their budget."""

import ast
from pathlib import Path

import pytest

from tests.faults.outcome import ROOT
from tests.faults.reliability import PAGE, covered, faults, page, table

FULL_STARTS = 12
# Files whose tests start the whole stack to kill it, and the call that does it.
STARTERS = {"faults/test_training.py": "start", "e2e/test_demo.py": "kill_when"}


def test_the_page_is_what_the_generator_writes() -> None:
    present = PAGE.read_text()
    assert present == page(present), "run `python -m tests.faults.reliability` and commit docs/reliability.md"


def test_every_row_that_a_test_names_exists() -> None:
    assert set(covered()) <= set(faults())
    assert list(faults()) == [f"F{number}" for number in range(1, 49)]


def test_marks_of_function_and_module_are_found_and_the_rest_is_open(tmp_path: Path) -> None:
    text = 'pytestmark = [pytest.mark.slow, pytest.mark.covers("F2")]\n@pytest.mark.covers("F1", "F3")\ndef test_a(): ...\n'
    (tmp_path / "test_x.py").write_text(text + "def test_b(): ...\ndef not_one(): ...\n")
    found = covered(tmp_path)
    both = ["test_x.py::test_a", "test_x.py::test_b"]
    assert found == {"F1": both[:1], "F2": both, "F3": both[:1]}
    rows = {name: {"fault": f"fault {name}", "outcome": "o"} for name in ("F1", "F4")}
    assert table(rows, found).splitlines()[2:] == [
        "| F1 | fault F1 | o | `test_x.py::test_a` |",
        "| F4 | fault F4 | o | **open** |",
        "",
        "1 of 2 rows are shown by a test. Open, so only meant to be so: F4.",
    ]


def test_a_name_that_is_no_plain_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("@pytest.mark.covers(name)\ndef test_a(): ...\n")
    with pytest.raises(AssertionError, match="plain text"):
        covered(tmp_path)


def test_full_starts_that_end_in_a_kill_are_few() -> None:
    starters = [
        f"{file}::{node.name}"
        for file, call in STARTERS.items()
        for node in ast.walk(ast.parse((ROOT / "tests" / file).read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for inner in [[ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)]]
        if call in inner
    ]
    assert 0 < len(starters) <= FULL_STARTS, starters
