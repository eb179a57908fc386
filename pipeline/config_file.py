"""From a YAML file and `key=value` overrides to a `RunConfig`, or to all problems at once.

YAML 1.2 by ruamel: `1e-4` is a number, `off` is text, a double key is an error. Each problem names the file,
the line, the dotted key, the value, what is allowed and, for a misspelt key, the likely one.
"""

import difflib
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from pipeline.config import ClusterConfig, RunConfig
from pipeline.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_NODES = 20_000
OVERRIDDEN = -1
"""Line number of a key that an override has set."""
Lines = dict[tuple[str | int, ...], int]


def load_config(path: Path, overrides: Sequence[str] = (), site: Path | None = None) -> RunConfig:
    """Return the run described by the YAML file at `path` with `key=value` overrides laid over it.

    `site` is a file with settings of the section `cluster`, laid between the two.

    Raises:
        ConfigError: with one line for every problem found.
    """
    tree, lines = _read_tree(path)
    problems = [] if site is None else _lay_site(tree, lines, site)
    for override in overrides:
        problem = _apply_override(tree, override)
        if problem:
            problems.append(problem)
        else:
            _forget_line(lines, override.partition("=")[0])
    config, found = validate(tree, str(path), lines)
    problems += found
    if problems or config is None:
        raise ConfigError(problems)
    return config


def with_settings(config: RunConfig, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run with plain values at dotted keys, and `key=value` overrides laid over those.

    Raises:
        ConfigError: with one line for every problem found.
    """
    tree: dict[str, Any] = json.loads(config.model_dump_json())
    placed = [_place(tree, key, value) for key, value in settings.items()]
    placed += [_apply_override(tree, override) for override in overrides]
    changed, problems = validate(tree, "settings", {})
    problems = [problem for problem in placed if problem] + problems
    if problems or changed is None:
        raise ConfigError(problems)
    return changed


def validate(tree: dict[str, Any], where: str, lines: Lines) -> tuple[RunConfig | None, list[str]]:
    """Return the config or None, and the problems as lines that begin with `where`."""
    try:
        text = json.dumps(tree)
    except (TypeError, ValueError) as error:
        return None, [
            f"{where}: not plain data ({error}); only text, numbers, true/false, null, lists and maps"
        ]
    try:
        return RunConfig.model_validate_json(text), []
    except ValidationError as error:
        return None, [_problem_line(problem, tree, where, lines) for problem in _distinct(error)]


def dump_config(config: RunConfig) -> str:
    """Return the config with every default spelt out, as YAML that `load_config` reads back to an equal config."""
    stream = StringIO()
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 120
    yaml.dump(json.loads(config.model_dump_json()), stream)
    return stream.getvalue()


def _read_tree(path: Path) -> tuple[dict[str, Any], Lines]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such config file"
        what += "; the config comes first, settings after it" if "=" in str(path) else ""
        raise ConfigError(f"{path}: {what}; the shipped ones are configs/*.yaml in the clone")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes; a config has at most {MAX_CONFIG_BYTES}")
    try:
        loaded = YAML(typ="rt", pure=True).load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        said = (error.problem or "not YAML").splitlines()[0]
        raise ConfigError(f"{path}:{line}: {said}") from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, CommentedMap):
        raise ConfigError(
            f"{path}: holds {type(loaded).__name__}, not a map of settings such as `name: demo`"
        )
    lines: Lines = {}
    return _plain(loaded, (), lines, [0], path), lines


def _plain(node: Any, at: tuple[str | int, ...], lines: Lines, seen: list[int], path: Path) -> Any:
    """Return `node` as plain Python data and note the line of every key: an alias bomb ends at the node limit."""
    seen[0] += 1
    if seen[0] > MAX_CONFIG_NODES:
        raise ConfigError(
            f"{path}: more than {MAX_CONFIG_NODES} values after following aliases; write it out shorter"
        )
    tag = getattr(node, "tag", None)
    if tag is not None and str(getattr(tag, "value", "") or "").startswith(("!", "tag:yaml.org,2002:python")):
        raise ConfigError(
            f"{path}: {'.'.join(map(str, at))}: the tag {tag.value} is not allowed; give plain data"
        )
    if isinstance(node, CommentedMap):
        plain = {}
        for key, value in node.items():
            lines[(*at, str(key))] = node.lc.key(key)[0] + 1 if node.lc.data and key in node.lc.data else 0
            plain[str(key)] = _plain(value, (*at, str(key)), lines, seen, path)
        return plain
    if isinstance(node, CommentedSeq):
        return [_plain(value, (*at, place), lines, seen, path) for place, value in enumerate(node)]
    if isinstance(node, bool | ScalarBoolean):
        return bool(node)
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    """Lay one `key=value` over the tree; return the problem, if it has one."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return f"override {override!r}: not of the form key=value, for instance train.steps=100"
    try:
        value = YAML(typ="safe", pure=True).load(text) if text.strip() else None
    except YAMLError:
        return f"override {override!r}: the value is not YAML; quote it"
    problem = _place(tree, key.strip(), value)
    return f"override {override!r}: {problem}" if problem else None


def _place(tree: dict[str, Any], key: str, value: Any) -> str | None:
    """Set the value of a dotted key, making the sections on its way; return the problem, if it has one."""
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            return f"{parent} is {child!r}, not a section"
        node = child
    node[last] = value
    return None


def _lay_site(tree: dict[str, Any], lines: Lines, site: Path) -> list[str]:
    """Lay the settings of a site file over the section `cluster`; return its problems, which name that file."""
    values, site_lines = _read_tree(site)
    places: Lines = {("cluster", *at): line for at, line in site_lines.items()}
    try:
        ClusterConfig.model_validate_json(json.dumps(values))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            return [f"{site}: not plain data ({error}); only text, numbers, true/false, null, lists and maps"]
        found = ({**problem, "loc": ("cluster", *problem["loc"])} for problem in _distinct(error))
        return [_problem_line(problem, tree, str(site), places) for problem in found]
    tree["cluster"] = {**(tree.get("cluster") or {}), **values}
    for name in values:
        _forget_line(lines, f"cluster.{name}")
    return []


def _forget_line(lines: Lines, key: str) -> None:
    """Forget where the file sets `key`: what an override said is not the file's fault."""
    at = tuple(key.strip().split("."))
    for known in [known for known in lines if known[: len(at)] == at]:
        del lines[known]
    lines[at] = OVERRIDDEN


def _distinct(error: ValidationError) -> Iterator[dict[str, Any]]:
    """Yield one problem for each key: a union of types reports the same key once a member."""
    seen = set()
    for problem in error.errors(include_url=False):
        at = tuple(part for part in problem["loc"] if not _is_union_label(part)) or problem["loc"]
        if at not in seen:
            seen.add(at)
            yield {**problem, "loc": at}


def _is_union_label(part: str | int) -> bool:
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "str", "constrained-int"})


