"""Sampling, votes and beams against what their definitions say: enumeration, hand counts, frequencies."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections import Counter
from functools import partial

import numpy as np
import pytest

from jaxpost.generate import beam as reference
from jaxpost.generate.engine import Engine
from jaxpost.generate.layout import Text
from jaxpost.search.best_of_n import best_of_n
from jaxpost.search.chain_of_thought import few_shot, step_format, zero_shot
from jaxpost.search.drive import search
from jaxpost.search.dvts import dvts
from jaxpost.search.forcing import budget_forcing
from jaxpost.search.oreo import oreo
from jaxpost.search.rebase import rebase, shares
from jaxpost.search.sampling import greedy, sample
from jaxpost.search.self_consistency import self_consistency
from jaxpost.search.step_beam import step_beam
from jaxpost.search.token_beam import token_beam
from jaxpost.search.tree import Ledger, Node, Problem
from jaxpost.search.vote import choose, confidence, count, elect, entropy, most_confident, settled
from tests.search.toy import END, LETTERS, ToyPolicy, ToyVerifier, letters, texts


def uneven(text):
    """Ends within five letters; probabilities that no two texts share."""
    if len(text) >= 6:
        return {"$": 1.0}
    rng = np.random.default_rng([ord(x) for x in text])
    p = rng.dirichlet(np.ones(4))
    return dict(zip(["a", "b", ";", "$"], p.tolist(), strict=True))


def run(method, *, table=uneven, judge=lambda text: 0.0, prompts=("a",), **known):
    verifiers = {"verifier": ToyVerifier(judge)}
    return search(list(prompts), method, ToyPolicy(table, seed=5), verifiers=verifiers, **known)


def ended(text, parent=None, score=math.nan, logprobs=(-1.0,)):
    problem = Problem(0, "", Node(0, None, (), ""), Ledger(), str.strip)
    return Node(1, parent or problem.root, (2,), text, tuple(logprobs), "stop", score=score)


# Samples


def test_greedy_takes_the_most_probable_token_each_time():
    text = "a"
    while (best := max(uneven(text), key=uneven(text).get)) != "$":
        text += best
    assert run(greedy)[0].answers[0].text == text[1:]


def test_samples_have_the_models_frequencies():
    exact = texts(uneven, "a", 7)
    assert math.isclose(sum(exact.values()), 1.0)
    [output] = run(partial(sample, n=3000, max_tokens=8))
    found = Counter(c.text for c in output.answers)
    common = {text: p for text, p in exact.items() if p * 3000 >= 5}
    rest = 3000 - sum(found[text] for text in common)
    expected = [*(3000 * p for p in common.values()), 3000 * (1 - sum(common.values()))]
    chi = sum((o - e) ** 2 / e for o, e in zip([*(found[t] for t in common), rest], expected, strict=True))
    freedom = len(expected) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom)
    assert [c.node.number for c in output.answers] == list(range(1, 3001))


# Votes


def test_a_settled_vote_never_flips_and_no_other_is_called_settled():
    """Against every way in which the remaining ballots can fall."""

    def winner(ballots):
        return count((b, 1.0) for b in ballots).ranking[0]

    for given in itertools.chain.from_iterable(itertools.product("xyz", repeat=n) for n in range(1, 6)):
        votes = count((b, 1.0) for b in given).votes
        for remaining in range(4):
            futures = itertools.product(["x", "y", "z", "new", None], repeat=remaining)
            holds = all(winner([*given, *(f for f in future if f)]) == winner(given) for future in futures)
            assert settled(votes, remaining) == holds, (given, remaining)
    assert not settled({}, 1)
    assert settled({}, 0)


def test_stopping_early_changes_no_answer_and_saves_tokens():
    known = {"prompts": ["a"] * 40, "canonical": lambda text: str("b" in text)}
    whole = run(partial(self_consistency, n=16, max_tokens=8), **known)
    early = run(partial(self_consistency, n=16, max_tokens=8, early_stop=True, wave=3), **known)
    for full, short in zip(whole, early, strict=True):
        assert full.answers[0].canonical == short.answers[0].canonical
        assert [n.text for n in short.tree.children] == [n.text for n in full.tree.children[: len(short.tree.children)]]
    assert sum(o.tokens_spent for o in early) < 0.9 * sum(o.tokens_spent for o in whole)


def test_confidence_as_numpy_computes_it():
    p = np.sort(np.random.default_rng(0).dirichlet(np.ones(30), size=57))[:, :-8:-1]
    told, x = np.log(p).tolist(), -np.log(p).mean(axis=1)
    groups = np.array([x[i : i + 5].mean() for i in range(53)])
    expected = {"mean": x.mean(), "tail": x[-5:].mean(), "lowest": groups.min(), "bottom": np.sort(groups)[:5].mean()}
    for how, value in expected.items():
        assert math.isclose(confidence(told, how, window=5), value)
        assert confidence([(-0.5, -1.5)], how, window=5) == 1.0
    whole = np.random.default_rng(1).dirichlet(np.ones(9), size=4)
    assert math.isclose(entropy(np.log(whole).tolist()), -(whole * np.log(whole)).sum(axis=1).mean())
    best = np.sort(whole)[:, :-4:-1]
    assert entropy(np.log(best).tolist()) < entropy(np.log(whole).tolist())
    assert math.isnan(confidence([]))
    assert most_confident([0.1, math.nan, 0.3, 0.3, 0.2], 0.5) == [2, 3]
    with pytest.raises(ValueError, match="at least 1"):
        confidence([(-1.0,)], window=0)


def test_votes_by_hand():
    problem = Problem(0, "", Node(0, None, (), ""), Ledger(), lambda t: t.strip() or None)
    said = [("7", 0.4), ("9", 0.7), ("7", 0.5), (" ", 1.0), ("9", math.nan), ("7 ", 0.05), ("3", 0.9)]
    nodes = [ended(text, problem.root, score) for text, score in said]
    weighted = elect(problem, nodes, lambda node: node.score)
    assert weighted.votes == pytest.approx({"7": 0.95, "9": 0.7, "3": 0.9})
    assert [c.text for c in weighted.candidates] == ["7", "7", "7 ", "3", "9", " ", "9"]
    assert "1 of 7 answers had no score" in problem.warnings[0]
    assert choose(problem, nodes, "majority", lambda n: n.score).votes == {"7": 3, "9": 2, "3": 1}
    assert choose(problem, nodes, "best", lambda n: n.score).candidates[0].text == " "
    assert elect(problem, [ended("9", problem.root), ended("7", problem.root)]).candidates[0].text == "9"
    elect(problem, [ended("9", problem.root, -0.5)], lambda node: node.score)
    assert "some are negative" in problem.warnings[-1]


def test_confident_votes_alone_count():
    method = partial(self_consistency, n=20, max_tokens=8, weights="confidence", measure="lowest", window=2, keep=0.2,
                     top_logprobs=3)  # fmt: skip
    [output] = run(method)

    def sure(node):
        """From the table itself: the least sure two places next to each other."""
        places = ["a" + letters(node.tokens[:i]) for i in range(len(node.tokens))]
        best = [sorted(uneven(place).values(), reverse=True)[:3] for place in places]
        values = [-sum(math.log(p) for p in (*row, 1e-30, 1e-30)[:3]) / 3 for row in best]
        pairs = [sum(values[i : i + 2]) / len(values[i : i + 2]) for i in range(max(1, len(values) - 1))]
        return min(pairs)

    whole = sorted(output.tree.children, key=lambda n: -sure(n))
    voters = [n for n in whole if n.complete][:4]
    by_hand: Counter[str] = Counter()
    for node in voters:
        by_hand[node.text] += sure(node)
    assert output.votes == pytest.approx(dict(by_hand))
    assert len(output.answers) == 20
    for wrong in (
        {"keep": 0.0},
        {"wave": 0},
        {"early_stop": True, "keep": 0.5},
        {"early_stop": True, "weights": "score"},
        {"early_stop": True, "weights": "confidence"},
        {"window": 0},
        {"top_logprobs": 0},
    ):
        with pytest.raises(ValueError, match=r"keep|wave|window"):
            run(partial(self_consistency, **wrong))


def test_real_scores_rank_and_vote_as_they_were_given(shared_data):
    """best-of-8 and votes over a real reward model's scores of real answers, against counts made here."""
    path = shared_data / "reward" / "math_best_of_8_scored.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    right = Counter()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for row in rows:
        scores, answers = [s[0] for s in row["pred_score"]], row["pred"]
        canonical = dict(zip(row["response"], answers, strict=True)).__getitem__
        problem = Problem(0, row["question"], Node(0, None, (), ""), Ledger(), canonical)
        pairs = list(zip(row["response"], map(sigmoid, scores), strict=True))
        nodes = [ended(text, problem.root, score) for text, score in pairs]
        best = choose(problem, nodes, "best", lambda n: n.score)
        assert [c.score for c in best.candidates] == sorted((n.score for n in nodes), reverse=True)
        assert best.candidates[0].text == row["response"][int(np.argmax(scores))]
        weighted, majority = (choose(problem, nodes, how, lambda n: n.score) for how in ("weighted", "majority"))
        by_hand = {
            a: sum(1 / (1 + math.exp(-s)) for s, b in zip(scores, answers, strict=True) if a == b) for a in answers
        }
        assert weighted.votes == pytest.approx(dict(by_hand))
        assert weighted.candidates[0].canonical == max(by_hand, key=lambda a: by_hand[a])
        assert majority.votes == Counter(answers)
        judged = dict(zip(answers, row["score"], strict=True))
        right["first"] += row["score"][0]
        for name, found in (("best", best), ("weighted", weighted), ("majority", majority)):
            right[name] += judged[canonical(found.candidates[0].text)]
        right["any"] += any(row["score"])
    assert right["best"] >= right["first"]
    assert right["any"] >= max(right["best"], right["weighted"], right["majority"])


