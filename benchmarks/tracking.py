"""What the tracker costs a training step whose MLflow server is dead, hangs or answers 500.

    python -m benchmarks.tracking                  # a record every step, the worst there is
    python -m benchmarks.tracking --at-most 1.0    # fail where a step is kept waiting for more than 1 % of its time

The step is a real one of a small network on the CPU. Blocked seconds are the tracker's own count, the one it writes
into `system.jsonl`; the ratio (B against A, in turn) shows also what its thread takes from the step beside it.
"""

import argparse
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import MARKDOWN_HEADER, Rounds, Side, compare, markdown_row
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.paths import RunPaths
from pipeline.publish import whole_file
from pipeline.tracking import Records, open_records

REPOSITORY = Path(__file__).resolve().parents[1]
WIDTH, BATCH = 1024, 256
VALUES = {f"loss_by_timestep/t{100 * k:04d}_{100 * k + 99:04d}": 0.1 * k for k in range(10)}
VALUES |= {name: 0.5 for name in ("loss", "grad_norm", "learning_rate", "ema_decay", "samples_per_second")}
HEADER = "| server | steps | ms a step | blocked ms a step | blocked % |\n|---|---|---|---|---|"


class _Answers500(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextmanager
def dead() -> Iterator[str]:
    """Give the URI of a port at which nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"


@contextmanager
def hanging() -> Iterator[str]:
    """Give the URI of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@contextmanager
def failing() -> Iterator[str]:
    """Give the URI of a server that answers 500 to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers500)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


SERVERS = {"dead": dead, "hanging": hanging, "answering 500": failing}


@dataclass
class Loop:
    """A training of one step at a call, with a record a step where it has `records`."""

    records: Records | None
    steps: int = 0
    seconds: float = 0.0
    network: nn.Module = field(
        default_factory=lambda: nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    )

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(self.network.parameters())
        self._batch = torch.ones(BATCH, WIDTH)

    def step(self) -> None:
        """Forward, backward, update, record."""
        began_seconds = time.perf_counter()
        self.network(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        if self.records is not None:
            self.records.log(self.steps, VALUES, samples=self.steps * BATCH)
        self.seconds += time.perf_counter() - began_seconds

    @property
    def blocked_percent(self) -> float:
        """Share of the steps' seconds that the tracker kept them waiting."""
        return 100 * self.records.blocked_seconds / self.seconds if self.records else 0.0

    def row(self, name: str) -> str:
        """Return the row of the table."""
        assert self.records is not None
        each = 1e3 / self.steps
        blocked = self.records.blocked_seconds * each
        return f"| {name} | {self.steps} | {self.seconds * each:.2f} | {blocked:.4f} | {self.blocked_percent:.3f} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all servers in turn; write CSV, PNG and `tracking.md`, print both tables.

    Raises: SystemExit with code 1 where `--at-most` does not hold.
    """
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    rows, ratios, worst = [], [], 0.0
    rounds = Rounds(measured=options.rounds, warmup=options.warmup)
    for name, serving in SERVERS.items():
        with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
            uri = opened.enter_context(serving())
            loop = Loop(_records(Path(folder), uri))
            # The library is loaded and the first attempts have failed before anything is timed.
            time.sleep(options.settle_seconds)
            sides = [Side("no tracker", Loop(None).step), Side(f"{name} server", loop.step)]
            called = f"tracking_{name.replace(' ', '_')}"
            ratios.append(markdown_row(compare(*sides, name=called, out_dir=options.out_dir, rounds=rounds)))
            rows.append(loop.row(name))
            worst = max(worst, loop.blocked_percent)
            assert loop.records is not None
            loop.records.close("stopped", wait_seconds=0.1)
    table = "\n".join([HEADER, *rows, "", MARKDOWN_HEADER, *ratios])
    with whole_file(options.out_dir / "tracking.md") as beside:
        beside.write_text(table + "\n")
    print(table, flush=True)
    if options.at_most is not None and worst > options.at_most:
        print(f"blocked for {worst:.3f} % of the steps' time, more than {options.at_most} %", file=sys.stderr)
        raise SystemExit(1)
    return 0


def _records(folder: Path, uri: str) -> Records:
    overrides = [f"tracking.mlflow={uri}", f"runs={folder}", "name=bench"]
    config: RunConfig = load_config(REPOSITORY / "configs" / "small.yaml", overrides)
    return open_records(RunPaths(folder / "bench"), config, kind="train", attempt="bench")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tracking", description="Time what a failing tracking server costs a step."
    )
    parser.add_argument(
        "--rounds", type=int, default=200, help="measured rounds, one step of each side in each"
    )
    parser.add_argument("--warmup", type=int, default=10, help="untimed rounds before")
    parser.add_argument("--settle-seconds", type=float, default=3.0, help="wait before the first step")
    parser.add_argument("--out-dir", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--at-most", type=float, help="blocked percent of the steps' time that is allowed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
