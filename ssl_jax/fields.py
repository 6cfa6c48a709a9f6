# SPDX-License-Identifier: Apache-2.0
"""Typed fields: frozen dataclasses as groups of a config, with ranges and choices.

    @dataclasses.dataclass(frozen=True)
    class Optim:
        base_lr: Annotated[float, Range(0, 100)] = 1.5e-4  # per `scale_batch` images
        schedule: Literal['mae', 'dinov2'] = 'mae'
        clip: float | None = None

Type, default and comment of a field are in one place. None is allowed if the type says so.
"""

import ast
import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import ml_collections

from ssl_jax.run import errors


@dataclasses.dataclass(frozen=True)
class Range:
    """Lowest and highest allowed value of a number."""

    low: float
    high: float


Probability = Annotated[float, Range(0.0, 1.0)]


def given(default):
    """A dataclass field set by the run, not a field of the config."""
    return dataclasses.field(default=default, kw_only=True, metadata={'config': False})


@dataclasses.dataclass(frozen=True)
class Spec:
    """Type, range and default of a field."""

    type: type  # bool, int, float, str or tuple
    optional: bool  # whether None is allowed
    choices: tuple  # allowed strings, () for any
    range: Range | None  # of a number, or None
    default: Any  # value in a fresh config


@functools.cache
def specs(cls: type) -> dict[str, Spec]:
    """{name: Spec} of the config fields of a dataclass, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        f.name: _spec(hints[f.name], f.default)
        for f in dataclasses.fields(cls)
        if f.metadata.get('config', True)
    }


def _spec(hint, default):
    limits = None
    if typing.get_origin(hint) is Annotated:
        hint, limits = typing.get_args(hint)
    options, optional = [hint], False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        optional = len(options) < len(typing.get_args(hint))
    (hint,) = options
    if typing.get_origin(hint) is Annotated:
        hint, limits = typing.get_args(hint)
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    kind = type(choices[0]) if choices else typing.get_origin(hint) or hint
    return Spec(kind, optional, choices, limits, default)


def group(cls: type, type_safe: bool = True) -> ml_collections.ConfigDict:
    """Unlocked ConfigDict of the defaults; optional fields keep their type while None."""
    c = ml_collections.ConfigDict(type_safe=type_safe)
    for name, spec in specs(cls).items():
        value = spec.default
        if spec.optional:
            value = ml_collections.FieldReference(value, field_type=spec.type)
        c[name] = value
    return c


def parse(name: str, text: str, spec: Spec):
    """Parses `text` as a value of the field `name`.

    Raises:
      UserError: `text` has another type.
    """
    value = {'true': True, 'false': False, 'none': None}.get(text.strip().lower(), literal(text))
    if value is None and spec.optional:
        return None
    if spec.type is str:
        return text.strip().strip('\'"')
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if spec.type is bool and isinstance(value, bool):
        return value
    if spec.type is float and number:
        return float(value)
    if spec.type is int and number and float(value).is_integer():  # 1e6 is an int too
        return int(value)
    if spec.type is tuple and isinstance(value, (tuple, list)):
        return tuples(value)
    allowed = f'{spec.type.__name__} or None' if spec.optional else spec.type.__name__
    example = {bool: 'True', float: '1e-3', int: '100', tuple: '(1, 2)'}.get(spec.type, '...')
    raise errors.UserError(f"'{name}' takes {allowed}, not '{text}': write {name}={example}.")


def from_words(cls: type, name: str, words: dict[str, str]) -> Any:
    """A dataclass from {field: text}, for words NAME.FIELD=VALUE of a command line.

    Raises:
      UserError: a field is unknown or has a wrong value.
    """
    known, values = specs(cls), {}
    for key, text in words.items():
        if key not in known:
            raise errors.UserError(
                f"There is no setting '{name}.{key}'{errors.nearest(key, known)}"
            )
        values[key] = parse(f'{name}.{key}', text, known[key])
    found = cls(**values)
    for problem in problems(cls, found, f'{name}.'):
        raise errors.UserError(problem)
    return found


def literal(text: str):
    """`text` as a Python literal, else unchanged."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def tuples(value):
    """Converts nested lists to tuples."""
    if isinstance(value, dict):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def problems(cls: type, values, prefix: str = '') -> Iterator[str]:
    """Yields a sentence for each field of `values` with a wrong type, choice or range.

    Args:
      cls: the dataclass.
      values: an instance, or any object with these attributes.
      prefix: prefix of the names, such as 'optim.'.
    """
    for name, spec in specs(cls).items():
        value, full = getattr(values, name), f'{prefix}{name}'
        if value is None:
            if not spec.optional:
                yield f'{full} is None: set it, the default is {spec.default!r}.'
        elif spec.type is tuple and not isinstance(value, tuple):
            yield f'{full}={value!r} must be a tuple, with a comma: ({value!r},).'
        elif not fits(value, spec):
            yield f'{full}={value!r} is no {spec.type.__name__}: the default is {spec.default!r}.'
        elif spec.choices and value not in spec.choices:
            yield f"{full}='{value}' is unknown: use one of {', '.join(spec.choices)}."
        elif spec.range and not spec.range.low <= value <= spec.range.high:
            yield (
                f'{full}={value} is out of range: use a value from {spec.range.low} to '
                f'{spec.range.high}.'
            )


def fits(value, spec: Spec) -> bool:
    """Whether `value` has the type of the field."""
    if value is None:
        return spec.optional
    kinds = {float: (int, float)}.get(spec.type, spec.type)
    return isinstance(value, kinds) and (spec.type is bool or not isinstance(value, bool))