# Beams over tokens


class HostEngine(Engine):
    """Forks lists of tokens: as much of an engine as the search of `generate.beam` needs on the host."""

    def __init__(self):
        pass

    def fork(self, text):
        return Text(list(text.tokens), text.prompt_length)

    def push(self, text, token):
        text.tokens.append(token)

    def release(self, texts):
        pass


def beams_of_the_sampler(table, rules, max_tokens):
    """`generate.beam`'s own search, which equals transformers', over the toy's tables."""
    most = reference.candidates(rules.beams, np.array([END], np.int32))
    made = reference._Search(0, [LETTERS.index("a")], rules, max_tokens, frozenset([END]), most)
    made.open = [reference._Open(0.0, Text([LETTERS.index("a")], 1))]
    goes_on = True
    while goes_on:
        width = len(LETTERS)
        logprobs, tokens = np.full((len(made.open), width), -np.inf), np.tile(np.arange(width), (len(made.open), 1))
        for row, open_ in enumerate(made.open):
            for letter, p in table(letters(open_.text.tokens)).items():
                logprobs[row, LETTERS.index(letter)] = math.log(p) if p else -np.inf
        goes_on = made.step(HostEngine(), logprobs, tokens)
    return [(letters(beam.tokens).removesuffix("$"), beam.score, beam.finish) for beam in made.ended]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("early", [False, True, "never"])
