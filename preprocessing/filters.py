"""Which samples are used: the settings of a data set, and conditions on sizes and columns with a name each."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from pipeline.config import EncodeConfig
from pipeline.config.encode import FilterRule
from pipeline.errors import DataError
from preprocessing.buckets import Bucket, generated_buckets


@dataclass(frozen=True)
class Rejection:
    """The sample is not usable, for a reason that has a name (see `reasons`, or a filter's own)."""

    reason: str


@dataclass(frozen=True)
class Failure:
    """Something broke that should not have; `error` is the exception's name."""

    error: str


@dataclass(frozen=True)
class Rules:
    """All settings that decide which samples are used and what becomes of their pixels and captions."""

    image_size: int
    background: tuple[int, int, int]
    min_side: int
    max_aspect: float
    max_pixels: int
    max_captions: int
    buckets: tuple[Bucket, ...] = ()
    """(height, width) in pixels; none = one square of `image_size`."""
    bucket_tolerance: float = 0.2
    bucket_overflow: Literal["reject", "crop"] = "reject"
    draft: bool = True
    caption_columns: tuple[str, ...] = ("caption", "text")
    empty_caption: Literal["reject", "unconditional"] = "reject"
    filters: tuple[FilterRule, ...] = ()

    @classmethod
    def from_config(cls, encode: EncodeConfig) -> Self:
        """Return the rules of the `encode` section.

        Raises:
            ConfigError: when no bucket fits.
        """
        names = set(cls.__dataclass_fields__) - {"buckets"}
        buckets = encode.buckets or ()
        if encode.bucket_step is not None:
            buckets = generated_buckets(encode.image_size, encode.bucket_step, encode.max_aspect)
        return cls(buckets=tuple(sorted(buckets)), **{name: getattr(encode, name) for name in names})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the rules stored in a fingerprint or manifest; other entries there are left alone.

        Settings that did not exist when the data set was made say what was done then.
        """
        chosen: dict[str, Any] = {"draft": False} | {
            name: data[name] for name in cls.__dataclass_fields__ if name in data
        }
        tuples: dict[str, Any] = {
            name: tuple(chosen[name]) for name in ("background", "caption_columns") if name in chosen
        }
        buckets = tuple((height, width) for height, width in chosen.get("buckets", ()))
        filters = tuple(FilterRule.model_validate(_as_tuples(rule)) for rule in chosen.get("filters", ()))
        chosen |= tuples
        chosen |= {"buckets": buckets, "filters": filters}
        return cls(**chosen)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        plain: dict[str, Any] = asdict(replace(self, filters=()))
        filters = [rule.model_dump(mode="json") for rule in self.filters]
        lists = {"background": list(self.background), "caption_columns": list(self.caption_columns)}
        return {**plain, **lists, "buckets": [list(bucket) for bucket in self.buckets], "filters": filters}

    def shapes(self) -> tuple[Bucket, ...]:
        """Return every (height, width) that a prepared picture can have."""
        return self.buckets or ((self.image_size, self.image_size),)

    def without_filters(self) -> Self:
        """Return the same rules for samples that passed already: a report's originals."""
        return replace(self, filters=())

    def squares_only(self) -> Self:
        """Return the same rules with one square instead of buckets, as the first stage wants it."""
        return replace(self, buckets=())


def _as_tuples(rule: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored filter with the tuple that JSON has no word for."""
    one_of = rule.get("one_of")
    return {**rule, "one_of": None if one_of is None else tuple(one_of)}


def size_problem(height: int, width: int, rules: Rules) -> str | None:
    """Return why a picture of this many pixels is not used, or None; called before anything is decoded."""
    if height < 1 or width < 1 or min(height, width) < rules.min_side:
        return "too_small"
    if height * width > rules.max_pixels:
        return "too_many_pixels"
    if max(height, width) > rules.max_aspect * min(height, width):
        return "aspect"
    return None


def column_problem(columns: Mapping[str, Any], filters: tuple[FilterRule, ...], where: str) -> str | None:
    """Return the reason of the first filter that the sample's columns break, or None.

    Raises:
        DataError: where a column is absent and its filter says that this is an error; `where` names the sample.
    """
    for rule in filters:
        value = columns.get(rule.column)
        if value is None:
            if rule.absent == "error":
                raise DataError(
                    f"{where}: no column {rule.column!r} among {sorted(columns)[:20]}; mend encode.filters, or set its "
                    "`absent` to reject or keep"
                )
            if rule.absent == "reject":
                return "absent_column"
            continue
        broken = _broken(value, rule)
        if broken is not None:
            return broken
    return None


def _broken(value: Any, rule: FilterRule) -> str | None:
    if rule.min is not None or rule.max is not None:
        number = _number(value)
        if number is None:
            return "column_type"
        # Written so that NaN breaks every bound.
        if rule.min is not None and not number >= rule.min:
            return rule.reason
        if rule.max is not None and not number <= rule.max:
            return rule.reason
    if rule.equals is not None and not _same(value, rule.equals):
        return rule.reason
    if rule.one_of is not None and not any(_same(value, allowed) for allowed in rule.one_of):
        return rule.reason
    return None


def _number(value: Any) -> float | None:
    """Return a number, also from the text of a CSV cell; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _same(value: Any, allowed: str | int | float | bool) -> bool:
    """Return whether they are equal, a CSV cell's text counting as the number it spells; True is not 1."""
    if isinstance(value, bool) or isinstance(allowed, bool):
        return value is allowed
    if isinstance(allowed, str) or not isinstance(value, str):
        return bool(value == allowed)
    return _number(value) == allowed
