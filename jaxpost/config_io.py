"""Presets in and out: YAML -> frozen dataclasses -> YAML, strictly. Imports no jax.

A preset is converted by the types of `jaxpost.config`, never by what YAML makes of a word: `1e-6` is a float
where a float is due, `no` is an error where a name is due. An unknown key, a wrong type, a missing or repeated
key each raise `ConfigError`, which names the file, the line, the key and what to do.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import yaml

from jaxpost.config import SFTConfig
from jaxpost.config_preference import PreferenceConfig
from jaxpost.config_reward import RewardConfig
from jaxpost.config_rl import RLConfig
from jaxpost.config_search import SearchConfig

T = TypeVar("T")

METHODS: dict[str, type] = {
    "sft": SFTConfig,
    "rl": RLConfig,
    "preference": PreferenceConfig,
    "reward": RewardConfig,
    "search": SearchConfig,
}


def plain_value(text: str) -> Any:
    """The value of a NAME=VALUE on a command line: as YAML reads it, or the text itself where that is no YAML.

    Example:
        >>> plain_value("0.5"), plain_value("[a, b]"), plain_value("[")
        (0.5, ['a', 'b'], '[')
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


Config = SFTConfig | RLConfig | PreferenceConfig | RewardConfig | SearchConfig
"""The configuration of each `method:`."""

TAGS = ("kind", "method")
"""Fields whose value chooses the member of a union of sections."""


class ConfigError(ValueError):
    """A configuration that cannot be used; its text is one sentence for the user."""


class Change(NamedTuple):
    """One key whose value differs; "(none)" where a configuration lacks the key."""

    key: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"


def load(path: str | Path) -> Config:
    """Read a preset.

    Raises:
      ConfigError: the file is missing, is no YAML, or has a key or value that does not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    return loads(text, source=str(path))


def loads(text: str, *, source: str = "<text>") -> Config:
    """Read a preset from text; `source` names it in errors.

    >>> loads("{method: sft, optim: {kind: lion, lr: 1e-6}}").optim.lr
    1e-06
    >>> loads("{method: sft, train: {batchsize: 4}}")
    Traceback (most recent call last):
      ...
    jaxpost.config_io.ConfigError: <text>:1: train.batchsize: unknown key; did you mean batch_size?

    Raises:
      ConfigError: see `load`.
    """
    node = _compose(text, source)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{source}: a preset is a mapping that starts with `method: {next(iter(METHODS))}`")
    methods = [value.value for key, value in node.value if key.value == "method"]
    if not methods:
        raise ConfigError(f"{source}: names no method; add a line `method: {next(iter(METHODS))}`")
    if methods[0] not in METHODS:
        raise ConfigError(f"{source}: method: {methods[0]!r} is none of {', '.join(METHODS)}")
    return _Reader(source).read(node, METHODS[methods[0]], "")


def read_value(text: str, hint: Any, *, key: str, source: str, default: Any = None) -> Any:
    """Read one value written in YAML for the type `hint`, as a flag gives it.

    Args:
      text: e.g. `1e-6`, `{kind: lora, rank: 8}`.
      hint: the field's type.
      key: its name in errors.
      source: where it stands, in errors.
      default: the value so far; a section that names no `kind` keeps its kind.
    """
    return _Reader(source, lines=False).read(_compose(text, source), hint, key, default)


def dump(config: Any) -> str:
    """Write every key, so that `loads(dump(config)) == config`.

    >>> print(dump(SFTConfig())[:40].splitlines()[0])
    method: sft
    """
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def to_dict(section: Any) -> Any:
    """Plain dicts, lists and scalars, with the tag of a union first."""
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        names = sorted((f.name for f in dataclasses.fields(section)), key=lambda name: name not in TAGS)
        return {name: to_dict(getattr(section, name)) for name in names}
    if isinstance(section, (list, tuple)):
        return [to_dict(item) for item in section]
    if isinstance(section, dict):
        return {key: to_dict(value) for key, value in section.items()}
    return section


def flatten(section: Any) -> dict[str, str]:
    """Dotted keys and their values as text.

    >>> flatten(SFTConfig())["optim.schedule.kind"]
    'cosine'
    """

    def walk(value: Any, key: str) -> Iterator[tuple[str, str]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if not items or (isinstance(value, list) and not any(isinstance(item, dict) for item in value)):
            yield key, json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
        else:
            for name, item in items:
                yield from walk(item, f"{key}.{name}" if key else str(name))

    return dict(walk(to_dict(section), ""))


def diff(old: Any, new: Any) -> tuple[Change, ...]:
    """What changed from one configuration to another, by key.

    >>> [str(change) for change in diff(SFTConfig(), loads("{method: sft, optim: {lr: 2e-5}}"))]
    ['optim.lr: 1e-05 -> 2e-05']
    """
    before, after = flatten(old), flatten(new)
    keys = list(before) + [key for key in after if key not in before]
    pairs = ((key, before.get(key, "(none)"), after.get(key, "(none)")) for key in keys)
    return tuple(Change(key, a, b) for key, a, b in pairs if a != b)


def fingerprint(config: Any) -> str:
    """Sixteen hexadecimal digits that change with any value."""
    text = json.dumps(to_dict(config), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def hints(section: Any) -> dict[str, Any]:
    """The types of a section's fields, by name."""
    found = typing.get_type_hints(section)
    return {f.name: found[f.name] for f in dataclasses.fields(section)}


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union without None, or the type alone."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(member for member in get_args(hint) if member is not type(None))
    return (hint,)