def test_token_beams_are_those_of_the_sampler(penalty, early):
    for beams, longest in itertools.product((1, 2, 3, 5), (3, 8)):
        method = partial(token_beam, beams=beams, max_tokens=longest, length_penalty=penalty, early_stopping=early)
        [output] = run(method)
        expected = beams_of_the_sampler(uneven, reference.Rules(beams, penalty, early), longest)
        found = [(c.text, c.score, c.node.end) for c in output.answers]
        by_score = sorted(expected, key=lambda one: (one[0], -one[1]))
        assert sorted(found) == [(t, pytest.approx(s), e) for t, s, e in by_score]
        assert found[0][0] == expected[0][0]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_token_beams_are_brute_force(penalty):
    exact = texts(uneven, "a", 7)
    scores = {text: math.log(p) / (len(text) + 1) ** penalty for text, p in exact.items() if p > 0}
    [output] = run(partial(token_beam, beams=400, max_tokens=7, length_penalty=penalty))
    best = sorted(scores, key=lambda text: -scores[text])[:20]
    assert [c.text for c in output.answers[:20]] == best
    assert [c.score for c in output.answers[:20]] == pytest.approx([scores[text] for text in best])


# Beams over steps


def steps_table(text):
    """Three steps of one letter, then the end: eight answers."""
    body = text[1:]
    if body.endswith(";") or not body:
        return {"$": 1.0} if body.count(";") == 3 else {"a": 0.5, "b": 0.5}
    return {";": 1.0}


VALUE = {"a;": 0.9, "b;": 0.2, "a;a;": 0.3, "a;b;": 0.2, "b;a;": 0.8, "b;b;": 0.1}
"""The first step misleads: what looks best leads nowhere."""


def judged(text):
    return VALUE.get(text, 0.95 if text == "b;a;b;" else 0.25 if text.endswith(";") else 0.5)


STEP = {"separator": ";", "max_tokens": 4}


