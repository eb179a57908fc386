"""What every verb that works for long has in common: `--quiet`, `--json`, and one answer on stdout at the end."""

import functools
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import typer

from pipeline.progress import QUIET

JSON = "LDM_JSON"
NO_ANSWER = "none"
"""What a verb sets it to whose processes are part of a larger work, if its own answer is JSON."""
Verb = TypeVar("Verb", bound=Callable[..., Any])
Quiet = Annotated[
    bool, typer.Option("--quiet", help="no progress and no remarks on stderr; warnings and errors stay")
]
AsJson = Annotated[bool, typer.Option("--json", help="the answer as one line of JSON on stdout")]


@dataclass(frozen=True)
class Answer:
    """What a verb has done, in words (none where it has said them already) and in facts."""

    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def line(self, verb: str) -> str:
        """Return the facts on one line of JSON; paths as text, what JSON has no number for as null."""
        told = {"verb": verb, **self.facts} if self.facts else {"verb": verb, "said": self.text}
        return json.dumps(json.loads(json.dumps(told, default=str), parse_constant=lambda _: None))


def long_verb(app: typer.Typer, name: str | None = None) -> Callable[[Verb], Verb]:
    """Register a verb that returns its Answer (or None: it has none) with `--quiet` and `--json` beside its own options.

    Both are inherited by the processes that the verb starts: then it is their rank 0 that answers.
    """

    def register(function: Verb) -> Verb:
        called = name or function.__name__.replace("_", "-")
        signature = inspect.signature(function)
        own_json = "as_json" in signature.parameters
        added = {"quiet": Quiet} if own_json else {"quiet": Quiet, "as_json": AsJson}

        @functools.wraps(function)
        def verb(*words: Any, quiet: bool = False, **options: Any) -> None:
            as_json = False if own_json else options.pop("as_json", False)
            with _inherited(quiet, as_json):
                asked = os.environ.get(JSON)
                answer = function(*words, **options)
                said = "" if answer is None else answer.line(called) if asked == "1" else answer.text
                if said and asked != NO_ANSWER:
                    typer.echo(said)

        keyword = inspect.Parameter.KEYWORD_ONLY
        extra = [
            inspect.Parameter(key, keyword, default=False, annotation=kind) for key, kind in added.items()
        ]
        verb.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *extra], return_annotation=None
        )
        verb.__annotations__ = {**function.__annotations__, **added, "return": None}
        app.command(name)(verb)
        return function

    return register


def answer_alone() -> None:
    """Keep the processes that are started from here on from answering beside this verb's JSON."""
    if os.environ.get(JSON) == "1":
        os.environ[JSON] = NO_ANSWER


@contextmanager
def _inherited(quiet: bool, as_json: bool) -> Iterator[None]:
    """Set what is asked for in the environment, where `pipeline.progress` and started processes find it."""
    asked = {QUIET: quiet, JSON: as_json}
    before = {name: os.environ.get(name) for name in asked}
    root = logging.getLogger()
    level = root.level
    os.environ.update({name: "1" for name, wanted in asked.items() if wanted})
    if os.environ.get(QUIET) == "1":
        root.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        root.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
