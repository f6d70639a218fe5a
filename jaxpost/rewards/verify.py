"""The reward by the package math-verify: sets, intervals and matrices too, which `answers.MathAnswer` does not read."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpost.rewards.answers import SOURCES, Source, final_answer, reference_of
from jaxpost.rewards.contract import Completion, Example, RowReward, field

START_SECONDS = 120.0
"""For the import of sympy, on a busy machine."""
MAX_ANSWER = 2048
"""Characters of an answer."""


class VerifyError(RuntimeError):
    """math-verify could not compare two answers."""


@dataclass(frozen=True)
class MathVerify(RowReward):
    r"""1 if math-verify finds the final answer equal to the reference, else 0.

    The reference is example[key], as for `answers.MathAnswer`. math-verify is generous: 50 equals "50%", and 3 equals
    "x = 3". It works with sympy, which some answers (`10^{10^{10}}`) keep busy for ever or fill the memory with: so it
    runs in a process of its own with a limit of memory, which is killed when an answer takes too long, and can be
    called from any thread.

    Raises (a row, when it is scored):
      ModuleNotFoundError: math-verify is not installed.
      ValueError: the reference cannot be read.
      VerifyError: an answer took too long or too much memory.
    """

    key: str = "answer"
    sources: tuple[Source, ...] = SOURCES
    seconds: float = 2.0
    """For one answer; less than a `runner.Pool` gives to a row."""
    memory_mb: int = 2048
    name: str = "math_verify"

    def prepare(self) -> None:
        """Starts the process."""
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError(
                f"the reward {self.name!r} needs the package math-verify: pip install 'jaxpost[math]'"
            )
        with _lock:
            _process(self.memory_mb)

    def row(self, example: Example, completion: Completion) -> float:
        gold = field(example, self.key, self.name)
        answer = final_answer(completion.text, sources=self.sources)
        self.prepare()
        golds = gold if isinstance(gold, list | tuple) else [gold]
        if answer is None or len(answer) > MAX_ANSWER:
            return 0.0
        return float(any(self._equal(reference_of(one), answer) for one in golds))

    def _equal(self, gold: str, answer: str) -> bool:
        with _lock:
            process = _process(self.memory_mb)
            said = process.ask({"gold": gold, "answer": answer}, self.seconds)
            if "error" in said:
                _forget(self.memory_mb)
                raise VerifyError(f"math-verify could not compare {answer[:80]!r} with {gold[:80]!r}: {said['error']}")
        if said["gold"] == 0:
            raise ValueError(f"reward {self.name!r}: math-verify cannot read the reference {gold[:80]!r}")
        return bool(said["equal"])


class _Process:
    """`python -m jaxpost.rewards.verify MEMORY`: a line of JSON in, a line out. It ends when its input does."""

    def __init__(self, memory_mb: int):
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), *sys.path]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxpost.rewards.verify", str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.ready = False

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, or an "error"."""
        if not self.ready:
            self.ready = "ready" in self._hear(START_SECONDS)
            if not self.ready:
                return {"error": "its process did not start"}
        with suppress(BrokenPipeError):
            self._pipe("stdin").write(json.dumps(question).encode() + b"\n")
            self._pipe("stdin").flush()
        return self._hear(seconds)

    def _hear(self, seconds: float) -> dict[str, Any]:
        """One line, which is short and so comes as a whole."""
        out = self._pipe("stdout")
        if not select.select([out], [], [], seconds)[0]:
            return {"error": f"it took longer than {seconds:g} s"}
        line = out.readline()
        return json.loads(line) if line.endswith(b"\n") else {"error": "its process ended"}

    def _pipe(self, name: str) -> Any:
        return getattr(self.process, name)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for name in ("stdin", "stdout"):
            with suppress(OSError):
                self._pipe(name).close()


_lock = threading.RLock()
_processes: dict[int, _Process] = {}


def _process(memory_mb: int) -> _Process:
    """The process with this limit, which stays for later answers; a new one where something has ended it meanwhile."""
    if memory_mb in _processes and _processes[memory_mb].process.poll() is not None:
        _forget(memory_mb)
    if memory_mb not in _processes:
        _processes[memory_mb] = _Process(memory_mb)
    return _processes[memory_mb]


def _forget(memory_mb: int) -> None:
    _processes.pop(memory_mb).kill()


@atexit.register
def close() -> None:
    """Ends the processes; a later answer starts new ones."""
    with _lock:
        for memory_mb in list(_processes):
            _forget(memory_mb)


def main(memory_mb: int) -> None:
    """In the process: compares answers until there are no more."""
    import logging
    import resource

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()  # it warns that its own time limits are off
    limit = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    config = (LatexExtractionConfig(),)  # the other reader hands text to Python's eval

    def read(text: str) -> list[Any]:
        return parse(f"${text}$", extraction_config=config, parsing_timeout=0)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            gold = read(question["gold"])
            equal = bool(gold) and verify(gold, read(question["answer"]), timeout_seconds=None)
            said = {"gold": len(gold), "equal": bool(equal)}
        except (Exception, MemoryError, RecursionError) as error:
            said = {"error": f"it raised {type(error).__name__}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
