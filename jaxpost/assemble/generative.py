"""Generative rewards: a language model is asked about answers, by our own engine or at an OpenAI-compatible address."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxpost.assemble.answer import encode_prompt
from jaxpost.assemble.commands import load_bound
from jaxpost.assemble.supervised import text_sampler
from jaxpost.generate import external
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.scoring import Scorer
from jaxpost.rewards.contract import Completion, Example, Rewards
from jaxpost.rewards.runner import Problem
from jaxpost.rewards.scored import JudgeScore
from jaxpost.rewards.verdicts import in_both_orders, question, value_of
from jaxpost.types import Params

Ask = Callable[[Sequence[str], int], list[str | None]]
"""(what is asked, seed) -> what is answered; None where that failed."""
YesNo = Callable[[Sequence[str], Sequence[str]], list[float]]
"""(what was asked, reasoning that ends in front of the verdict) -> probability of yes against no."""
VERDICT = "Correct:"
ALONE = "an answer alone with its problem has no other to be compared with; draw at least 2 samples of each problem"
_Found = tuple[float | None, dict[str, float], float]
"""A score, its parts by criterion, and the share of verdicts that could not be read; NaN: none was asked for."""


@dataclass(frozen=True)
class Verdicts:
    """A judging model in the place of a `JudgeScore`: verdicts of many answers, and what could not be read."""

    spec: JudgeScore
    ask: Ask
    yes_no: YesNo | None = None

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> tuple[Rewards, list[Problem]]:
        """Columns NAME, NAME/unreadable (share of verdicts), of rubrics NAME/CRITERION; NaN where none can be read."""
        prompts, faults = self._prompts(examples)
        kept = [i for i in range(len(examples)) if i not in faults]
        texts = [completions[i].text for i in kept]
        if self.spec.mode == "pair":
            judged = self._pairs([examples[i] for i in kept], [prompts[i] for i in kept], texts)
        else:
            judged = self._each([self._question(prompts[i], [t]) for i, t in zip(kept, texts, strict=True)])
        found: list[_Found] = [(None, {}, math.nan)] * len(examples)
        for i, result in zip(kept, judged, strict=True):
            found[i] = result
            if result[0] is None:
                faults[i] = ALONE if math.isnan(result[2]) else "no verdict could be read"
        columns = {self.spec.name: np.array([np.nan if value is None else value for value, _, _ in found])}
        for name in self.spec.criteria:
            columns[f"{self.spec.name}/{name}"] = np.array([parts.get(name, np.nan) for _, parts, _ in found])
        columns[f"{self.spec.name}/unreadable"] = np.array([share for _, _, share in found])
        return columns, [Problem(self.spec.name, i, reason) for i, reason in sorted(faults.items())]

    def _prompts(self, examples: Sequence[Example]) -> tuple[list[str], dict[int, str]]:
        """What stands for the problem in each question, and why there is none."""
        out, faults = [], {}
        for i, example in enumerate(examples):
            prompt = example.get("prompt", "")
            if not isinstance(prompt, str):
                prompt = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
            try:
                out.append(self.spec.template.format(**{**example, "prompt": prompt}))
            except (KeyError, IndexError) as error:
                faults[i] = f"the template {self.spec.template!r} names {error}, which the problem lacks"
                out.append("")
        return out, faults

    def _question(self, prompt: str, answers: Sequence[str]) -> str:
        spec = self.spec
        return question(spec.mode, prompt, answers, low=spec.low, high=spec.high, criteria=spec.criteria)

    def _each(self, asked: Sequence[str]) -> list[_Found]:
        """Of every question what its verdicts say on the mean."""
        out: list[_Found] = []
        for verdicts in self._verdicts(asked):
            part = [pair for pair in verdicts if pair[0] is not None]
            values = [value for value, _ in part if value is not None]
            names = part[0][1].keys() if part else ()
            by_name = {name: float(np.mean([parts[name] for _, parts in part])) for name in names}
            mean = sum(values) / len(values) if values else None
            out.append((mean, by_name, 1.0 - len(part) / self.spec.verdicts))
        return out

    def _verdicts(self, asked: Sequence[str]) -> list[list[tuple[float | None, dict[str, float]]]]:
        """Of every question `verdicts` answers as (value, by criterion); None: unreadable."""
        if not asked:
            return []
        every = [q for q in asked for _ in range(self.spec.verdicts)]
        # Noise by what is asked: other questions have other noise, and a resumed run has the same.
        said = self.ask(every, int(hashlib.sha256("\0".join(every).encode()).hexdigest()[:7], 16))
        read = [self._read(text) for text in said]
        if self.yes_no is not None:
            kept = [i for i, (value, _) in enumerate(read) if value is not None]
            heads = [_reasoning(str(said[i])) for i in kept]
            for i, p in zip(kept, self.yes_no([every[i] for i in kept], heads) if kept else [], strict=True):
                read[i] = p, {}
        return [read[start : start + self.spec.verdicts] for start in range(0, len(read), self.spec.verdicts)]

    def _read(self, text: str | None) -> tuple[float | None, dict[str, float]]:
        spec = self.spec
        if text is None:
            return None, {}
        return value_of(spec.mode, text, low=spec.low, high=spec.high, criteria=spec.criteria)

    def _pairs(self, examples: Sequence[Example], prompts: Sequence[str], texts: Sequence[str]) -> list[_Found]:
        """Every answer against the next one to the same problem, in both orders; its score is its mean result.

        Of several verdicts each is held against one in the other order: their means would hardly ever agree.
        """
        groups: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(repr(sorted(example.items(), key=lambda item: str(item[0]))), []).append(i)
        pairs = [
            (each[k], each[(k + 1) % len(each)])
            for each in groups.values()
            for k in range(len(each) if len(each) > 2 else len(each) - 1)
        ]
        asked = [self._question(prompts[i], [texts[a], texts[b]]) for i, j in pairs for a, b in ((i, j), (j, i))]
        verdicts = self._verdicts(asked)
        results: list[list[float | None]] = [[] for _ in texts]
        for n, (i, j) in enumerate(pairs):
            for (first, _), (swapped, _) in zip(verdicts[2 * n], verdicts[2 * n + 1], strict=True):
                result = in_both_orders(first, swapped)
                results[i].append(result)
                results[j].append(None if result is None else 1.0 - result)
        out: list[_Found] = []
        for found in results:
            known = [x for x in found if x is not None]
            share = 1.0 - len(known) / len(found) if found else math.nan
            out.append((float(np.mean(known)) if known else None, {}, share))
        return out


def _reasoning(text: str) -> str:
    """What stands in front of the verdict, in whatever case that is written."""
    return text[: [*re.finditer(re.escape(VERDICT), text, re.IGNORECASE)][-1].start()]


def make_verdicts(spec: JudgeScore) -> Verdicts:
    """A judging model, loaded or connected to.

    Raises:
      FileNotFoundError, ValueError, ServerError: no such model, or no server at the address.
    """
    wish = SamplingParams(max_tokens=spec.max_tokens, temperature=spec.temperature)
    if spec.server:
        sampler = external.connect(spec.server, spec.path or None, tokenizer=None, concurrency=spec.rows)

        def ask(asked: Sequence[str], seed: int) -> list[str | None]:
            prompts = [[{"role": "user", "content": text}] for text in asked]
            out: list[str | None] = [None] * len(asked)
            for number, answer in sampler.stream(prompts, wish, seed=seed):
                done = answer.completion
                out[number] = None if done.finish == "error" else done.text
            return out

        return Verdicts(spec, ask)
    pretrained, params = load_bound(spec.path)
    tokenizer = pretrained.tokenizer
    sample = text_sampler(pretrained, rows=spec.rows)
    encode = lambda text: encode_prompt(tokenizer, text, system=None, chat=True)  # noqa: E731

    def ask_engine(asked: Sequence[str], seed: int) -> list[str | None]:
        found = sample.stream(params, [encode(text) for text in asked], wish, seed=seed, errors="return")
        out: list[str | None] = [None] * len(asked)
        for number, done in found:
            out[number] = None if done.finish == "error" else done.text
        sample.forget()
        return out

    words = [tokenizer.encode(f" {word}") for word in ("yes", "no")]
    shared = next(
        n for n, (a, b) in enumerate(zip(*words, strict=False)) if a != b
    )  # a space may be a token of its own
    yes, no = (word[shared] for word in words)

    def unembed(tree: Params, hidden: Array) -> Array:
        return pretrained.model.unembed(tree["policy"], hidden)[..., jnp.array([yes, no])]

    scorer = Scorer(pretrained.model, unembed, mesh=pretrained.mesh, pad_id=tokenizer.pad_id)

    def yes_no(asked: Sequence[str], reasoning: Sequence[str]) -> list[float]:
        lead = words[0][:shared]
        rows = [[*encode(q), *tokenizer.encode(r + VERDICT), *lead] for q, r in zip(asked, reasoning, strict=True)]
        logits = scorer({"policy": params}, rows, [[len(row) - 1] for row in rows])
        return [float(1.0 / (1.0 + np.exp(np.clip(x[0, 1] - x[0, 0], -500.0, 500.0)))) for x in logits]

    return Verdicts(spec, ask_engine, yes_no if spec.mode == "verifier" and spec.probability else None)
