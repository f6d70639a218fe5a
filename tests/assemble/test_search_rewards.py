"""Reward models as verifiers of a search say what they say of whole texts, in their own layout."""

import jax
import numpy as np
import pytest

from jaxpost import sharding
from jaxpost.assemble.model import load_model
from jaxpost.assemble.readout import Readout
from jaxpost.assemble.reward_scores import Reduce, RewardModel, read_head
from jaxpost.assemble.search_rewards import reward_verifier
from jaxpost.config import MeshSection, ModelSection
from jaxpost.generate.scoring import Scorer
from jaxpost.models import heads
from jaxpost.search.contract import Case
from jaxpost.search.tree import Ledger, Node, Problem


@pytest.fixture(scope="module")
def loaded(tiny_model):
    pretrained = load_model(ModelSection(path=str(tiny_model)), sharding.make_mesh(MeshSection(), jax.devices()[:1]),
                            trunk=True)  # fmt: skip
    weights = pretrained.load()
    kernel = heads.init_head(jax.random.key(1), heads.head_table(pretrained.config.width, 4, bias=True, std=1.0))
    scorer = Scorer(pretrained.model, read_head, mesh=pretrained.mesh)

    def model(**readout):
        return RewardModel(pretrained, {"policy": weights, "head": kernel}, Readout(**readout), scorer, "toy")

    return model


@pytest.mark.parametrize("mask", ["assistant", "completion"])
def test_a_process_model_of_two_members_reads_new_steps_only(loaded, mask):
    model = loaded(members=2, classes=2, probability=True, steps=True, mask=mask, step_separator="\n")
    judge = reward_verifier(model, how="min", cache_tokens=1024, page_size=16)
    problem = Problem(0, "add 1 and 2", Node(0, None, (1,), ""), Ledger(), str.strip)
    node, read, whole = problem.root, 0, 0
    for step in ("one and two\n", "is three\n", "so good"):
        node = problem.child(node, (1,), step)
        price = judge.price(Case(problem, node), 0) + judge.opening(problem)
        [verdict] = judge([Case(problem, node)])
        [scores] = model([problem.prompt], [node.answer])
        np.testing.assert_allclose(verdict.steps, Reduce().by_step(scores)[0], atol=1e-4)
        np.testing.assert_allclose(verdict.score, Reduce(steps="min")(scores)[0], atol=1e-4)
        assert verdict.tokens == price
        read += verdict.tokens
        whole += len(model.encode(problem.prompt, node.answer).tokens)
    assert read < 0.7 * whole
    assert judge.shelf.traffic.again == 0
    assert len(node.path) == 3
    judge.forget(list(problem.root.walk()))
    assert judge.shelf.pages == 0


def test_an_outcome_model_judges_whole_answers(loaded):
    model = loaded(members=1, objectives=("a", "b", "c", "d"))
    judge = reward_verifier(model)
    problem = Problem(0, "add 1 and 2", Node(0, None, (1,), ""), Ledger(), str.strip)
    nodes = [problem.child(problem.root, (1,), text) for text in ("three", "it is four")]
    good, other = judge([Case(problem, node) for node in nodes])
    want = [Reduce()(x)[0] for x in model([problem.prompt] * 2, ["three", "it is four"])]
    np.testing.assert_allclose([good.score, other.score], want, atol=1e-5)
    assert good.tokens == judge.price(Case(problem, nodes[0]), 0)
