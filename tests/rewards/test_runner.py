"""Workers: rewards that raise, hang, exit or give NaN are told by name and row, and nothing else is lost."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxpost.rewards.answers import MathAnswer
from jaxpost.rewards.combine import Gate, Sum
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.functions import FromFile, load
from jaxpost.rewards.runner import Pool
from jaxpost.rewards.style import OneBox, Overlong

USER = '''
import asyncio, os, sys, time
from dataclasses import dataclass
import numpy as np

@dataclass
class Wordless(Exception):
    """With annotations that are texts, as of `from __future__ import annotations`."""

    number: "int" = 1

    def __str__(self):
        raise self

def lengths(examples, completions):
    print("this must not mix with anybody's output")
    return [len(c.text) for c in completions]

async def waits(examples, completions):
    await asyncio.sleep(0.01)
    return {"waits": [2.0] * len(completions), "more": np.ones(len(completions))}

def troubled(examples, completions):
    """What each row's text says."""
    text = completions[0].text
    if text == "raise":
        raise KeyError("no such thing")
    if text == "sleep":
        time.sleep(1000)
    if text == "spin":
        9**9**9  # holds the interpreter's lock in C
    if text == "exit":
        os._exit(7)
    if text == "leave":
        sys.exit(3)
    if text == "nan":
        return {"troubled": [float("nan")]}
    if text == "inf":
        return {"troubled": [float("inf")]}
    if text == "other":
        return {"something else": [1.0]}
    if text == "huge":
        return np.array([1e30])
    if text == "digits":
        return ["1.0"]
    if text == "none":
        return [None]
    if text == "truth":
        return [np.bool_(True)]
    if text == "yields":
        return (x for x in [1.0])
    if text == "words":
        raise ValueError("\\x1b[2J\\n" + "x" * 10**6)
    if text == "wordless":
        raise Wordless
    if text == "two":
        return {"troubled": [1.0, 2.0]}
    if text == "child":
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        with open(examples[0]["note"], "w") as file:
            file.write(str(child.pid))
        time.sleep(1000)
    return {"troubled": [1.0]}

def process(examples, completions):
    return {"process": [os.getpid()] , "jax": [float("jax" in sys.modules)]}