def test_a_wide_step_beam_is_brute_force_and_a_narrow_one_is_misled():
    best = max(texts(steps_table, "x", 7), key=judged)
    assert best == "b;a;b;"
    wide = run(partial(step_beam, width=48, factor=1, **STEP), table=steps_table, judge=judged, prompts=["x"])[0]
    assert wide.answers[0].text == best
    narrow = run(partial(step_beam, width=8, factor=8, **STEP), table=steps_table, judge=judged, prompts=["x"])[0]
    assert narrow.answers[0].text.startswith("a;")


def test_lookahead_replaces_a_steps_score_by_that_of_where_it_leads():
    ahead = partial(step_beam, width=8, factor=8, lookahead=1, **STEP)

    def table(text):  # greedy continuations are known: always the a
        return (
            {k: (0.55 if k == "a" else 0.45) for k in steps_table(text)}
            if len(steps_table(text)) > 1
            else steps_table(text)
        )

    [output] = run(ahead, table=table, judge=judged, prompts=["x"])
    for child in output.tree.children:
        assert child.facts["lookahead"] == "a;"
        assert child.score == judged(child.text + "a;") != judged(child.text)
    assert output.answers[0].text.startswith("b;")  # 0.8 where b leads, 0.3 where a does
    deeper = run(partial(step_beam, width=8, factor=8, lookahead=5, **STEP), table=table, judge=judged, prompts=["x"])[
        0
    ]
    assert {child.facts["lookahead"] for child in deeper.tree.children} == {"a;a;"}


def test_step_beam_keeps_the_best_and_fills_the_width_again():
    [output] = run(partial(step_beam, width=8, factor=4, **STEP), table=steps_table, judge=judged, prompts=["x"])
    level = [output.tree]
    for _ in range(3):
        children = [child for node in level for child in node.children]
        assert len(children) == 8
        kept = [child for child in children if child.children]
        best = sorted(children, key=lambda n: -n.score)[:2]
        assert {n.number for n in kept} == {n.number for n in best}
        level = kept
    assert all(len(node.children) == 4 for node in level)


def test_dvts_subtrees_never_compare():
    [output] = run(partial(dvts, width=8, factor=2, **STEP), table=steps_table, judge=judged, prompts=["x"])
    firsts = output.tree.children
    groups = [firsts[i : i + 2] for i in range(0, 8, 2)]
    for _ in range(3):
        chosen = [max(group, key=lambda n: n.score) for group in groups]
        assert all(not n.children for group, best in zip(groups, chosen, strict=True) for n in group if n is not best)
        groups = [best.children for best in chosen]
        assert all(len(group) == 2 for group in groups)
    assert len(output.answers) == 8
    with pytest.raises(ValueError, match="multiple of factor"):
        run(partial(dvts, width=6, factor=4))


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 50.0])
def test_shares_sum_and_are_within_one_of_the_softmax(temperature):
    rng = np.random.default_rng(1)
    for size in (1, 2, 5, 9):
        scores = rng.uniform(size=size)
        exact = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
        for total in (0, 1, 7, 16, 64):
            found = shares(scores.tolist(), total, temperature=temperature)
            assert sum(found) == total
            assert np.all(np.abs(np.array(found) - total * exact) < 1)
            order = np.argsort(-scores)
            assert list(np.array(found)[order]) == sorted(found, reverse=True)
    assert shares([0.5, math.nan, 0.5], 4, temperature=temperature) == [2, 0, 2]
    assert shares([math.nan] * 3, 4, temperature=temperature) == [2, 1, 1]
    assert shares([1e9, 0.0], 3, temperature=temperature) == [3, 0]
    assert shares([], 3, temperature=temperature) == []


def test_rebase_gives_each_step_its_share():
    """By hand: after x, steps "a;" (score T ln 3) and "b;" (0) stand as drawn; each a gets 3 times a b's steps."""
    temperature = 0.2
    value = lambda text: temperature * math.log(3) if text.endswith("a;") else 0.0  # noqa: E731
    method = partial(rebase, width=12, temperature=temperature, **STEP)
    [output] = run(method, table=steps_table, judge=value, prompts=["x"])
    firsts = output.tree.children
    assert len(firsts) == 12
    a = sum(n.text == "a;" for n in firsts)
    part = 12 / (3 * a + (12 - a))
    for node in firsts:
        share = 3 * part if node.text == "a;" else part
        assert abs(len(node.children) - share) < 1
    assert sum(len(n.children) for n in firsts) == 12
    assert sum(c.node.complete for c in output.answers) == 12


