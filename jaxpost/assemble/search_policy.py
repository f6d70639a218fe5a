"""Models of a search: the policy on the engine, and the verifiers that its configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from jaxpost.assemble.answer import keep_programs
from jaxpost.assemble.commands import bind_section
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.search_prompts import Question, make_read
from jaxpost.assemble.supervised import text_sampler
from jaxpost.assemble.verify import make_verifier
from jaxpost.config import ModelSection
from jaxpost.config_search import SearchConfig
from jaxpost.generate.params import SamplingParams
from jaxpost.search.contract import Drawn, Job, Policy, Verifier
from jaxpost.search.policy import EnginePolicy
from jaxpost.search.tree import Node
from jaxpost.types import Params


@dataclass(frozen=True)
class Loaded:
    """Who answers a search's requests."""

    policy: Policy
    verifiers: Mapping[str, Verifier]
    close: Callable[[], None] = lambda: None


@dataclass
class Engines:
    """Loads models, and keeps them from call to call: the methods of a curve share one policy."""

    _models: dict[ModelSection, tuple[Pretrained, Params]] = field(default_factory=dict)
    _samplers: dict[Any, Any] = field(default_factory=dict)

    def load(self, config: SearchConfig, questions: Sequence[Question]) -> Loaded:
        """The policy and the verifiers of a configuration.

        Raises:
          ValueError, FileNotFoundError: a model or a verifier that cannot be had; says why.
        """
        keep_programs()
        policy = self._policy(config)
        own = {question.number: dict(question.sampling) for question in questions if question.sampling}
        examples = {question.number: question.example for question in questions}
        verifier, close = make_verifier(config.verifier, policy, partial(self._judge, config), examples)
        searched = _OwnSampling(policy, own) if own else policy
        return Loaded(searched, {} if verifier is None else {"verifier": verifier}, close)

    def _judge(self, config: SearchConfig, path: str) -> EnginePolicy:
        """Another model as a policy: one that judges, asked in its own chat format."""
        model = replace(config.model, path=path, revision=None, tokenizer=None, chat_template=None)
        asked = replace(config.prompts, template="{prompt}", system_prompt=None, chat=True)
        return self._policy(replace(config, model=model, prompts=asked))

    def _policy(self, config: SearchConfig) -> EnginePolicy:
        if config.model not in self._models:
            self._models[config.model] = bind_section(config.model)
        pretrained, params = self._models[config.model]
        key = (config.model, config.engine)
        if key not in self._samplers:
            engine = config.engine
            settings = {"cache_tokens": engine.cache_tokens, "prefill_tokens": engine.prefill_tokens}
            self._samplers[key] = text_sampler(pretrained, rows=engine.rows, **settings)
        return EnginePolicy(
            self._samplers[key],
            params,
            render=make_read(config.prompts, pretrained.tokenizer),
            seed=config.run.seed,
            sampling=SamplingParams.from_mapping(asdict(config.sampling)),
        )


class _OwnSampling:
    """A policy whose draws follow the sampling parameters of a prompt's own row, before the method's."""

    def __init__(self, policy: Policy, own: Mapping[int, Mapping[str, Any]]):
        self._policy, self._own = policy, own

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | str]:
        return self._policy.draw([j._replace(sampling={**self._own.get(j.example, {}), **j.sampling}) for j in jobs])

    def read(self, prompts: Sequence[Any]) -> list[tuple[int, ...] | str]:
        return self._policy.read(prompts)

    def encode(self, text: str) -> tuple[int, ...]:
        return self._policy.encode(text)

    def rank(self, nodes: Sequence[Node], best: int) -> list[tuple[Sequence[int], Sequence[float]] | str]:
        return self._policy.rank(nodes, best)

    def piece(self, node: Node, token: int) -> tuple[str, bool]:
        return self._policy.piece(node, token)

    def likelihood(self, nodes: Sequence[Node], texts: Sequence[Sequence[int]]) -> list[Sequence[float] | str]:
        return self._policy.likelihood(nodes, texts)

    def forget(self, nodes: Sequence[Node]) -> None:
        self._policy.forget(nodes)
