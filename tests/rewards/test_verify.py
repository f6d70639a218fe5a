"""math-verify as a reward: right on what it is for, and out of harm's way."""

import threading
import time

import pytest

from jaxpost.rewards import verify
from jaxpost.rewards.contract import Sample
from jaxpost.rewards.runner import Pool
from jaxpost.rewards.verify import MathVerify, VerifyError

pytest.importorskip("math_verify")


@pytest.fixture(scope="module", autouse=True)
def ended():
    yield
    verify.close()


def score(gold, text, **settings):
    return MathVerify(**settings).row({"answer": gold}, Sample(text))


@pytest.mark.parametrize(
    ("gold", "text", "wanted"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}", 1),
        ("x^2 + 2x + 1", r"\boxed{(x+1)^2}", 1),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1),
        ("[0, 1)", r"\boxed{[0,1)}", 1),
        ("[0, 1)", r"\boxed{[0,1]}", 0),
        (r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", 1),
        ("reasons\n#### 1,234", "The answer is 1234.", 1),
        (["3", "4"], r"\boxed{1}, no, \boxed{4}", 1),
        ("3", r"\boxed{3}, no, \boxed{4}", 0),
        ("3", "I do not know", 0),
        ("3", r"\boxed{3" + "1" * 5000 + "}", 0),
    ],
)
def test_answers_are_compared_as_mathematics(gold, text, wanted):
    assert score(gold, text) == wanted


def test_text_is_never_run(tmp_path):
    mark = tmp_path / "ran"
    assert score("3", rf"\boxed{{__import__('os').system('touch {mark}')}}") == 0
    assert score("3", f"The answer is __import__('pathlib').Path('{mark}').touch()") == 0
    assert not mark.exists()


def test_endless_answers_are_told_and_the_next_one_is_scored():
    start = time.monotonic()
    for answer in ("10^{10^{10^{10}}}", "(10^{9})!"):
        with pytest.raises(VerifyError, match=r"longer than 0.5 s|MemoryError"):
            score("10", rf"\boxed{{{answer}}}", seconds=0.5)
    assert time.monotonic() - start < 30
    assert score("10", "10", seconds=60.0) == 1


def test_a_process_that_was_killed_between_answers_is_no_fault_of_the_next():
    assert score("10", "10", seconds=60.0) == 1
    for process in verify._processes.values():
        process.process.kill()
        process.process.wait()
    assert score("10", "10", seconds=60.0) == 1


def test_from_any_thread_and_in_workers():
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append((i, score("4", str(i))))) for i in range(6)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(found) == [(i, float(i == 4)) for i in range(6)]
    with Pool(MathVerify(seconds=0.5), workers=1, seconds=60.0) as pool:
        scored = pool([{"answer": "4"}] * 3, [Sample("4"), Sample(r"\boxed{10^{10^{10^{10}}}}"), Sample("5")])
    assert scored.rewards["math_verify"][[0, 2]].tolist() == [1, 0]
    assert [problem.row for problem in scored.problems] == [1]
    assert "VerifyError" in scored.problems[0].reason


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxpost\[math\]'"):
        score("3", "3")
