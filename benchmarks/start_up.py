"""What the command line costs before it does anything: `ldm` verbs against a bare interpreter.

    python -m benchmarks.start_up                        # the `ldm` beside this interpreter
    python -m benchmarks.start_up --at-most 8 --ldm python -c pass

The bare interpreter is side A, so the ratio says how many interpreter starts one `ldm` call costs.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import MARKDOWN_HEADER, Comparison, Rounds, Side, compare, gate, markdown_row
from pipeline.publish import whole_file

REPOSITORY = Path(__file__).resolve().parents[1]
VERBS = {
    "start_up_help": ("ldm --help", ("--help",)),
    "start_up_check": ("ldm check configs/small.yaml", ("check", "configs/small.yaml")),
    "start_up_plan": ("ldm plan configs/small.yaml", ("plan", "configs/small.yaml")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparisons from the repository's root; write CSV, PNG and `start_up.md`, print the table.

    Raises: SystemExit with code 1 where `--at-most` does not hold; CommandError where a command fails.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    command = shutil.which(options.ldm[0]) if options.ldm else None
    if command is None:
        parser.error(
            f"--ldm {options.ldm}: no such command; install it with `pip install -e .` or name another"
        )
    ldm = [str(Path(command).absolute()), *options.ldm[1:]]
    rounds = Rounds(measured=options.rounds, warmup=options.warmup)
    out_dir = options.out_dir.resolve()
    comparisons = [
        _against_bare_interpreter(name, Side(label, [*ldm, *arguments], cwd=REPOSITORY), out_dir, rounds)
        for name, (label, arguments) in VERBS.items()
    ]
    table = "\n".join([MARKDOWN_HEADER, *map(markdown_row, comparisons)])
    with whole_file(out_dir / "start_up.md") as beside:
        beside.write_text(table + "\n")
    print(table)
    if options.at_most is not None:
        for comparison in comparisons:
            gate(comparison, at_most=options.at_most)
    return 0


def _against_bare_interpreter(name: str, verb: Side, out_dir: Path, rounds: Rounds) -> Comparison:
    bare = Side("python -c pass", [sys.executable, "-c", "pass"], cwd=REPOSITORY)
    return compare(bare, verb, name=name, out_dir=out_dir, rounds=rounds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.start_up", description="Time `ldm` verbs against a bare interpreter."
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="measured rounds, one run of each side in each"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, help="untimed rounds before, which fill the page cache"
    )
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument(
        "--at-most", type=float, help="fail where the interval of the ratio reaches above this"
    )
    parser.add_argument(
        "--ldm",
        nargs=argparse.REMAINDER,
        default=[str(Path(sys.executable).with_name("ldm"))],
        metavar="ARGV",
        help="last option: the command that stands for `ldm`",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
