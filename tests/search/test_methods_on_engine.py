"""Methods on the engine: a token beam is the sampler's own, and what methods make by hand reads as any other text."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from jaxpost.generate.beam import beam_search
from jaxpost.generate.params import SamplingParams
from jaxpost.search.drive import search
from jaxpost.search.forcing import budget_forcing
from jaxpost.search.oreo import oreo
from jaxpost.search.rebase import rebase
from jaxpost.search.self_consistency import self_consistency
from jaxpost.search.step_beam import step_beam
from jaxpost.search.token_beam import token_beam
from tests.generate.toy_lm import learner_logits, log_softmax, toy
from tests.search.test_engine_policy import PROMPTS, encode, free, policy
from tests.search.toy import ToyVerifier

WINDOW = 5
STEPS = {"separator": "b", "max_tokens": 6, "max_steps": 4}
METHODS = {
    "vote": partial(self_consistency, n=6, max_tokens=12, early_stop=True, wave=3),
    "lookahead": partial(step_beam, width=4, factor=2, lookahead=1, **STEPS),
    "rebase": partial(rebase, width=4, **STEPS),
    "oreo": partial(oreo, unit="token", beams=2, expand=3, likelihood=0.1, max_tokens=6),
    "forcing": partial(budget_forcing, marker="d", max_thinking=16, waits=2, wait="fa", max_tokens=6),
}


def test_token_beams_are_those_of_the_sampler():
    made = policy(WINDOW)
    whole = beam_search(
        made.sampler, toy(WINDOW)[1], [encode(p) for p in PROMPTS], SamplingParams(temperature=0, n=3, max_tokens=8),
        beams=3,
    )  # fmt: skip
    outputs = search(PROMPTS, partial(token_beam, beams=3, max_tokens=8), made)
    for beams, output in zip(whole, outputs, strict=True):
        found = [tuple(t for node in c.node.path for t in node.tokens) for c in output.answers]
        assert found == [beam.tokens for beam in beams]
        np.testing.assert_allclose([c.score for c in output.answers], [beam.score for beam in beams], atol=1e-4)
    assert free(made)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("vote", "rebase", "oreo") else []) for name in METHODS
])  # fmt: skip
def test_every_piece_is_what_the_learner_reads_after_all_before_it(name):
    made = policy(WINDOW)
    verifiers = {"verifier": ToyVerifier(lambda text: (1 + text.count("a")) / (2 + len(text)))}
    outputs = search(PROMPTS, METHODS[name], made, verifiers=verifiers)
    checked = 0
    for output in outputs:
        assert output.error is None
        for node in output.tree.walk():
            if node.logprobs and node.note != "lookahead":
                logp = log_softmax(learner_logits(node.all_tokens, WINDOW))
                start = len(node.all_tokens) - len(node.tokens)
                want = [logp[start + i - 1, t] for i, t in enumerate(node.tokens)]
                np.testing.assert_allclose(node.logprobs, want, atol=1e-4)
                checked += 1
    assert checked >= len(PROMPTS)
    if name == "forcing":
        assert any("fa" in output.answers[0].text for output in outputs)
    assert free(made)
    [alone] = search(PROMPTS[1:2], METHODS[name], policy(WINDOW), verifiers=verifiers, numbers=[1])
    assert [c.text for c in alone.answers] == [c.text for c in outputs[1].answers]