number = 3
'''


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    path = tmp_path_factory.mktemp("user") / "my_rewards.py"
    path.write_text(USER)
    return path


def test_a_pool_gives_what_the_reward_gives_here():
    reward = Sum((MathAnswer(), OneBox(), Overlong(max_tokens=4, buffer=2)), weights=(1.0, 0.5, 0.25))
    samples = [Sample("\\boxed{3}", (1,) * n) for n in range(6)] + [Sample("4", (1,)), Sample("", ())]
    examples = [{"answer": "3"}] * 6 + [{"answer": "4"}] * 2
    here = reward(examples, samples)
    with Pool(reward, seconds=30.0) as pool:
        for _ in range(2):
            there, problems = pool(examples, samples)
            assert problems == ()
            assert list(there) == list(here) == ["reward", "math", "one_box", "overlong"]
            for name in here:
                np.testing.assert_array_equal(there[name], here[name])
        assert pool([], []).problems == ()
        with pytest.raises(ValueError, match="1 examples for 2 completions"):
            pool([{}], [Sample("")] * 2)


def test_every_kind_of_trouble_is_told_by_name_and_row(user):
    texts = ["fine", "raise", "sleep", "exit", "nan", "inf", "other", "two", "leave", "spin", "fine"]
    texts += ["huge", "digits", "none", "yields", "words", "wordless", "truth"]
    reward = Sum((FromFile(f"{user}:troubled"), FromFile(f"{user}:lengths")))
    with Pool(reward, workers=2, seconds=4.0) as pool:
        (rewards, problems) = pool([{}] * len(texts), [Sample(text) for text in texts])
        fine = [0, 10, 17]
        assert np.flatnonzero(np.isfinite(rewards["troubled"])).tolist() == fine
        assert np.flatnonzero(np.isfinite(rewards["reward"])).tolist() == fine
        assert rewards["reward"][fine].tolist() == [5, 5, 6]
        assert rewards["lengths"].tolist() == [len(text) for text in texts]
        told = {problem.row: str(problem) for problem in problems if problem.reward == "troubled"}
        assert sorted(told) == [*range(1, 10), *range(11, 17)]
        assert all(len(sentence) < 700 and sentence.isprintable() for sentence in told.values())
        for row, reason in {
            1: "it raised KeyError: 'no such thing'",
            2: "it took longer than 4 s",
            3: "its process ended with exit code 7, twice",
            4: "it gave nan",
            5: "it gave inf",
            6: "it gave no 'troubled', as it does elsewhere",
            7: "gave 'troubled' of shape (2,) for 1 completions",
            8: "it raised SystemExit: 3",
            9: "it took longer than 4 s",
            11: "it gave 1e+30",
            12: "gave 'troubled' of type <U3 where numbers should be",
            13: "it gave nan",
            14: "gave 'troubled' of shape () for 1 completions",
            15: "it raised ValueError: ?[2J xxx",
            16: "it raised Wordless: an error without words",
        }.items():
            assert f"reward 'troubled' left row {row} unscored: " in told[row]
            assert reason in told[row]
        again, problems = pool([{}], [Sample("fine")])
        assert problems == ()
        assert again["reward"].tolist() == [5]


def test_a_closed_gate_does_not_hide_an_unscored_value(user):
    reward = Gate((FromFile(f"{user}:troubled"), OneBox()))
    with Pool(reward, workers=1) as pool:
        rewards, problems = pool([{}] * 2, [Sample("raise"), Sample("\\boxed{1}")])
    np.testing.assert_array_equal(rewards["reward"], [np.nan, 1])
    assert [(problem.reward, problem.row) for problem in problems] == [("troubled", 0)]


def test_plain_and_async_functions_and_their_columns(user):
    with Pool(Sum((FromFile(f"{user}:waits"), FromFile(f"{user}:lengths"))), workers=1) as pool:
        rewards, problems = pool([{}] * 3, [Sample("abc")] * 3)
    assert problems == ()
    assert {name: column.tolist() for name, column in rewards.items()} == {
        "reward": [5.0] * 3,
        "waits": [2.0] * 3,
        "more": [1.0] * 3,
        "lengths": [3.0] * 3,
    }
    here = FromFile(f"{user}:waits")([{}], [Sample("")])
    assert {name: column.tolist() for name, column in here.items()} == {"waits": [2.0], "more": [1.0]}


def test_workers_are_other_processes_without_jax_that_end_with_the_pool(user):
    pool = Pool(FromFile(f"{user}:process"), workers=2)
    rewards, _ = pool([{}] * 6, [Sample("")] * 6)
    processes = {int(number) for number in rewards["process"]}
    assert rewards["jax"].max() == 0
    assert os.getpid() not in processes
    pool.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_calls_from_several_threads():
    found = {}
    with Pool(MathAnswer(), workers=2, seconds=30.0) as pool:

        def call(number):
            found[number] = pool([{"answer": number}] * 5, [Sample(str(other)) for other in range(5)]).rewards["math"]

        threads = [threading.Thread(target=call, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(1, 5):
        assert found[number].tolist() == [float(other == number) for other in range(5)]


def gone(process, seconds=10.0):
    """Whether a process ends (or is only waiting to be reaped) within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes under /proc")
def test_a_worker_is_killed_with_what_it_started(user, tmp_path):
    note = tmp_path / "child"
    with Pool(FromFile(f"{user}:troubled"), workers=1, seconds=6.0) as pool:
        _, problems = pool([{"note": str(note)}], [Sample("child")])
    assert [problem.reason for problem in problems] == ["it took longer than 6 s"]
    assert gone(int(note.read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the states of processes under /proc")
def test_workers_end_when_their_parent_is_killed(user):
    script = f"""
import sys
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.functions import FromFile
from jaxpost.rewards.runner import Pool
pool = Pool(FromFile({str(user) + ":process"!r}), workers=1)
print(int(pool([{{}}], [Sample("")]).rewards["process"][0]), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        worker = int(parent.stdout.readline())  # what the reward prints went elsewhere
        parent.kill()
    assert gone(worker)


def test_files_and_names_that_are_not_there(user, tmp_path):
    with pytest.raises(ValueError, match=r"write path\.py:function"):
        load("my_rewards")
    with pytest.raises(FileNotFoundError, match="is the file of the reward"):
        load(f"{tmp_path}/none.py:f")
    with pytest.raises(ValueError, match="has no function 'number'"):
        load(f"{user}:number")
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    with Pool(FromFile(f"{broken}:f")) as pool, pytest.raises(ValueError, match="nothing_of_this_name"):
        pool([{}], [Sample("")])


def test_pools_that_cannot_be():
    with pytest.raises(ValueError, match="must be positive"):
        Pool(MathAnswer(), seconds=0.0)
    with pytest.raises(ValueError, match="different names, not math, math"):
        Pool(Sum((MathAnswer(), MathAnswer(tolerance=0.1))))
    with (
        Pool(lambda examples, completions: {"a": np.ones(1)}) as pool,
        pytest.raises(ValueError, match="define them in a module"),
    ):
        pool([{}], [Sample("")])


def test_a_row_whose_worker_is_killed_from_outside_is_scored_all_the_same(user, tmp_path):
    """As when the machine runs out of memory: the second attempt counts, and nothing is unscored."""
    file = tmp_path / "once.py"
    file.write_text(
        "import os, pathlib, signal\n"
        "def once(examples, completions):\n"
        "    mark = pathlib.Path(completions[0].text)\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [1.0]\n"
    )
    with Pool(FromFile(f"{file}:once"), workers=2, seconds=30.0) as pool:
        rewards, problems = pool([{}] * 3, [Sample(str(tmp_path / name)) for name in ("a", "b", "c")])
    assert problems == ()
    assert rewards["once"].tolist() == [1, 1, 1]
