"""`python -m launch.supervisor [SRUN_OPTION...] -- COMMAND...`, as the batch script of `ldm submit` starts it."""

import sys

from launch.supervisor.supervise import run_job
from pipeline.errors import PipelineError


def main() -> None:
    """Supervise the job; leave with its code, and with one line about what the user can mend."""
    try:
        sys.exit(run_job(sys.argv[1:]))
    except PipelineError as error:
        for line in str(error).splitlines():
            print(f"ldm: {line}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
