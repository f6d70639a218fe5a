"""Flags over a preset: `--optim.lr 1e-6 --optim.kind lion --data.train.0.path my.jsonl`. Imports no jax.

A flag is a dotted key of the preset and its value, converted by the same rules as in a file (`config_io`), so
there is one grammar and one set of errors. `tyro` renders the help from the configuration's docstrings; parsing
is not left to it because it can neither change a section's kind nor add a source to a list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args, get_origin

from jaxpost.config_io import (
    TAGS,
    ConfigError,
    hints,
    members,
    nearest,
    read_value,
    sections,
    tag_of,
    unknown_hint,
)

T = TypeVar("T")
SOURCE = "command line"


def apply_flags(config: T, args: Sequence[str]) -> T:
    """The configuration with flags applied; flags that choose a kind come first, whatever their order.

    A value may be a word, several words for a list, or YAML for a section or list (which it replaces whole):
    `--adapter '{kind: lora, rank: 8}'`, `--data.eval '[]'`. `--key value`, `--key=value`, `--a-b` for `a_b`, and a bare
    `--key` for a switch are all read.

    >>> from jaxpost.config import SFTConfig
    >>> config = apply_flags(SFTConfig(), ["--optim.b1", "0.8", "--optim.kind", "lion", "--train.steps=7"])
    >>> type(config.optim).__name__, config.optim.b1, config.train.steps
    ('LionSection', 0.8, 7)

    Raises:
      ConfigError: an unknown flag (with the nearest right one) or a value of the wrong type.
    """
    flags = list(_split(args))
    for key, values in sorted(flags, key=lambda flag: flag[0].rpartition(".")[2] not in TAGS):
        config = _set(config, type(config), key.split("."), values, f"--{key}")
    for key, _ in flags:
        _check_complete(config, key)
    return config


def flags_help(config: Any, prog: str, description: str) -> str:
    """Every flag with its meaning and its value in this configuration."""
    import contextlib
    import io

    import tyro

    for key in _empty_lists(config, ""):
        description += f"\n{key} is empty; --{key}.0.path FILE adds an item."
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            type(config),
            prog=prog,
            description=description,
            default=config,
            args=["--help"],
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    return out.getvalue()


def _empty_lists(section: Any, prefix: str) -> Iterator[str]:
    """Keys of lists of sections that hold none, whose flags the help can therefore not show."""
    for name, hint in hints(type(section)).items():
        value, kind = getattr(section, name), members(hint)[0]
        if dataclasses.is_dataclass(value):
            yield from _empty_lists(value, f"{prefix}{name}.")
        elif value == () and get_origin(kind) is tuple and sections(get_args(kind)[0]):
            yield f"{prefix}{name}"


def _split(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Keys and their words: a flag's words end where the next flag starts."""
    key, words = "", []
    for arg in args:
        if not arg.startswith("--"):
            if not key:
                raise ConfigError(f"{SOURCE}: {arg!r} stands where a flag such as --optim.lr was expected")
            words.append(arg)
            continue
        if key:
            yield key, words
        name, equals, value = arg[2:].partition("=")
        key, words = name.replace("-", "_"), [value] if equals else []
        if not key:
            raise ConfigError(f"{SOURCE}: -- is followed by no flag name")
    if key:
        yield key, words


def _set(value: Any, hint: Any, path: list[str], words: list[str], flag: str) -> Any:
    """`value` with the part at `path` replaced."""
    if not path:
        return _read(words, hint, flag, value)
    name, rest = path[0], path[1:]
    if dataclasses.is_dataclass(value):
        return _set_field(value, hint, name, rest, words, flag)
    kind = members(hint)[0]
    if get_origin(kind) is dict:
        return {**value, name: _set(value.get(name), get_args(kind)[1], rest, words, flag)}
    if get_origin(kind) is tuple and sections(get_args(kind)[0]):
        return _set_item(value, get_args(kind)[0], name, rest, words, flag)
    raise ConfigError(f"{SOURCE}: {flag}: unknown flag; --{'.'.join(flag[2:].split('.')[: -len(path)])} has no parts")


def _set_field(section: Any, hint: Any, name: str, rest: list[str], words: list[str], flag: str) -> Any:
    chosen, options = type(section), sections(hint)
    if name not in hints(chosen):
        wrong = f"unknown flag; {unknown_hint(name, chosen, options)}"
        raise ConfigError(f"{SOURCE}: {flag}: {wrong}")
    if name == tag_of(chosen)[0] and not rest and len(options) > 1:
        tag = " ".join(words)
        if tag not in options:
            raise ConfigError(f"{SOURCE}: {flag}: {tag!r}: {nearest(tag, options)}")
        return _switch(section, options[tag])
    new = _set(getattr(section, name), hints(chosen)[name], rest, words, flag)
    return dataclasses.replace(section, **{name: new})


def _set_item(items: tuple, hint: Any, name: str, rest: list[str], words: list[str], flag: str) -> tuple:
    """A list of sections with one changed, or one more at the end."""
    if not name.isdigit() or int(name) > len(items):
        raise ConfigError(
            f"{SOURCE}: {flag}: the list holds {len(items)}, so {name} must be a number up to {len(items)}"
        )
    place = int(name)
    old = items[place] if place < len(items) else _blank(next(iter(sections(hint).values())))
    return (*items[:place], _set(old, hint, rest, words, flag), *items[place + 1 :])


def _switch(section: Any, kind: type) -> Any:
    """A section of another kind that keeps what was set and both kinds know."""
    if isinstance(section, kind):
        return section
    tag, known = tag_of(kind)[0], hints(kind)
    default = type(section)()
    kept = {name: getattr(section, name) for name in hints(type(section)) if name in known and name != tag}
    return kind(**{name: value for name, value in kept.items() if value != getattr(default, name)})


def _blank(section: Any) -> Any:
    """A section whose required keys are still to come (`_check_complete` looks for them)."""
    required = (f.name for f in dataclasses.fields(section) if _required(f))
    return section(**dict.fromkeys(required, ""))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_complete(config: Any, key: str) -> None:
    """Raise where a flag began a new item of a list and no flag gave its required key."""
    section, seen = config, []
    for name in key.split("."):
        if isinstance(section, dict):
            return
        section = section[int(name)] if isinstance(section, tuple) else getattr(section, name, None)
        seen.append(name)
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            if _required(field) and getattr(section, field.name) == "":
                raise ConfigError(f"{SOURCE}: --{key}: --{'.'.join(seen)}.{field.name} is missing")


def _read(words: list[str], hint: Any, flag: str, value: Any) -> Any:
    """A flag's words as the type `hint`."""
    kind, text = members(hint)[0], " ".join(words)
    if get_origin(kind) is tuple and text[:1] != "[":
        if sections(get_args(kind)[0]):
            what = f"takes a YAML list of sections; one is set by {flag}.0.KEY, e.g. {flag}.0.path"
            raise ConfigError(f"{SOURCE}: {flag} {what}")
        return tuple(_read([word], get_args(kind)[0], flag, None) for word in words)
    if kind is bool and not words:
        return True
    if not words:
        raise ConfigError(f"{SOURCE}: {flag} is followed by no value")
    if text in ("null", "None") and type(None) in get_args(hint):
        return None
    if kind is str:  # as it stands: a prompt may hold colons, quotes or the word "no"
        return text
    return read_value(text, hint, key=flag, source=SOURCE, default=value)
