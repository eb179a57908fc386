"""The process that `isolation` starts: pictures in on stdin, outcomes out on stdout, under its own limits."""

import json
import math
import os
import resource
import sys

from preprocessing.filters import Failure, Rejection, Rules
from preprocessing.images import Picture, prepare_image
from preprocessing.isolation import LENGTH, OUT_OF_MEMORY, read_exactly, write_outcome


def main() -> None:
    """Decode until stdin ends."""
    settings = json.loads(sys.argv[1])
    rules, seconds = Rules.from_dict(settings["rules"]), float(settings["seconds"])
    memory = int(settings["memory"])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a codec prints goes to stderr, not between the answers
    while prefix := sys.stdin.buffer.read(LENGTH.size):
        payload = read_exactly(sys.stdin.buffer, LENGTH.unpack(prefix)[0])
        _limit_cpu(seconds)
        write_outcome(answers, _outcome(payload, rules))


def _limit_cpu(seconds: float) -> None:
    """Allow as many CPU seconds from now on; the limit counts whole seconds since the start of the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _outcome(payload: bytes, rules: Rules) -> Picture | Rejection | Failure:
    try:
        return prepare_image(payload, rules)
    except MemoryError:
        return Failure(OUT_OF_MEMORY)
    except Exception as error:  # a decoder's bug must cost one sample, and be counted
        return Failure(type(error).__name__)


if __name__ == "__main__":
    main()
