"""Thinking budgets on toy tokens, by trying everything; what must come out is written down another way."""

import itertools

import numpy as np
import pytest
from toy_text import CHATML, fast_tokenizer

from jaxpost.generate.grammar import Constraint, compile
from jaxpost.generate.matcher import has, masks, tokens_of
from jaxpost.generate.thinking import ThinkingBudget
from jaxpost.text.tokenizer import Tokenizer

EOS, X, A, B, W = range(5)
SIZE = 5


def begun(budget, *, prompt=(X,), then=None, size=SIZE):
    return budget.start(list(prompt), vocab_size=size, end_ids=[EOS], then=then)


def reached(matcher, length) -> set[tuple[int, ...]]:
    """Every row of `length` tokens, or that an end token ended before."""
    out = set()

    def walk(matcher, tokens):
        if len(tokens) == length or (tokens and tokens[-1] == EOS):
            out.add(tuple(tokens))
            return
        for token in tokens_of(matcher.mask()):
            ahead = matcher.fork()
            assert ahead.advance(token)
            walk(ahead, [*tokens, token])

    walk(matcher, [])
    return out


def rows(length, vocab):
    """Every row that could be, end tokens at the end only."""
    whole = itertools.product([t for t in vocab if t != EOS], repeat=length)
    short = ((*row, EOS) for n in range(length) for row in itertools.product([t for t in vocab if t != EOS], repeat=n))
    return itertools.chain(whole, short)


def ends_at(row, marker):
    hits = [i for i in range(len(row)) if row[i : i + len(marker)] == marker]
    return hits[0] if hits else None


@pytest.mark.parametrize("marker", [(A,), (A, B)])
@pytest.mark.parametrize(("least", "most"), [(0, None), (2, None), (0, 3), (2, 3), (3, 3), (0, 0), (1, 1)])
def test_the_rows_that_keep_a_budget_are_those_that_can_be_written(marker, least, most):
    budget = ThinkingBudget(end=marker, min_tokens=least, max_tokens=most)

    def right(row):
        at = ends_at(row, marker)
        if at is not None:
            return least <= at and (most is None or at <= most) and not late(row, at)
        if row[-1] == EOS:
            return least <= len(row) - 1 and (most is None or len(row) - 1 < most)
        thought = len(row) if most is None else min(len(row), most)
        rest = row[thought:]  # only the marker may come after the most tokens of thinking
        return any(rest == marker[skip : skip + len(rest)] for skip in skips(row[:thought]))

    def skips(thinking):
        """Of a marker that thinking ends with, only the rest is forced, if that is not too early."""
        if len(marker) == 2 and thinking[-1:] == (A,) and len(thinking) - 1 >= least and len(thinking) == most:
            return [1]
        return [0]

    def late(row, at):
        return at == most and skips(row[:at]) == [1]

    length = 6
    expected = {row for row in rows(length, (EOS, X, A, B)) if right(row)}
    assert reached(begun(budget, size=4), length) == expected


def s1(wishes, *, least, most, wait, waits):
    """Budget forcing as a program: what is written while a model wishes for these tokens."""
    out, thought, done = [], 0, False
    for wish in wishes:
        if done:
            out.append(wish)
            if wish == EOS:
                break
            continue
        if wish not in (A, EOS):
            out.append(wish)
            thought += 1
        elif thought < least and waits > 0 and (most is None or thought + len(wait) < most):
            out += wait
            thought += len(wait)
            waits -= 1
        else:
            out.append(wish)
            if wish == EOS:
                break
            done = True
            continue
        if most is not None and thought == most:
            out.append(A)
            done = True
    return out


@pytest.mark.parametrize(("least", "most"), [(9, None), (2, None), (3, 3), (4, 5), (0, 2)])
@pytest.mark.parametrize(("wait", "waits"), [((W,), 1), ((W, B), 2)])
def test_an_early_end_becomes_wait(least, most, wait, waits):
    budget = ThinkingBudget(end=(A,), min_tokens=least, max_tokens=most, wait=wait, max_waits=waits)
    for wishes in itertools.product((EOS, X, A), repeat=5):
        matcher, out = begun(budget), []
        for wish in wishes:
            token_list = [wish] if matcher.advance(wish) else []
            out += token_list
            while matcher.forced():
                assert tokens_of(matcher.mask()) == matcher.forced()[:1]
                out.append(matcher.forced()[0])
                assert matcher.advance(out[-1])
            if out[-1:] == [EOS]:
                assert matcher.finished
                assert tokens_of(matcher.mask()) == [EOS]
                assert not matcher.advance(X)
                break
        assert out == s1(wishes, least=least, most=most, wait=list(wait), waits=waits), wishes


