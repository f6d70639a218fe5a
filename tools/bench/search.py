"""Step beams of many prompts: SmolLM2, judged by a process model of its size, against transformers on torch.

Both draw 16 steps a round for each of 8 prompts, keep the 4 texts that the process model likes best, and go on from
them. The peer is what is commonly written: all 128 texts in one batch, but every round reads them from their start, the
policy and the process model alike. Steps have one length and the head is random, so both do the same work.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
from common import Task
from generation import prompts

PROMPTS, PROMPT, WIDTH, FACTOR, STEP, ROUNDS = 8, 96, 16, 4, 16, 2
TOKENS = PROMPTS * WIDTH * STEP * ROUNDS
PAGE = 32
NEVER = "\u2603\u2603"


def head(width: int) -> np.ndarray:
    return (np.random.default_rng(3).normal(size=(width, 1)) / np.sqrt(width)).astype(np.float32)


def run_torch(task: str, folder: str) -> dict[str, Any]:
    import torch
    import transformers

    load = partial(transformers.AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32)
    policy, judge = load().eval(), load().model.eval()
    kernel = torch.tensor(head(policy.config.hidden_size))
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}

    @torch.no_grad()
    def beam(starts: list[list[int]], rounds: int) -> None:
        texts = torch.tensor(starts).repeat_interleave(WIDTH, 0)
        for _ in range(rounds):
            texts = policy.generate(
                texts, attention_mask=torch.ones_like(texts), max_new_tokens=STEP, min_new_tokens=STEP, **settings
            )
            scores = (judge(texts, use_cache=False).last_hidden_state[:, -1] @ kernel).reshape(len(starts), WIDTH)
            best = scores.topk(WIDTH // FACTOR, dim=1).indices.repeat_interleave(FACTOR, 1)
            texts = texts.reshape(len(starts), WIDTH, -1)[torch.arange(len(starts))[:, None], best].flatten(0, 1)

    beam(prompts(1, PROMPT), 1)
    start = time.perf_counter()
    beam(prompts(PROMPTS, PROMPT), ROUNDS)
    return {"seconds": [time.perf_counter() - start]}


def beam(policy: Any, judge: Any, together: int = PROMPTS) -> float:
    """Seconds of one search of all prompts."""
    from jaxpost.search.drive import search
    from jaxpost.search.step_beam import step_beam

    method = partial(step_beam, width=WIDTH, factor=FACTOR, max_steps=ROUNDS, max_tokens=STEP, separator=NEVER)
    start = time.perf_counter()
    found = search(prompts(PROMPTS, PROMPT), method, policy, verifiers={"verifier": judge}, together=together)
    assert sum(out.problem.ledger.generated for out in found) == TOKENS, [out.error for out in found]
    return time.perf_counter() - start


def run_jaxpost(task: str, folder: str) -> dict[str, Any]:
    made = _Made(folder)
    policy, judge = made.policy(), made.process()
    first = beam(policy, judge)
    for shelf in (policy.shelf, judge.shelf):
        shelf.traffic.read = shelf.traffic.again = 0
    seconds = beam(policy, judge)
    return {"seconds": [seconds], "compile": first - seconds, "note": made.note(policy, judge)}


def run_alone(task: str, folder: str) -> dict[str, Any]:
    """One prompt after the other."""
    made = _Made(folder)
    both = made.policy(), made.process()
    beam(*both, together=1)
    return {"seconds": [beam(*both, together=1)]}


def run_again(task: str, folder: str) -> dict[str, Any]:
    """Neither model keeps a text: every round reads all of them from their start."""
    made = _Made(folder)
    policy, judge = made.reading_again()
    beam(policy, judge)
    seconds = beam(policy, judge)
    return {"seconds": [seconds], "note": f"reading every text again: {_size(policy.shelf)}"}


class _Made:
    """Policies and verifiers of one model."""

    def __init__(self, folder: str):
        import jax

        from jaxpost import assemble
        from jaxpost.assemble.model import load_model
        from jaxpost.config import ModelSection

        self.pretrained = assemble.load_model(ModelSection(path=folder))
        self.params = self.pretrained.load()
        self.trunk = load_model(ModelSection(path=folder), self.pretrained.mesh, trunk=True)
        self.head = jax.device_put({"kernel": head(self.pretrained.config.width)})

    def policy(self, kind: Any = None) -> Any:
        from jaxpost.assemble.supervised import text_sampler
        from jaxpost.generate.params import SamplingParams
        from jaxpost.search.policy import EnginePolicy

        sampler = text_sampler(self.pretrained, rows=PROMPTS * WIDTH, cache_tokens=24576, page_size=PAGE)
        return (kind or EnginePolicy)(sampler, self.params, render=tuple, sampling=SamplingParams(ignore_eos=True))

    def write(self, prompt: Any, answer: str) -> Any:
        from jaxpost.search.process import Written

        tokens = [*prompt, *self.pretrained.tokenizer.encode(answer)]
        return Written(tokens, [len(tokens) - 1], len(prompt))

    def process(self) -> Any:
        from jaxpost.generate.engine import Engine, Weights
        from jaxpost.models import heads
        from jaxpost.search.process import ProcessVerifier

        engine = Engine(self.trunk.model, cache_tokens=24576, page_size=PAGE, prefill_tokens=2048, mesh=self.trunk.mesh)
        return ProcessVerifier(
            engine, Weights(self.params, self.params), head=self.head, read=heads.score, write=self.write,
            scores=lambda outputs: outputs[:, 0], rows=PROMPTS * WIDTH,
        )  # fmt: skip

    def reading_again(self) -> tuple[Any, Any]:
        """The same search where neither model keeps a text."""
        from jaxpost.generate.scoring import Scorer
        from jaxpost.models import heads
        from jaxpost.search.learned import OutcomeVerifier
        from jaxpost.search.policy import EnginePolicy

        class Forgetful(EnginePolicy):
            def _hold(self, *_: Any) -> None:
                """Every text is read by the run that draws from it."""

            def _keep(self, key: Any, text: Any) -> None:
                self.shelf.engine.release([text])

        scorer = Scorer(self.trunk.model, lambda p, hidden: heads.score(p["head"], hidden), mesh=self.trunk.mesh)
        params = {"policy": self.params, "head": self.head}

        def score(texts: list[Any]) -> list[float]:
            return [float(x[-1, 0]) for x in scorer(params, [t.tokens for t in texts], [t.places for t in texts])]

        def write(prompt: Any, answer: str) -> tuple[Any, int]:
            text = self.write(prompt, answer)
            return text, len(text.tokens)

        return self.policy(Forgetful), OutcomeVerifier(write, score)

    def note(self, policy: Any, judge: Any) -> str:
        dense = PROMPTS * WIDTH * -(-(PROMPT + STEP * ROUNDS) // PAGE)
        held, read = policy.shelf, judge.shelf
        return (
            f"policy: {_size(held)}, {held.traffic.read} tokens read and {held.traffic.again} again; process model: "
            f"{_size(read)}, {read.traffic.read} read and {read.traffic.again} again; a cache of its own for each text "
            f"would hold {dense} pages ({dense * held.page_mib(np.float32):.0f} MiB)"
        )


def _size(shelf: Any) -> str:
    pages = shelf.most_pages
    return f"{pages} pages of {PAGE} tokens at most ({pages * shelf.page_mib(np.float32):.0f} MiB)"


TASKS = {
    "search": Task(
        f"step beam: {PROMPTS} x {PROMPT}, {WIDTH} x {STEP} a round, {ROUNDS} rounds", TOKENS, {"torch": 3.0},
        {"torch": run_torch, "jaxpost": run_jaxpost, "one prompt at a time": run_alone, "reading again": run_again},
    )
}  # fmt: skip
