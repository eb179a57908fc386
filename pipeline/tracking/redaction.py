"""What is written or said anywhere has no secret in it."""

import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import ConfigError

REDACTED = "[redacted]"
SHORTEST_SECRET = 6
"""An environment's value that is shorter is left alone wherever it stands: `1` under SOME_KEY would hide every 1."""
_PASSWORDS = (
    "password",
    "passwords",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "secrets",
    "credential",
    "credentials",
)
_KEYS = ("token", "tokens", "key", "keys", "auth", "authorization", "bearer", "cookie")
_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/@]*:[^\s@]*@)")
_QUERY = re.compile(
    r"(?i)([?&;](?:[^\s=&;]*(?:token|key|secret|password|signature|credential|sig))=)[^\s&;#]+"
)
_KNOWN_TOKENS = re.compile(
    r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA)[A-Za-z0-9_-]{10,}"
)


def redact(value: Any, name: str = "") -> Any:
    """Return `value` without secrets: what a telling name holds, userinfo in URIs, tokens known by their prefix."""
    if value is not None and not isinstance(value, bool) and _is_secret_name(name, value):
        return REDACTED
    if isinstance(value, Mapping):
        return {redact(str(key)): redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """Return `text` without secrets: userinfo and secret query values of URIs, well-known tokens, the environment's."""
    text = _QUERY.sub(rf"\g<1>{REDACTED}", _USERINFO.sub(f"{REDACTED}@", text))
    text = _KNOWN_TOKENS.sub(REDACTED, text)
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and value in text and _is_secret_name(name, value):
            # A path such as SSH_AUTH_SOCK's is no secret.
            text = text if value.startswith("/") else text.replace(value, REDACTED)
    return text


def redacted_config(config: RunConfig) -> RunConfig:
    """Return the config as it may be written to a file."""
    return RunConfig.model_validate_json(json.dumps(redact(config.model_dump(mode="json"))))


def config_for_later(config: RunConfig) -> RunConfig:
    """Return the config as a later process reads it from a file; the tracking URI's password comes from its environment.

    Raises:
        ConfigError: another setting holds a secret, which no file may.
    """
    written = redacted_config(config)
    before, after = (flat(one.model_dump(mode="json")) for one in (config, written))
    hidden = [name for name in before if before[name] != after.get(name) and name != "tracking.mlflow"]
    if hidden:
        raise ConfigError(
            f"{', '.join(hidden)}: holds a secret, which is not written into the run folder, so the run could not read "
            "it there; give credentials through the environment or the library's own file"
        )
    return written


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{above}.{name}" if above else str(name)
        leaves |= flat(value, dotted) if isinstance(value, Mapping) and value else {dotted: value}
    return leaves


def say(message: str) -> None:
    """Write one line for the user to stderr, without secrets."""
    print(f"tracking: {redact_text(' '.join(message.split()))}", file=sys.stderr, flush=True)


def _is_secret_name(name: str, value: Any) -> bool:
    """A number under `max_tokens` or `key` is a setting; a number under `password` is not."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", spaced) if word]
    if any(word.endswith(_PASSWORDS) for word in words):
        return True
    return not isinstance(value, int | float) and any(word.endswith(_KEYS) for word in words)
