"""Reinforcement learning of a table: a policy small enough that its optimum is known and a run takes a second.

The whole of `assemble.rl.make_job` and `run_online` is real; the model, its tokenizer, its sampler, the problems and
the reward are toys. The policy's next token depends on the last token and its position alone:
logits = table[position, token], so a table [P, V, V] is all that is learnt.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxpost import sharding
from jaxpost.assemble import opponents, rl
from jaxpost.assemble.judge import Judge
from jaxpost.assemble.model import Pretrained
from jaxpost.assemble.prompts import Problems
from jaxpost.config import AdamWSection, ModelSection, RunSection, ScheduleSection
from jaxpost.config_check_rl import check_rl
from jaxpost.config_rewards import FinishedSection, RewardSection
from jaxpost.config_rl import (
    LearnerSection,
    OnlineSection,
    RLConfig,
    RolloutSection,
    TruncatedCorrection,
)
from jaxpost.generate.sampler import Sampler
from jaxpost.generate.samples import Completion
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.rewards.runner import Scored
from jaxpost.rl.episodes import Problem
from jaxpost.text.tokenizer import Tokenizer
from jaxpost.train.online import OnlineJob, run_online
from jaxpost.types import Inputs, Model, Outputs, ParamSpec

LETTERS = ".abc?"
"""Tokens 0 to 4; the first ends an answer, the last begins the prompt."""
END, VOCAB, PLACES = 0, len(LETTERS), 6
PROMPT = (4,)


def table_model() -> Model:
    """Hidden states name (position, token), so a product with the table gives the logits."""

    def forward(params: Any, inputs: Inputs, cache: Any = None) -> Outputs:
        place = jnp.minimum(inputs.positions, PLACES - 1) * VOCAB + inputs.tokens
        return Outputs(jax.nn.one_hot(place, PLACES * VOCAB, dtype=jnp.float32))

    def unembed(params: Any, hidden: jax.Array) -> jax.Array:
        return hidden @ params["table"]["kernel"]

    spec = ParamSpec(
        ("table", "kernel"), (PLACES * VOCAB, VOCAB), ("embed", None), lambda key, *shape: jnp.zeros(*shape)
    )
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, width=PLACES * VOCAB, mlp_width=1, heads=1, kv_heads=1, head_dim=2,
        stacks=(StackConfig(repeats=1, period=(BlockConfig(rope=RopeConfig()),)),), max_positions=PLACES,
    )  # fmt: skip
    return Model(config, (spec,), lambda key: {}, forward, unembed, lambda *_: None)


def first_table() -> np.ndarray:
    """Not uniform, so that nothing is right by symmetry."""
    return 0.3 * np.random.default_rng(5).normal(size=(PLACES * VOCAB, VOCAB)).astype(np.float32)


class ToyTokenizer(Tokenizer):
    """One letter, one token."""

    def __init__(self) -> None:
        self.pad_id, self.end_of_turn_id, self.fingerprint = END, END, "letters"

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        return "".join(LETTERS[i] for i in ids if i != END)


class ToyPretrained(Pretrained):
    """The table in the place of a model folder."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return ToyTokenizer()

    def load(self) -> Any:
        return jax.device_put({"table": {"kernel": first_table()}}, self.shardings)