def test_rebase_takes_ended_answers_off_the_width():
    table = lambda text: {"a;"[len(text) % 2 == 0]: 1.0} if len(text) < 3 else {"a": 0.5, "$": 0.5, ";": 0.0}  # noqa: E731
    [output] = run(
        partial(rebase, width=10, separator=";", max_tokens=1), table=table, judge=lambda t: 0.5, prompts=["x"]
    )
    done, level = 0, [output.tree]
    while level:
        children = [child for node in level for child in node.children]
        assert len(children) == 10 - done or not children
        done += sum(child.complete for child in children)
        level = [child for child in children if child.children]
    assert done == 10


# A value function


def test_a_value_of_nothing_leaves_the_most_probable_text():
    exact = texts(uneven, "a", 7)
    [output] = run(partial(oreo, unit="token", beams=100, expand=4, likelihood=1.0, max_tokens=8), judge=lambda t: 0.0)
    assert output.answers[0].text == max(exact, key=exact.get)


def test_the_value_guides_and_the_likelihood_moderates():
    value = lambda text: text.count("b")  # noqa: E731
    table = lambda text: {"a": 0.9, "b": 0.1} if len(text) < 5 else {"$": 1.0}  # noqa: E731
    for unit in ("token", "step"):
        method = partial(oreo, unit=unit, beams=2, expand=8, separator="b", max_tokens=6)
        greedy_in_value = run(method, table=table, judge=value)[0].answers[0].text
        moderate = run(partial(method, likelihood=10.0), table=table, judge=value)[0].answers[0].text
        assert value(greedy_in_value) > value(moderate)
        assert moderate == "aaaa"
    with pytest.raises(ValueError, match="at least 1"):
        run(partial(oreo, beams=0))


# Thinking, prompts


def thinking(text):
    """Thinks one letter at a time and ends it with ";" soon; after that answers "b"."""
    _, mark, said = text[1:].partition(";")
    if not mark:
        return {"a": 0.6, ";": 0.4}
    return {"b": 1.0} if not said else {"$": 1.0}


@pytest.mark.parametrize("waits", [0, 1, 3])
def test_forced_thinking_waits_and_ends(waits):
    for number in range(8):
        method = partial(budget_forcing, marker=";", max_thinking=40, waits=waits, wait="?", max_tokens=4)
        [output] = run(method, table=thinking, prompts=["x"], numbers=[number])
        path = output.answers[0].node.path
        text = output.answers[0].text
        assert text.count("?") == waits
        assert text.count(";") == 1
        assert text.endswith(";b")
        assert [node.note for node in path].count("wait") == waits
        # What was refused stands beside what was kept: the same tokens but for the marker.
        kept = [node for node in path if node.note == "the end was refused"]
        for node in kept:
            [other] = [n for n in node.parent.children if n is not node]
            assert other.tokens[:-1] == node.tokens
            assert other.pruned


def test_thinking_that_does_not_end_is_ended_by_force():
    table = lambda text: {"$": 1.0} if "=b" in text else {"b": 1.0} if text.endswith("=") else {"a": 1.0}  # noqa: E731
    method = partial(budget_forcing, marker=";", answer_prefix="=", max_thinking=5, waits=2, wait="?", max_tokens=4)
    [output] = run(method, table=table, prompts=["x"])
    assert output.answers[0].text == "aaaaa;=b"
    assert output.problem.ledger.generated == 5 + 2
    [ends] = run(partial(budget_forcing, waits=1, wait="?", max_thinking=9), prompts=["x"],
                 table=lambda text: {"a": 1.0} if text[-1] in "x?" else {"$": 1.0})  # fmt: skip
    assert ends.answers[0].text == "a?a"  # no marker: an answer's end is refused once, then it stands


def test_templates_keep_the_kind_of_a_prompt():
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"}]
    for template in (zero_shot, step_format, partial(few_shot, examples=[("1+1?", "It is 2.")])):
        assert "2+2?" in template("2+2?")
        made = template(turns)
        assert made[0] == turns[0]
        assert made[-1]["role"] == "user"
        assert turns == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+2?"}]
    assert zero_shot(turns)[-1]["content"] == "2+2?\n\nLet's think step by step."
    shots = few_shot(turns, examples=[("1+1?", "It is 2.")])
    assert [m["content"] for m in shots] == ["Be kind.", "1+1?", "It is 2.", "2+2?"]
    with pytest.raises(ValueError, match="needs examples"):
        few_shot("2+2?", examples=[])
    with pytest.raises(ValueError, match="end with a user"):
        zero_shot([{"role": "assistant", "content": "4"}])
    [output] = run(partial(best_of_n, n=2), prompts=[zero_shot("a", instruction="b")])
    assert output.problem.prompt == "a\n\nb"
