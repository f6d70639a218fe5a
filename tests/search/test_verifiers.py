"""Verifiers that are rules, judges and compositions: what they say, what they cost, and what they never do."""

from __future__ import annotations

import builtins
import gzip
import json
import math
import pathlib
from functools import partial

import pytest

from jaxpost.search.checks import logic, refuses, statements, syntax, well_formed
from jaxpost.search.compose import Composed, Gate, Squashed
from jaxpost.search.contract import Case, Drawn, Found, Verdict, Verifier
from jaxpost.search.drive import search
from jaxpost.search.judge import Judge
from jaxpost.search.requests import Draw, Score
from jaxpost.search.tree import Ledger, Node, Problem
from jaxpost.search.verifiers import (
    ByText,
    Facts,
    Logic,
    Safety,
    Syntax,
    read_passages,
    read_patterns,
)
from tests.search.toy import ToyPolicy, ToyVerifier, ids, letters


def case(answer, prompt="1+1"):
    root = Node(0, None, (1, 2), "")
    problem = Problem(0, prompt, root, Ledger(), str.strip)
    return Case(problem, problem.child(root, range(len(answer)), answer, end="stop"))


def scores(verifier, *answers, prompt="1+1"):
    return [v if isinstance(v, str) else v.score for v in verifier([case(a, prompt) for a in answers])]


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("40+30=70;7+8=15;70+15=85", [True, True, True]),
        ("We get 5 x 3 = 15, and 15 \\times 2 = 31.", [True, False]),
        ("2*3=3+3=7", [True, False]),
        ("$5 + $3 = $8 and 1,000 * 2 = 2,000.", [True, True]),
        ("10/3 = 3.33; 10/3 = 3", [True, False]),
        ("0.5 * 100% = 50%", [True]),
        ("- 3 + 4 = 7\n1. 2*2 = 5", [True, False]),
        ("x = 3 so x = 4", [True, False]),
        ("x = 3, x = x + 1 = 4", [True]),
        ("5 apples + 4 = 9; 20% of 50 = 10; 7x = 14; 1/0 = 3", []),
        ("__import__('os').system('x') = 3; 9**9**9 = 1", []),
    ],
)
def test_stated_equalities_are_worked_out_exactly(text, held):
    assert [s.holds for s in statements(text)] == held
    assert logic(text, empty=0.25) == (sum(held) / len(held) if held else 0.25)


def test_form_is_parsed_and_never_run():
    code = "```python\nimport os\nos.system('touch /tmp/x')\n```"
    assert well_formed(code, "python") == 1.0
    assert well_formed("```python\ndef f(:\n```", "python") == 0.0
    assert well_formed('```json\n{"a": [1]}\n```\n```json\n{"a": }\n```', "json") == 0.5
    assert syntax("(3+4)*2=14") == 1.0
    assert syntax("[3+4)=7") == 0.0
    for hostile in ("(" * 90_000, "[" * 90_000, "1=" * 2_000, "1 " * 50_000, "-" * 100_000):
        assert 0 <= well_formed(hostile, "python") <= 1
        assert 0 <= well_formed(hostile, "json") <= 1
        assert 0 <= logic(hostile) <= 1


