"""Frozen dataclasses of numbers and enums, to and from the plain values of a JSON file.

The fields' names and annotations are all there is to know, so a field that a dataclass gains needs no code here.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .config import KernelEnum

T = TypeVar("T")


def to_plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass; an enum is its slug, e.g. ``causal``."""
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass whose `to_plain` this is. A field with a default may be absent.

    Raises:
        ValueError: a field is unknown, missing, or has a value that its annotation does not allow.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{values!r} is not supported; it must be an object with {', '.join(field_types(cls))}")
    annotations = field_types(cls)
    unknown = [name for name in values if name not in annotations]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not supported; the fields are {', '.join(annotations)}")
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"{field.name} is missing")
    return cls(**{name: parse(name, value, annotations[name]) for name, value in values.items()})


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> resolved annotation, in the order of the fields."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def parse(name: str, value: Any, annotation: Any) -> Any:
    """A plain value as what a field named ``name`` holds. Raises ValueError with the name, the value and the rule."""
    if isinstance(annotation, type) and issubclass(annotation, KernelEnum):
        members = {member.slug: member for member in annotation}
        if not isinstance(value, str) or value not in members:
            raise ValueError(f"{name}={value!r} is not supported; it must be {' or '.join(members)}")
        return members[value]
    if annotation is int:
        if type(value) is not int:  # a bool is an int, too, and means something else
            raise ValueError(f"{name}={value!r} is not supported; it must be an integer")
        return value
    raise TypeError(f"{name}: fields of type {annotation} have no plain form")


def _plain(value: Any) -> Any:
    return value.slug if isinstance(value, KernelEnum) else value
