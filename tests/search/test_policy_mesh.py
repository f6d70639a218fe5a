"""A search on a mesh of 8 devices finds what it finds on one; its process model says the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpost.generate.engine import Engine, Weights
from jaxpost.generate.sampler import make_sampler
from jaxpost.models import heads
from jaxpost.search.contract import Found
from jaxpost.search.drive import search
from jaxpost.search.policy import EnginePolicy
from jaxpost.search.process import ProcessVerifier, Written
from jaxpost.search.requests import Draw, Rank, Score
from tests.generate.test_mesh import OPTIONS, all_pages_came_back, on_mesh, toy

pytestmark = pytest.mark.slow

PROMPTS = ["abc", "e", "afcbdd", "ccccccccb"]


def encode(text):
    return ["abcdef".index(letter) for letter in text]


def decode(tokens):
    return "".join("abcdef__"[t] for t in tokens if t < 6)


def beam(problem, *, width=4, keep=2):
    nodes, seen = [problem.root], []
    for _ in range(3):
        drawn = yield Draw(nodes, n=width // len(nodes), max_tokens=6, stop=("b",))
        children = [child for some in drawn for child in some]
        if not children:
            break
        seen.append((yield Score(children)))
        open_ = sorted((c for c in children if not c.complete), key=lambda c: -c.score)
        nodes = open_[:keep]
        problem.prune(open_[keep:])
        if not nodes:
            break
        seen += [list(logprobs) for _, logprobs in (yield Rank(nodes, best=3))]
    problem.root.facts["seen"] = seen
    return Found.best([node for node in problem.root.walk() if node.parent is not None])


def run(model, params, mesh):
    sampler = make_sampler(model, mesh=mesh, encode=encode, decode=decode, cache_tokens=4096, **OPTIONS)
    policy = EnginePolicy(sampler, params, render=encode, seed=5)
    engine = Engine(model, cache_tokens=4096, page_size=8, prefill_tokens=64, mesh=mesh)
    judge = ProcessVerifier(
        engine, Weights(params, params), read=heads.score, rows=16,
        head={"kernel": jax.random.normal(jax.random.key(1), (16, 1), jnp.float32)},
        write=lambda prompt, answer: Written(t := [1, *encode(prompt + answer)], [len(t) - 1], 1 + len(prompt)),
        scores=lambda outputs: outputs[:, 0],
    )  # fmt: skip
    found = search(PROMPTS, beam, policy, verifiers={"verifier": judge})
    assert all_pages_came_back(sampler.engine)
    assert all_pages_came_back(engine)
    return found


def test_one_and_eight_devices_find_the_same():
    one = run(*toy(), None)
    many = run(*on_mesh("data2_fsdp2_tensor2"))
    for a, b in zip(one, many, strict=True):
        left, right = list(a.tree.walk()), list(b.tree.walk())
        assert [(n.number, n.tokens, n.end) for n in left] == [(n.number, n.tokens, n.end) for n in right]
        assert len(left) > 6
        np.testing.assert_allclose([n.score for n in left], [n.score for n in right], atol=1e-4)
        for x, y in zip(a.tree.facts["seen"], b.tree.facts["seen"], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)