def test_the_begin_marker_is_written_unless_the_prompt_ends_within_thinking():
    budget = ThinkingBudget(begin=(B, W), end=(A,), max_tokens=1)
    for prompt in ([X], [], [B, W, X, A], [W, B], [A], [X, B, W, EOS, X], [B, W, A, B, W, EOS]):
        matcher = begun(budget, prompt=prompt)
        assert matcher.forced() == [B, W]
        assert matcher.advance(B)
        assert not matcher.advance(X)
        assert matcher.advance(W)
        assert tokens_of(matcher.mask()) == [EOS, X, A, B, W]
        assert matcher.advance(X)
        assert matcher.forced() == [A]
        assert not matcher.over
        assert matcher.advance(A)
        assert matcher.over
    for prompt in ([B, W], [X, B, W, X], [B, W, A, B, W], [X, B, W, A, EOS, X, B, W]):
        assert begun(budget, prompt=prompt).forced() == []
    none = ThinkingBudget(begin=(B,), end=(A,), max_tokens=0)
    assert begun(none).forced() == [B, A]
    assert begun(none, prompt=[B]).forced() == [A]


def test_a_grammar_begins_where_thinking_ends():
    tokenizer = Tokenizer(fast_tokenizer("chatml", CHATML))
    [end], [x] = tokenizer.encode("<|im_start|>"), tokenizer.encode("x")
    ends, size = list(tokenizer.eos_ids), tokenizer.vocab_size
    automaton = compile(Constraint(choice=["yes", "no"]), tokenizer)
    budget = ThinkingBudget(end=[end], min_tokens=1, max_tokens=2)
    matcher = budget.start([1], vocab_size=size, end_ids=ends, then=automaton.start())
    assert set(range(size)) - set(tokens_of(matcher.mask())) == {end, *ends}
    assert matcher.leaf() is matcher
    assert matcher.advance(x)
    assert set(range(size)) - set(tokens_of(matcher.mask())) == set(ends)
    fork = matcher.fork()
    assert matcher.advance(x)
    assert matcher.forced() == [end]
    assert matcher.advance(end)
    assert matcher.leaf() is not matcher
    np.testing.assert_array_equal(matcher.mask(), automaton.start().mask())
    rows = masks([matcher, fork, None], size)
    np.testing.assert_array_equal(rows[0], matcher.mask())
    np.testing.assert_array_equal(rows[1], fork.mask())
    rest = tokenizer.encode("yes")
    assert matcher.advance(rest[0])
    assert matcher.forced() == [*rest[1:], *ends]
    assert not matcher.finished
    assert all(matcher.advance(token) for token in matcher.forced())
    assert matcher.finished
    assert matcher.problem is None
    assert fork.advance(end)
    assert not has(fork.mask(), ends[0])
    assert fork.advance(tokenizer.encode("no")[0])
    with_const = budget.start(
        [1], vocab_size=size, end_ids=ends, then=compile(Constraint(choice=["no"]), tokenizer).start()
    )
    assert with_const.advance(x)
    assert with_const.advance(x)
    assert with_const.forced()[0] == end
    assert tokenizer.decode(with_const.forced()[1:-1]) == "no"


def test_with_a_grammar_to_come_a_wish_to_end_the_row_is_a_wish_to_end_thinking():
    class Anything:
        vocab_size, finished, problem = SIZE, False, None

        def mask(self):
            return begun(ThinkingBudget(end=(A,))).mask()

        def advance(self, token):
            return True

        def forced(self):
            return []

        def fork(self):
            return self

        def leaf(self):
            return self

        @staticmethod
        def fill(matchers):
            return None

    budget = ThinkingBudget(end=(A,), min_tokens=5, wait=(W,), max_waits=1)
    matcher = begun(budget, then=Anything())
    assert has(matcher.mask(), EOS)
    assert not matcher.advance(EOS)
    assert matcher.forced() == [W]
    assert matcher.advance(W)
    assert not has(matcher.mask(), EOS)
    assert matcher.advance(A)
    assert matcher.advance(EOS)


def test_a_refused_token_changes_nothing_and_forks_go_their_own_way():
    matcher = begun(ThinkingBudget(end=(A,), min_tokens=1, max_tokens=2))
    for wrong in (A, EOS, -1, 99):
        assert not matcher.advance(wrong)
    fork = matcher.fork()
    assert fork.advance(X)
    assert has(fork.mask(), A)
    assert not has(matcher.mask(), A)
    assert matcher.advance(X)
    assert matcher.advance(X)
    assert matcher.forced() == [A]
    assert fork.forced() == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"end": ()}, "marker that ends thinking"),
        ({"end": (A, B, A)}, "ends as it begins"),
        ({"end": (A,), "min_tokens": 3, "max_tokens": 2}, "at least 3 and at most 2"),
        ({"end": (A,), "min_tokens": -1}, "at least -1"),
        ({"end": (A,), "wait": (W,)}, "go together"),
        ({"end": (A,), "max_waits": 1}, "go together"),
        ({"end": (A, B), "wait": (W,), "max_waits": 1}, "one token"),
        ({"end": (A,), "wait": (W, A), "max_waits": 1}, "must not hold the end marker"),
        ({"end": (9,)}, "token 9 of end"),
        ({"end": (EOS,)}, "token 0 of end"),
        ({"end": (A,), "begin": (7,)}, "token 7 of begin"),
    ],
)
def test_a_budget_that_contradicts_itself(given, told):
    with pytest.raises(ValueError, match=told):
        begun(ThinkingBudget(**given))
