"""`python -m tests.faults.counted_main PLACE PATTERN AFTER_BYTES COUNT_FILE python-arguments...`

Runs a Python program under a byte budget (`counting.py`); AFTER_BYTES may be `none`: count only. Imports nothing
of the project before the patches are in place, so that the program's own imports see them.
"""

import runpy
import sys
from pathlib import Path

from tests.faults.counting import Budget, Watched, install


def main(arguments: list[str]) -> None:
    """Run the program as `__main__`, as the interpreter itself would."""
    place, pattern, after_bytes, count_file, first, *rest = arguments
    limit = None if after_bytes == "none" else int(after_bytes)
    install(Budget(Watched(Path(place), pattern), limit, Path(count_file)))
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = [first, *rest]
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
