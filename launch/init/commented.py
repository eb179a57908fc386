"""A config as YAML with every field and a reason behind each value; `load_config` reads back the same config."""

import json
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config import RunConfig

COMMENT_COLUMN = 36
WIDTH = 118
PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./*-]*")
WORDS_WITH_A_MEANING = {"true", "false", "null", "yes", "no", "on", "off"}


def commented(config: RunConfig, reasons: Mapping[str, str], base: str, head: str) -> str:
    """Return the whole of `config` as YAML: `head` as a comment, then each value with its reason.

    A value that `reasons` does not name is described by its field, and where that says nothing by `base`, the shipped
    config that it comes from.
    """
    tree = json.loads(config.model_dump_json())
    lines = [f"# {part}" for line in head.splitlines() for part in _wrapped(line, WIDTH - 2)]
    for name, field in RunConfig.model_fields.items():
        section = section_of(field)
        if section is not None:
            lines.append("")
        lines += _entry(name, tree[name], field, (), _Reasons(reasons, base))
    return "\n".join(lines) + "\n"


class _Reasons:
    def __init__(self, chosen: Mapping[str, str], base: str) -> None:
        self._chosen, self._base = chosen, base

    def of(self, at: tuple[str, ...], field: FieldInfo) -> str:
        chosen = self._chosen.get(".".join(at))
        return chosen or field.description or f"as in configs/{self._base}"


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a field that is a section, also an optional one; None for a value."""
    options = [field.annotation, *typing.get_args(field.annotation)]
    return next(
        (option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None
    )


def _entry(
    name: str, value: Any, field: FieldInfo, above: tuple[str, ...], reasons: _Reasons
) -> Iterator[str]:
    indent, at = "  " * len(above), (*above, name)
    section = section_of(field)
    if section is None or not isinstance(value, dict):
        line = f"{indent}{name}: {written(value)}"
        if isinstance(value, list) and len(line) > WIDTH:
            yield from _value_lines(f"{indent}{name}:", reasons.of(at, field), indent)
            yield from (f"{indent}  - {written(item)}" for item in value)
        else:
            yield from _value_lines(line, reasons.of(at, field), indent)
        return
    yield f"{indent}{name}:"
    for inner, inner_field in section.model_fields.items():
        yield from _entry(inner, value[inner], inner_field, at, reasons)


def _value_lines(line: str, reason: str, indent: str) -> Iterator[str]:
    said = " ".join(reason.split())
    beside = f"{line.ljust(COMMENT_COLUMN - 1)} # {said}"
    if len(beside) <= WIDTH:
        yield beside
        return
    yield from (f"{indent}# {part}" for part in _wrapped(said, WIDTH - len(indent) - 2))
    yield line


def _wrapped(text: str, width: int) -> list[str]:
    """Return the text on lines of at most `width` characters; paths and keys stay whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def written(value: Any) -> str:
    """Return plain JSON data as YAML 1.2 on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)}: {written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, float):
        return _number(value)
    plain = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS_WITH_A_MEANING
    return value if plain else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """Return a float that reads back equal and is a float in every YAML: with a point before its exponent."""
    mantissa, exponent, power = repr(value).partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(power)}"