def _problem_line(problem: dict[str, Any], tree: dict[str, Any], where: str, lines: Lines) -> str:
    at = problem["loc"]
    dotted = ".".join(map(str, at)) or "(whole file)"
    line = next((lines[at[:end]] for end in range(len(at), 0, -1) if lines.get(at[:end])), None)
    place = f"{where}:{line}: {dotted}" if line else f"{where}: {dotted}"
    if line == OVERRIDDEN:
        place = f"override {dotted}"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(at[:-1])
        near = difflib.get_close_matches(str(at[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
        return f"{place}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{place}: missing; {_description(at) or 'this setting has no default'}"
    said = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = "" if isinstance(value, dict) else f", got {value!r}"
    if at and problem["type"] == "string_type" and isinstance(value, int | float):
        said += " (quote it)"
    return f"{place}: {said[0].lower() + said[1:]}{shown}"


def _section_at(at: Sequence[str | int]) -> type[BaseModel] | None:
    section: type[BaseModel] = RunConfig
    for part in at:
        field = section.model_fields.get(str(part))
        if field is None:
            return None
        options = [field.annotation, *typing.get_args(field.annotation)]
        inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not inner:
            return None
        section = inner[0]
    return section


def _known_keys(at: Sequence[str | int]) -> list[str]:
    section = _section_at(at)
    return sorted(section.model_fields) if section else []


def _description(at: Sequence[str | int]) -> str | None:
    section = _section_at(at[:-1])
    field = section.model_fields.get(str(at[-1])) if section and at else None
    return field.description if field else None
