"""The `ldm` command: the door to every verb, and the exit code of whatever happened.

Config verbs take CONFIG [key=value ...], run verbs take a run folder. A user's mistake ends in one line on
stderr and the exit code of its error; running the same command again resumes.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from launch.verbs import averages, cluster, data, first_stage, models, plan, start, training
from pipeline.errors import PipelineError

INTERRUPTED = 130

app = typer.Typer(
    name="ldm",
    help="Train text-to-image latent diffusion: image-caption shards in, a diffusers pipeline out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for room in (start, plan, first_stage, data, training, averages, models, cluster):
    app.add_typer(room.app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with the exit code of what happened."""
    # OpenMP threads that spin for long make a step many times slower on a CPU that does anything else beside it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    logging.basicConfig(
        level=logging.INFO if rank == "0" else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt  # typer took it, without a word to the user
        sys.exit(code if isinstance(code, int) else 0)
    except PipelineError as error:
        for line in str(error).splitlines():
            print(f"ldm: {line}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("ldm: interrupted; run the same command to go on", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not hasattr(error, "show") or not hasattr(error, "exit_code"):
            raise
        error.show()  # typer's own errors: an unknown verb or option, a missing argument
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
