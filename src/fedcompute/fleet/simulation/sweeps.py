"""Several settings of one configuration, every combination of them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from fedcompute.errors import ConfigInvalid, Reason
from fedcompute.fleet.simulation.jobs import Setup
from fedcompute.protos import task_builder_pb2

MAX_RUNS = 50
_SEED = "seed"
_WHOLE = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_REAL = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


@dataclass(frozen=True)
class Sweep:
    """A field of the configuration by its path, or `seed`, and the values that it takes."""

    path: str
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Variant:
    """A setup, and the value of each swept field by the field's name."""

    values: Mapping[str, str]
    setup: Setup

    @property
    def label(self) -> str:
        """The values in words; empty if nothing is swept."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())


def read_sweep(text: str) -> Sweep:
    """Reads `field=value,value`; the field is its name, or as many parts of its path as make it the only one.

    Raises ConfigInvalid (CONFIG_INVALID) for a field that is unknown or ambiguous, naming what it could be.
    """
    name, equals, listed = text.partition("=")
    values = tuple(value.strip() for value in listed.split(",") if value.strip())
    if not equals or not values:
        raise _invalid(f"{text!r} is no sweep", "write it as client_learning_rate=0.01,0.1")
    if name == _SEED:
        return Sweep(name, values)
    paths = [path for path, _ in _fields(task_builder_pb2.TaskConfig.DESCRIPTOR)]
    found = [path for path in paths if path == name or path.endswith(f".{name}")]
    if len(found) != 1:
        could = found or [path for path in paths if name and name in path]
        raise _invalid(
            f"{name!r} names {len(found)} fields of the configuration",
            f"name one of {', '.join(could)}" if could else "see fedcompute task init for the fields that there are",
        )
    return Sweep(found[0], values)


def variants(setup: Setup, sweeps: Sequence[Sweep]) -> list[Variant]:
    """A setup for every combination of values, the last sweep changing fastest.

    Raises ConfigInvalid (CONFIG_INVALID) for a value that its field cannot hold and for more than 50 runs.
    """
    combinations = list(itertools.product(*(one.values for one in sweeps)))
    if len(combinations) > MAX_RUNS:
        raise _invalid(f"{len(combinations)} runs", f"sweep over at most {MAX_RUNS} combinations")
    made = []
    for values in combinations:
        config = task_builder_pb2.TaskConfig.FromString(setup.config)
        variant = setup
        for sweep, value in zip(sweeps, values, strict=True):
            if sweep.path == _SEED:
                variant = replace(variant, seed=_number(sweep.path, value, int))
            else:
                _set(config, sweep.path, value)
        named = {sweep.name: value for sweep, value in zip(sweeps, values, strict=True)}
        made.append(Variant(named, replace(variant, config=config.SerializeToString())))
    return made


def _fields(message: Any, prefix: str = "") -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        if field.is_repeated:
            continue
        if field.message_type is not None:
            yield from _fields(field.message_type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def _set(config: task_builder_pb2.TaskConfig, path: str, value: str) -> None:
    holder: Any = config
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    field = holder.DESCRIPTOR.fields_by_name[name]
    if field.enum_type is not None:
        if value not in field.enum_type.values_by_name:
            raise _invalid(f"{path} cannot be {value!r}", f"use {', '.join(field.enum_type.values_by_name)}")
        setattr(holder, name, field.enum_type.values_by_name[value].number)
    elif field.cpp_type in (*_WHOLE, *_REAL):
        number = _number(path, value, int if field.cpp_type in _WHOLE else float)
        try:
            setattr(holder, name, number)
        except ValueError as error:
            raise _invalid(f"{path} cannot be {value}", "write a number of the field's type") from error
    elif field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        if value not in ("true", "false"):
            raise _invalid(f"{path} cannot be {value!r}", "use true or false")
        setattr(holder, name, value == "true")
    else:
        setattr(holder, name, value)


def _number(path: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise _invalid(f"{path} cannot be {value!r}", "write a number of the field's type") from error


def _invalid(detail: str, remedy: str) -> ConfigInvalid:
    return ConfigInvalid(Reason.CONFIG_INVALID, detail, remedy=remedy)
