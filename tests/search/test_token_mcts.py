"""Token-level search against mctx on the same enumerated trees, and what it converges to."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest

from jaxpost.search.drive import search
from jaxpost.search.token_mcts import _Noise, token_mcts
from tests.search.toy import ToyPolicy, ToyVerifier

DEPTH = 4
PROMPTS = ["c", "ab", "b"]
SIMULATIONS = 24


@cache
def leaf(text):
    """A value in [0, 1] of every text, as if by a verifier."""
    return float(np.random.default_rng([ord(x) for x in text] + [7]).random())


@cache
def logits(prompt, answer):
    """Three letters, most probable first, the last one an end at some nodes; at the depth the end alone."""
    rng = np.random.default_rng([ord(x) for x in prompt + "|" + answer])
    p = np.sort(rng.dirichlet([1.0] * 3))[::-1]
    return p, "$" if len(answer) == DEPTH else "ab$" if answer and rng.random() < 0.3 else "abc"


def table_of(prompts):
    def table(text):
        prompt = next(p for p in sorted(prompts, key=len, reverse=True) if text.startswith(p))
        p, letters = logits(prompt, text[len(prompt) :])
        return {letter: float(x) if len(letters) > 1 else 1.0 for letter, x in zip(letters, p, strict=False)}

    return table


def enumerated(prompt):
    """Arrays over all nodes; node 0 is the root, 3 i + 1 + a the child of i by a."""
    count = (3 ** (DEPTH + 2) - 1) // 2
    prior, value, terminal = np.zeros((count, 3), np.float32), np.zeros(count, np.float32), np.zeros(count, bool)

    def visit(index, answer, done):
        value[index], terminal[index] = (leaf(answer) if index else 0.0), done
        if done:
            return
        p, letters = logits(prompt, answer)
        prior[index] = np.log(p) if len(letters) > 1 else [0.0, -1e9, -1e9]
        for action, letter in enumerate(letters):
            visit(3 * index + 1 + action, answer if letter == "$" else answer + letter, letter == "$")

    visit(0, "", False)
    return prior, value, terminal


def ask_mctx(policy, *, key=0, **kwargs):
    """mctx on the three trees; an end has its value as reward and nothing after it."""
    arrays = [jnp.asarray(np.stack(x)) for x in zip(*(enumerated(prompt) for prompt in PROMPTS), strict=True)]
    rows = jnp.arange(len(PROMPTS))

    def step(arrays, key, action, state):
        prior, value, terminal = arrays
        child = jnp.where(terminal[rows, state], state, 3 * state + 1 + action)
        was, ends = terminal[rows, state], terminal[rows, child]
        zero = jnp.zeros(len(PROMPTS), jnp.float32)
        reward = jnp.where(ends & ~was, value[rows, child], zero)
        out = mctx.RecurrentFnOutput(
            reward=reward, discount=jnp.where(ends, 0.0, 1.0), prior_logits=prior[rows, child],
            value=jnp.where(ends, zero, value[rows, child]),
        )  # fmt: skip
        return out, child

    root = mctx.RootFnOutput(prior_logits=arrays[0][:, 0], value=arrays[1][:, 0], embedding=jnp.zeros(3, jnp.int32))
    with jax.numpy_dtype_promotion("standard"):
        out = jax.jit(lambda arrays, root: policy(arrays, jax.random.key(key), root, step, SIMULATIONS, **kwargs))(
            arrays, root
        )
    tree = out.search_tree
    return np.asarray(out.action), np.asarray(tree.children_visits[:, 0]), np.asarray(out.action_weights), tree


def run(prompts=PROMPTS, *, judge=leaf, numbers=None, budget=None, together=16, **kwargs):
    policy = ToyPolicy(table_of(PROMPTS))
    kwargs = {"simulations": SIMULATIONS, "best": 3, "considered": 3, "answer_tokens": 6, "search_tokens": 1, **kwargs}
    verifiers = {"verifier": ToyVerifier(judge)}
    outs = search(prompts, partial(token_mcts, **kwargs), policy, verifiers=verifiers, numbers=numbers, budget=budget,
                  together=together)  # fmt: skip
    return policy, outs


@pytest.mark.parametrize("rule", ["gumbel", "puct"])
def test_visits_and_actions_are_those_of_mctx(rule):
    if rule == "gumbel":
        known = {"gumbel_scale": 0.0}
        action, visits, weights, tree = ask_mctx(
            mctx.gumbel_muzero_policy, gumbel_scale=0.0, max_num_considered_actions=3
        )
    else:
        known = {"dirichlet_fraction": 0.0}
        _, visits, weights, tree = ask_mctx(mctx.muzero_policy, dirichlet_fraction=0.0)
        action = visits.argmax(axis=1)
    policy, outs = run(rule=rule, **known)
    for i, out in enumerate(outs):
        assert out.error is None
        assert out.tree.facts["visits"] == visits[i].tolist()
        np.testing.assert_allclose(out.tree.facts["weights"], weights[i], rtol=2e-5)
        [chosen] = [child for child in out.tree.children if not child.pruned]
        assert chosen.tokens[0] == out.tree.facts["tokens"][action[i]]
        assert out.tree.visits == SIMULATIONS
        for child in out.tree.children:
            at = tree.children_index[i, 0, out.tree.facts["tokens"].index(child.tokens[0])]
            below = {grandchild.prior: grandchild.visits for grandchild in child.children if grandchild.visits}
            ordered = [below[prior] for prior in sorted(below, reverse=True)]
            if not child.complete:
                assert sorted(x for x in tree.children_visits[i, at].tolist() if x) == sorted(ordered)
                np.testing.assert_allclose(child.value, tree.node_values[i, at], rtol=1e-5)
    # Each simulation asks the model once, for all prompts.
    assert max(n for kind, n in policy.calls if kind == "rank") == len(PROMPTS)


def test_the_same_gumbel_noise_gives_the_visits_and_the_action_of_mctx(monkeypatch):
    """mctx draws noise g; the search is given the same g."""
    known = {"max_num_considered_actions": 3, "gumbel_scale": 10.0}
    found = set()
    for key in (1, 4):
        action, visits, weights, tree = ask_mctx(mctx.gumbel_muzero_policy, key=key, **known)
        gumbel = np.asarray(tree.extra_data.root_gumbel)
        assert np.abs(gumbel).min() > 0
        found.add(visits.tobytes())
        same = lambda self, problem, node, logits, rule, g=gumbel: (logits, g[problem.number])  # noqa: E731
        monkeypatch.setattr(_Noise, "root", same)
        _, outs = run(rule="gumbel")
        for i, out in enumerate(outs):
            assert out.tree.facts["visits"] == visits[i].tolist()
            assert out.tree.facts["tokens"][action[i]] == out.answers[0].node.path[0].tokens[0]
            np.testing.assert_allclose(out.tree.facts["weights"], weights[i], rtol=1e-4, atol=1e-6)
    assert len(found) == 2, "the noise matters"


def test_noise_is_fixed_by_the_prompts_number_and_neighbours_change_nothing():
    _, together = run(numbers=[5, 6, 7], search_tokens=3)
    for prompt, number, out in zip(PROMPTS, [5, 6, 7], together, strict=True):
        _, [alone] = run([prompt], numbers=[number], search_tokens=3)
        assert alone.answers[0].text == out.answers[0].text
        assert alone.tree.facts["visits"] == out.tree.facts["visits"]
        # Programs of another batch size may round the last bit otherwise.
        np.testing.assert_allclose(alone.tree.facts["weights"], out.tree.facts["weights"], rtol=1e-5)
    _, others = run(["b"] * 8, together=1, gumbel_scale=3.0)
    assert len({tuple(out.tree.facts["visits"]) for out in others}) > 1


@pytest.mark.parametrize("rule", ["gumbel", "puct"])
def test_it_converges_to_what_is_best_though_the_model_thinks_little_of_it(rule):
    """The value of a text is how much of the least probable way it goes."""

    def judge(text):
        return sum(x == "c" for x in text) / 4

    _, outs = run(judge=judge, rule=rule, gumbel_scale=0.0, dirichlet_fraction=0.0, search_tokens=2)
    for prompt, out in zip(PROMPTS, outs, strict=True):
        assert out.answers[0].text.startswith("cc" if "c" in logits(prompt, "c")[1] else "c")
        assert np.argmax(out.tree.facts["weights"]) == 2


@pytest.mark.parametrize("name", ["simulations", "best", "considered"])
def test_nothing_to_search_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} 0"):
        run(["b"], **{name: 0})


@pytest.mark.parametrize("budget", [0, 3, 20, 60])
def test_budgets_hold_and_something_is_found(budget):
    _, outs = run(search_tokens=4, budget=budget)
    assert all(out.tokens_spent <= budget for out in outs)
    assert all(out.answers or out.error for out in outs)