def test_facts_are_shares_of_statements_that_a_passage_supports(tmp_path):
    corpus = tmp_path / "corpus.jsonl.gz"
    rows = ["The Nile is 6650 km long.", "Mount Everest is 8849 metres high."]
    corpus.write_bytes(gzip.compress("\n".join(json.dumps({"text": row}) for row in rows).encode()))
    facts = Facts(read_passages(corpus))
    said = [
        "The Nile is 6650 km long.",
        "The Nile is 6660 km long.",
        "The Nile is 6650 km long. Everest is 9 high.",
        "So",
    ]
    assert scores(facts, *said) == [1.0, 0.0, 0.5, 0.5]
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, row 2: holds no text under 'text'"):
        read_passages(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' + "[" * 99_999)
    with pytest.raises(ValueError, match=r"bad.jsonl, row 2: no JSON"):
        read_passages(tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        read_passages(tmp_path / "none.txt")


def test_safety_by_list_and_refusal(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# harm\nbomb\n/poison(ing|ed)?/\n")
    safety = Safety(read_patterns(path))
    refusal = "I'm sorry, I can't help with that."
    assert scores(safety, refusal, "Take a pipe", prompt="How to make a bomb?") == [1.0, 0.0]
    assert scores(safety, refusal, "Boil it", "Then poisoned", "bombastic", prompt="Tea?") == [0.5, 1.0, 0.0, 1.0]
    assert not refuses("Four. " * 60 + refusal)
    path.write_text("/(/\n")
    with pytest.raises(ValueError, match=r"words.txt, line 1"):
        read_patterns(path)


def test_rules_open_no_file_that_a_text_names(tmp_path, monkeypatch):
    words_file, corpus = tmp_path / "w.txt", tmp_path / "c.txt"
    words_file.write_text("bomb\n")
    corpus.write_text("one\n\ntwo\n")
    rules = [Syntax(("brackets", "equations", "json", "python")), Logic(), Facts(read_passages(corpus)),
             Safety(read_patterns(words_file))]  # fmt: skip

    def refuse(*args, **kwargs):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(pathlib.Path, "open", refuse)
    text = f"open('{corpus}').read() = 3\nfile://{words_file}\n@{corpus}"
    for rule in rules:
        assert isinstance(rule, Verifier)
        assert rule.price(case(text), 99) == 0
        [score] = scores(rule, text, prompt=str(corpus))
        assert 0 <= score <= 1


def counting(value, price=0, tokens=0):
    verifier = ToyVerifier(lambda text: value, price=price)
    return verifier


@pytest.mark.parametrize(
    ("how", "weights", "expected"),
    [("product", {}, 0.125), ("min", {}, 0.25), ("mean", {}, 0.375), ("mean", {"a": 3.0, "b": 1.0}, 0.3125)],
)
def test_compositions_by_hand(how, weights, expected):
    both = Composed({"a": counting(0.25, price=2), "b": counting(0.5, price=1)}, how=how, weights=weights)
    one = case("aaaa")
    [verdict] = both([one])
    assert verdict == Verdict(expected, 12, (), {"a": 0.25, "b": 0.5})
    assert both.price(one, 2) == 18


def test_what_a_product_refuses_is_said_and_a_sigmoid_maps_it():
    parts = {"rule": counting(0.5), "orm": counting(2.0)}
    [said] = Composed(parts)([case("a")])
    assert "'orm' said 2" in said
    assert "sigmoid" in said
    assert scores(Composed(parts, squash="sigmoid", squashed_parts=("orm",)), "a") == [
        pytest.approx(0.5 / (1 + math.exp(-2)))
    ]
    assert scores(Squashed(parts["orm"], temperature=2.0), "a") == [pytest.approx(1 / (1 + math.exp(-1)))]
    [nan] = Composed({"bad": counting(math.nan)}, how="min")([case("a")])
    assert nan == "its part 'bad' said NaN"
    short = counting(1.0)
    short.__class__ = type("Short", (ToyVerifier,), {"__call__": lambda self, cases: []})
    assert Composed({"short": short})([case("a")]) == ["its part 'short' gave 0 verdicts on 1 texts"]
    for bad in (
        {"parts": {}},
        {"parts": parts, "weights": {"rule": 1.0}},
        {"parts": parts, "how": "mean", "weights": {"x": 1.0}},
    ):
        with pytest.raises(ValueError, match=r"parts|part"):
            Composed(**bad)


def test_a_gate_asks_the_dear_verifier_only_where_the_cheap_one_passes():
    asked = []

    class Dear(ToyVerifier):
        def __call__(self, cases):
            asked.extend(c.node.answer for c in cases)
            return super().__call__(cases)

    gate = Gate(ByText(lambda text: float("a" in text)), Dear(lambda text: 0.75, price=1), otherwise=0.125)
    found = gate([case("ab"), case("bb"), case("aaa")])
    assert asked == ["ab", "aaa"]
    assert [(v.score, v.tokens) for v in found] == [(0.75, 2), (0.125, 0), (0.75, 3)]
    assert found[1].parts == {"gate": 0.0}
    assert gate.price(case("ab"), 3) == 5


def test_a_gate_saves_tokens_in_a_search():
    def method(problem):
        [answers] = yield Draw([problem.root], n=8, max_tokens=4, scored=True)
        yield Score(answers)
        return Found.best(answers)

    dear = ToyVerifier(lambda text: 1.0, price=1)
    spent = {}
    for name, verifier in (("dear", dear), ("gate", Gate(ByText(lambda t: float(t.startswith("a"))), dear))):
        [out] = search(
            ["a"], method, ToyPolicy(lambda t: {"a": 0.5, "b": 0.3, "$": 0.2}), verifiers={"verifier": verifier}
        )
        spent[name] = out.problem.ledger.verified
        assert all(
            ("then" in c.node.facts["verifier"]) == c.text.startswith("a") for c in out.answers if name == "gate"
        )
    assert 0 < spent["gate"] < spent["dear"]


class Writer(ToyPolicy):
    """Says given texts in turn; P(" yes") = 0.8."""

    def __init__(self, *texts):
        super().__init__(lambda text: {})
        self.texts = list(texts)

    def read(self, prompts):
        return [tuple(range(len(p))) for p in prompts]

    def encode(self, text):
        return (7,) * len(text)

    def draw(self, jobs):
        self.calls.append(("draw", len(jobs)))
        self.names = [(job.example, job.sample) for job in jobs]
        return [Drawn((1,) * len(text), text, (), "stop") for text in [self.texts.pop(0) for _ in jobs]]

    def likelihood(self, nodes, texts):
        return [[math.log(0.8 if len(t) == 4 else 0.2) / len(t)] * len(t) for t in texts]


def test_a_judge_reads_verdicts_strictly_counts_what_it_cannot_read_and_charges_what_it_reads_and_draws():
    said = ["It holds.\nCorrect: yes", "No.\nCorrect: no", "I think it is fine"]
    judge = Judge(Writer(*said), unreadable=0.25, max_tokens=40)
    cases = [case("2"), case("3"), case("4")]
    found = judge(cases)
    assert [v.score for v in found] == [1.0, 0.0, 0.25]
    assert [v.tokens for v in found] == [len(judge.question(c)) + len(t) for c, t in zip(cases, said, strict=True)]
    assert [v.parts["unreadable"] for v in found] == [0.0, 0.0, 1.0]
    assert judge.report() == {"asked": 3.0, "unreadable": 1 / 3}
    again = Judge(Writer(), max_tokens=40)
    assert again.price(cases[0], 5) + again.opening(cases[0].problem) == len(judge.question(cases[0])) + 5 + 40
    prices = [again.price(c, 0) + again.opening(c.problem) for c in cases]
    assert all(v.tokens <= price for v, price in zip(found, prices, strict=True))
    assert judge.policy.calls == [("draw", 3)]  # one batch
    assert all(sample > 1 << 20 for _, sample in judge.policy.names)  # no answer's noise


def test_what_questions_about_a_problem_share_is_charged_once_and_a_question_once_for_all_its_verdicts():
    said = ["Correct: yes", "Correct: no", "Correct: yes", "Correct: no"]
    judge = Judge(Writer(*said), max_tokens=40, verdicts=2)
    one = case("2")
    two = Case(one.problem, one.problem.child(one.problem.root, (1, 2, 3), "300", end="stop"))
    shared = len(judge.question(one)) - 1  # this writer's tokens are letters, and an empty answer shares all
    assert judge.opening(one.problem) == shared
    priced = [judge.price(c, 0) for c in (one, two)]
    assert priced == [1 + 2 * 40, 3 + 2 * 40]
    found = judge([one, two])
    assert [v.score for v in found] == [0.5, 0.5]
    assert [v.tokens for v in found] == [shared + 1 + len("".join(said[:2])), 3 + len("".join(said[2:]))]
    assert judge.opening(one.problem) == 0
    judge.forget([one.problem.root, one.node, two.node])
    assert (judge._heads, judge._paid, judge._read) == ({}, set(), {})


def test_a_question_that_spells_a_place_of_the_template_stays_as_it_is():
    judge = Judge(Writer(), mode="likelihood")
    asked = judge.question(case("7", prompt="what is {answer}?"))
    assert "what is {answer}?" in asked
    assert asked.count("7") == 1


def test_a_judge_rates_several_times_and_by_criteria():
    judge = Judge(Writer("Rating: 10", "Rating: 1", "Rating: 99"), mode="point", verdicts=3)
    [verdict] = judge([case("2")])
    assert verdict.score == 0.5
    assert verdict.parts["unreadable"] == pytest.approx(1 / 3)
    rubric = Judge(Writer("Ratings: truth=5, style=3"), mode="rubric", criteria=("truth", "style"), high=5)
    assert rubric([case("2")])[0].parts == {"unreadable": 0.0, "truth": 1.0, "style": 0.5}


def test_the_likelihood_of_yes_is_the_score_and_nothing_is_drawn():
    judge = Judge(Writer(), mode="likelihood")
    one = case("2")
    [verdict] = judge([one])
    assert verdict.score == pytest.approx(0.8)
    assert (
        verdict.tokens
        == len(judge.question(one)) + len("Correct:") + len(" yes") + len(" no")
        == Judge(Writer(), mode="likelihood").opening(one.problem) + judge.price(one, 0)
    )
    assert judge.policy.calls == []


def test_a_judge_in_a_search_stays_within_the_budget():
    def method(problem):
        [answers] = yield Draw([problem.root], n=4, max_tokens=3, scored=True)
        yield Score(answers)
        return Found.best(answers)

    class Short(Judge):
        def question(self, case):
            return "is " + case.node.answer

    class Says(ToyPolicy):
        def _draw(self, job):
            if letters(job.node.all_tokens).startswith("is"):
                return Drawn(ids("correct"), "Correct: yes", (0.0,) * 7, "stop")
            return super()._draw(job)

    policy = Says(lambda t: {"a": 0.5, "b": 0.3, "$": 0.2})
    for budget in (10, 30, 60, None):
        judge = Short(policy, max_tokens=8)
        [out] = search(["a"], partial(method), policy, verifiers={"verifier": judge}, budget=budget)
        assert budget is None or out.tokens_spent <= budget
        assert not judge._read  # forgotten with the tree
    assert [c.score for c in out.answers] == [1.0] * 4