def sections(hint: Any) -> dict[str, type]:
    """Sections that a type allows, by tag ("" for one that has none); empty for other types."""
    return {tag_of(member)[1]: member for member in members(hint) if dataclasses.is_dataclass(member)}


def tag_of(section: type) -> tuple[str, str]:
    """Name and value of a section's tag: a field `kind` or `method` that allows one value."""
    for name in TAGS:
        hint = hints(section).get(name)
        if get_origin(hint) is Literal and len(get_args(hint)) == 1:
            return name, get_args(hint)[0]
    return "", ""


def nearest(word: str, known: Iterable[str]) -> str:
    """The words to add to "unknown": the closest known one, or all."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def unknown_hint(name: str, chosen: type, options: dict[str, type]) -> str:
    """What to say of a key that a section lacks: whose it is, or the nearest right name."""
    for tag, other in options.items():
        if name in hints(other):
            return f"it belongs to {tag_of(other)[0]}: {tag}, not {tag_of(chosen)[1]}"
    return nearest(name, hints(chosen))


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}{line}: not valid YAML ({what}); check indentation, colons and quotes") from None


def _nearest_file(path: Path) -> str:
    """A hint on a preset that nearly has this name."""
    if not path.parent.is_dir():
        return f" (and no folder {path.parent})"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


class _Reader:
    """Converts YAML nodes by type; knows where it is, for errors."""

    def __init__(self, source: str, *, lines: bool = True):
        self.source, self.lines = source, lines

    def fail(self, node: yaml.Node | None, key: str, what: str) -> typing.NoReturn:
        line = f":{node.start_mark.line + 1}" if node is not None and self.lines else ""
        raise ConfigError(f"{self.source}{line}: {key + ': ' if key else ''}{what}")

    def read(self, node: yaml.Node | None, hint: Any, key: str, default: Any = None, unsaid: Any = None) -> Any:
        """The value of `node` as type `hint`."""
        optional = type(None) in get_args(hint)
        if node is None or _is_null(node):
            if optional:
                return None
            self.fail(node, key, f"has no value; give {_describe(hint)} or leave the key out")
        found = sections(hint)
        if found:
            return self.section(node, found, key, default, unsaid)
        options = members(hint)
        if len(options) > 1:
            raise TypeError(f"{key}: unions other than sections are not supported: {hint}")
        return self.plain(node, options[0], hint, key)

    def section(self, node: yaml.Node, options: dict[str, Any], key: str, default: Any, unsaid: Any = None) -> Any:
        """A dataclass; of a union, the one whose tag the node names, else the default's.

        Keys that the node leaves out are as in `unsaid`, where that is of the same kind: a method may have defaults of
        its own for a section that others have too.
        """
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, key, f"is a section: give it keys ({', '.join(hints(next(iter(options.values()))))})")
        chosen = type(default) if type(default) in options.values() else next(iter(options.values()))
        if len(options) > 1:
            for name, value in node.value:
                if name.value == tag_of(chosen)[0]:
                    if value.value not in options:
                        self.fail(value, f"{key}.{name.value}", f"{value.value!r}: {nearest(value.value, options)}")
                    chosen = options[value.value]
        types_of = hints(chosen)
        defaults = {f.name: _default(f) for f in dataclasses.fields(chosen)}
        if type(unsaid) is chosen:
            defaults = {name: getattr(unsaid, name) for name in defaults}
        values: dict[str, Any] = {}
        for name, value in self.items(node, key):
            path = f"{key}.{name}" if key else name
            if name not in types_of:
                self.fail(value, path, f"unknown key; {unknown_hint(name, chosen, options)}")
            values[name] = self.read(value, types_of[name], path, defaults[name], defaults[name])
        missing = [name for name, value in defaults.items() if value is dataclasses.MISSING and name not in values]
        if missing:
            self.fail(node, key, f"lacks the key {missing[0]}, {_describe(types_of[missing[0]])}")
        return chosen(**defaults | values)

    def items(self, node: yaml.MappingNode, key: str) -> Iterator[tuple[str, yaml.Node]]:
        """Keys and values; a repeated key is an error (YAML keeps the last in silence)."""
        seen: set[str] = set()
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                self.fail(name, key, "a key must be a word")
            if name.value in seen:
                self.fail(name, f"{key}.{name.value}" if key else name.value, "is given twice")
            seen.add(name.value)
            yield name.value, value

    def plain(self, node: yaml.Node, kind: Any, hint: Any, key: str) -> Any:
        """Lists, mappings, choices and scalars."""
        if get_origin(kind) is tuple:
            if not isinstance(node, yaml.SequenceNode):
                self.fail(node, key, "needs a list: [first, second] or one `- item` a line")
            return tuple(self.read(item, get_args(kind)[0], f"{key}.{i}") for i, item in enumerate(node.value))
        if get_origin(kind) is dict:
            if not isinstance(node, yaml.MappingNode):
                self.fail(node, key, "needs a mapping: {name: value}")
            return {n: self.read(value, get_args(kind)[1], f"{key}.{n}") for n, value in self.items(node, key)}
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, key, f"needs {_describe(hint)}, not a list or a section")
        if get_origin(kind) is Literal:
            choices = {str(choice): choice for choice in get_args(kind)}
            if node.value not in choices:
                self.fail(node, key, f"{node.value!r} is none of {', '.join(choices)}")
            return choices[node.value]
        value = _scalar(node, kind)
        if value is None:
            quote = "; put it in quotes" if kind is str else ""
            self.fail(node, key, f"needs {_describe(hint)}, not {node.value!r}{quote}")
        return value


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _scalar(node: yaml.ScalarNode, kind: type) -> Any:
    """The scalar as bool, int, float or str; None where it is something else."""
    tag = node.tag.rpartition(":")[2]
    if kind is bool:
        return node.value.lower() in ("true", "yes", "on") if tag == "bool" else None
    if kind is str:
        return node.value if tag == "str" else None
    if node.style in ("'", '"'):
        return None
    try:
        value = kind(node.value) if tag != "bool" else None
    except ValueError:
        return None
    return value if value is None or math.isfinite(value) else None


def _describe(hint: Any) -> str:
    """A type in words."""
    kind = members(hint)[0]
    if get_origin(kind) is Literal:
        words = "one of " + ", ".join(map(str, get_args(kind)))
    elif get_origin(kind) is tuple:
        words = "a list"
    elif get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        words = "a section"
    else:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    return words + (" or null" if type(None) in get_args(hint) else "")
