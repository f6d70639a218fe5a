"""Rewards from a user's own file: `path.py:function`, plain or async."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxpost.rewards.contract import Completion, Example, Rewards


@dataclass(frozen=True)
class FromFile:
    """A reward function of a file: "rewards.py:my_reward"; a relative path starts at the working directory.

    The function is f(examples, completions) and gives a dict of columns, or one column, which then has the function's
    name; it may be `async`. It is trusted code: only its time is limited, by `runner.Pool`.
    """

    spec: str

    @property
    def name(self) -> str:
        return self.spec.rpartition(":")[2]

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> Rewards:
        out = load(self.spec)(examples, completions)
        if inspect.iscoroutine(out):
            out = asyncio.run(out)
        columns = out if isinstance(out, Mapping) else {self.name: out}
        if not columns:
            raise ValueError(f"{self.spec} gave no columns")
        checked: Rewards = {}
        for name, column in columns.items():
            found = np.asarray(column)
            if found.dtype.kind not in "biufO":  # a text of digits is no number
                raise ValueError(f"{self.spec} gave {name!r} of type {found.dtype} where numbers should be")
            if found.shape != (len(completions),):
                shape = found.shape
                raise ValueError(f"{self.spec} gave {name!r} of shape {shape} for {len(completions)} completions")
            if found.dtype.kind == "O" and any(isinstance(value, str | bytes) for value in found):
                raise ValueError(f"{self.spec} gave {name!r} with text where numbers should be")
            checked[str(name)] = found.astype(np.float64)
        return checked


@lru_cache(maxsize=64)
def load(spec: str) -> Callable[..., Any]:
    """The function that "path.py:function" names; its file is run once a process.

    Raises:
      ValueError: not of this form, or the file has no such function.
      FileNotFoundError: there is no such file.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{spec!r} does not name a function; write path.py:function")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; it is the file of the reward {spec!r}")
    module_name = f"jaxpost_user_{file.stem}_{zlib.crc32(str(file).encode()):08x}"
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses and pickle look for it
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r}")
    return function