def log_policy(table: np.ndarray, prompt: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """log pi of every next token after these [V], in float64."""
    place = min(len(prompt) - 1, PLACES - 1) * VOCAB + prompt[-1]
    logits = np.asarray(table, np.float64)[place] / temperature
    return logits - np.log(np.sum(np.exp(logits)))


def probability(table: np.ndarray, text: str, prompt: Sequence[int] = PROMPT) -> float:
    """Of an answer that is as long as it may be, or ends with "."."""
    tokens, out = list(prompt), 1.0
    for letter in text:
        out *= float(np.exp(log_policy(table, tokens)[LETTERS.index(letter)]))
        tokens.append(LETTERS.index(letter))
    return out


class ToySampler(Sampler):
    """Draws from the table; a sample's noise depends on (seed, draw, example, sample) alone."""

    def __init__(self) -> None:
        self.calls = 0
        self.before: Callable[[int], None] = lambda call: None
        self.stratified = False
        """Answers of one token at evenly spaced quantiles: samples without noise, for exact optima."""

    def __call__(self, params: Any, prompts: Any, sampling: Any = None, **options: Any) -> list[Completion]:
        self.calls += 1
        self.before(self.calls)
        table = np.asarray(params["table"]["kernel"], np.float64)
        found = []
        for prompt, example in zip(prompts, options["example_ids"], strict=True):
            for sample in range(sampling.n):
                rng = np.random.default_rng((options["seed"], options["draw"], example, sample))
                found.append(self._one(table, list(prompt), sampling, rng, sample))
        return found

    def _one(self, table: np.ndarray, prompt: list[int], sampling: Any, rng: Any, sample: int) -> Completion:
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < sampling.max_tokens and tokens[-1:] != [END]:
            logp = log_policy(table, prompt + tokens, sampling.temperature or 1.0)
            if self.stratified:
                tokens.append(int(np.searchsorted(np.cumsum(np.exp(logp)), (sample + 0.5) / sampling.n)))
            else:
                noisy = logp if sampling.temperature == 0 else logp + rng.gumbel(size=VOCAB)
                tokens.append(int(np.argmax(noisy)))
            logprobs.append(float(np.float32(logp[tokens[-1]])))
        finish = "stop" if tokens[-1] == END else "length"
        return Completion(tuple(tokens), tuple(logprobs), finish, ToyTokenizer().decode(tokens), sample=sample)

    def forget_weights(self) -> None:
        pass


Score = Callable[[Any, Any], Scored]


def scored_by(one: Callable[[Any, Any], float], name: str = "score", **parts: Callable[[Any, Any], float]) -> Score:
    """Rewards of one completion -> of many, in this process; the first column leads."""

    def score(examples: Any, completions: Any) -> Scored:
        pairs = list(zip(examples, completions, strict=True))
        columns = {name: one} | parts
        return Scored({key: np.asarray([of(*pair) for pair in pairs], np.float64) for key, of in columns.items()}, ())

    return score


class InProcess(Judge):
    """A score in the place of a run's judge, its workers and models."""

    by_step = None
    identity = {}  # noqa: RUF012

    def __init__(self, score: Score):
        self.score, self.close = score, getattr(score, "close", lambda: None)

    def __call__(self, examples: Any, completions: Any) -> Scored:
        return self.score(examples, completions)


def toy_config(folder: Path, **changes: Any) -> RLConfig:
    """Two-token answers, 4 prompts x 8 samples; sections of RLConfig by name."""
    base = RLConfig(
        model=ModelSection(path="table"),
        rollout=RolloutSection(prompts=4, samples=8, max_tokens=2),
        reward=RewardSection(parts=(FinishedSection(),)),
        learner=LearnerSection(microbatch_rows=4),
        optim=AdamWSection(
            lr=0.2, weight_decay=0.0, clip_norm=None, schedule=ScheduleSection(kind="constant", warmup=0.0)
        ),
        train=OnlineSection(steps=30, save_every=0),
        run=RunSection(dir=str(folder / "{name}"), name="toy", export=False),
    )
    return check_rl(replace(base, **changes))


@contextmanager
def toys(score: Score, devices: int = 1, prompts: Sequence[Sequence[int]] = (PROMPT,)) -> Iterator[ToySampler]:
    """In here `assemble.rl` finds toys: problem i asks prompts[i % n], and its example names it."""
    sampler, make_mesh = ToySampler(), sharding.make_mesh

    def at(index: int) -> Problem:
        prompt = tuple(prompts[index % len(prompts)])
        return Problem(index, prompt, "".join(LETTERS[t] for t in prompt), {"prompt": prompt, "index": index})

    problems = Problems(at, max(len(p) for p in prompts), "toy problems")
    found = {
        "load_model": lambda section, mesh: ToyPretrained(section, Path("."), table_model(), mesh),
        "model_identity": lambda pretrained: "table",
        "make_problems": lambda *args, **kwargs: problems,
        "make_judge": lambda *args, **kwargs: InProcess(score),
    }
    few = lambda section, devices_=None: make_mesh(section, jax.devices()[:devices])  # noqa: E731
    drawn_by = mock.patch.object(opponents, "text_sampler", return_value=sampler)
    with mock.patch.multiple(rl, **found), drawn_by, mock.patch.object(sharding, "make_mesh", few):
        yield sampler


def toy_job(config: RLConfig, score: Score, **how: Any) -> tuple[OnlineJob, ToySampler]:
    """A job, and the sampler that it draws with."""
    with toys(score, **how) as sampler:
        return rl.make_job(config, command=("jaxpost", "train", "toy.yaml")), sampler


def table_of(state: Any) -> np.ndarray:
    return np.asarray(state.params["policy"]["table"]["kernel"])


def train(config: RLConfig, score: Score, **how: Any) -> np.ndarray:
    """The table after a whole run."""
    return table_of(run_online(toy_job(config, score, **how)[0]).state)


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """A file's lines, without the clock's part."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "time"} for record in found]


def halves(example: Any, completion: Any) -> float:
    """1 for the answer ba, half of it for a beginning with b."""
    return 0.5 * (completion.text[:1] == "b") + 0.5 * (completion.text == "ba")


def long_config(folder: Path) -> RLConfig:
    """A run that is worth killing."""
    return toy_config(
        folder,
        rollout=RolloutSection(prompts=4, samples=8, max_tokens=2, overlap=1),
        correction=TruncatedCorrection(),
        train=OnlineSection(steps=60, save_every=3, log_every=2),
    )


def main(folder: str, seconds: str) -> int:
    """`long_config`, slowly."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", True)
    job, sampler = toy_job(long_config(Path(folder)), scored_by(halves))
    sampler.before = lambda call: time.sleep(float(seconds))
    return run_online(job).exit_code


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
