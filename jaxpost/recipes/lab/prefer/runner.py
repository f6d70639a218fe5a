"""Runs the cells: each method from the same model on the same pairs of a seed, for the same number of updates."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpost.assemble.answer import keep_programs
from jaxpost.assemble.model import Pretrained, load_model
from jaxpost.assemble.preference import train
from jaxpost.assemble.supervised import chat_prompt, text_sampler
from jaxpost.config import AnswerDataSection, ModelSection, SourceSection
from jaxpost.config_preference import PreferenceConfig
from jaxpost.data.answer_rows import AnswerSource, make_answer_source
from jaxpost.data.answers import prepare_answers
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import Sampler
from jaxpost.generate.samples import Completion
from jaxpost.losses.preference.objective import Needs, measure
from jaxpost.losses.preference.pairs import sides
from jaxpost.recipes.lab.comparison import run_cells, write_table
from jaxpost.recipes.lab.model import LONGEST, Lab, Recipe, ask, make_lab, read_rows, shares
from jaxpost.recipes.lab.prefer.methods import METHODS, SEQ_LEN, Method, Plan, lab_config, load_methods, settings
from jaxpost.recipes.lab.prefer.pairs import write_pairs
from jaxpost.recipes.lab.prefer.results import Cell, summarise, table, tried, worth
from jaxpost.types import Params
from jaxpost.weights.resolve import cache_folder

UNTRAINED = "untrained"
CHOICE_SEED = 1_000
"""Of the pairs that learning rates are chosen on; it is not reported."""
HELD_SEED = 1_001
"""Of the answers to unseen problems that make unseen pairs."""


def prefer(
    names: Sequence[str] = METHODS,
    *,
    seeds: int = 5,
    plan: Plan | None = None,
    folder: Path,
    recipe: Recipe | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Runs what is missing of methods x seeds on the lab's model, and writes table.md and table.json.

    Args:
      names: kinds of losses, mixtures of them or presets (`methods.load_method`); the others are compared with the
        first.
      seeds: 0 .. seeds - 1, each with its own problems, answers, pairs and order.
      folder: of pairs, runs and tables; what it holds is kept, so the same command goes on where it stopped.

    Returns:
      The table as Markdown.

    Raises:
      ConfigError: no such method, or a plan that cannot be. ValueError: the folder is another comparison's.
    """
    plan, methods, folder = plan or Plan(), load_methods(names), Path(folder)
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: at least one is needed")
    bench = Bench(make_lab(recipe, say=say), plan, folder, say)
    bench.claim()
    rates, chosen_on = choose_rates(bench, methods)
    identity = bench.identity | {"methods": {UNTRAINED: "", **settings(methods, plan, rates)}}

    def run(name: str, seed: int, place: Path) -> Cell:
        return bench.cell(name, methods.get(name), rates.get(name, 0.0), seed, place)

    cells = run_cells([UNTRAINED, *methods], range(seeds), run, folder / "cells", identity=identity, kind=Cell, say=say)
    first = next(iter(methods))
    rows = summarise(cells, first)
    text = table(rows, title=_title(bench, seeds), first=first)
    if chosen_on:
        about = (
            f"Mean of greedy and sampled accuracy on {bench.unasked_count} other training problems, by learning rate:"
        )
        text += "\n\n" + tried(chosen_on, rates, title=about)
    write_table(folder, rows, text, identity)
    return text


def choose_rates(bench: Bench, methods: Mapping[str, Method]) -> tuple[dict[str, float], list[Cell]]:
    """Each method's best rate on pairs of a seed, and on problems, that nothing else is measured on; the least of
    equal ones. One rate is all methods'."""
    if len(bench.plan.rates) == 1:
        return dict.fromkeys(methods, bench.plan.rates[0]), []
    rates = {f"{name}@{rate:g}": rate for name in methods for rate in sorted(bench.plan.rates)}
    of = {title: methods[title.rpartition("@")[0]] for title in rates}
    identity = bench.identity | {"methods": settings(of, bench.plan, rates)}

    def run(title: str, seed: int, place: Path) -> Cell:
        return bench.cell(title, of[title], rates[title], seed, place, chosen_on=True)

    cells = run_cells(
        list(rates), [CHOICE_SEED], run, bench.folder / "rates", identity=identity, kind=Cell, say=bench.say
    )
    best = {
        name: max((c for c in cells if c.method.rpartition("@")[0] == name), key=lambda c: (worth(c), -c.rate)).rate
        for name in methods
    }
    return best, cells


def _title(bench: Bench, seeds: int) -> str:
    plan = bench.plan
    rate = f"Adam at {plan.rates[0]:g}" if len(plan.rates) == 1 else "Adam, the rate chosen for each on another seed"
    return (
        f"Lab {bench.lab.recipe.fingerprint}: {seeds} seeds, each with {plan.pairs} pairs of the model's own answers, "
        f"{plan.updates} updates of {plan.batch} pairs, {rate}; accuracy on {bench.lab.recipe.held_out} unseen "
        f"problems and {len(bench.start)} unseen pairs; ± is half of a 95% t-interval over seeds."
    )


@dataclass
class Bench:
    """The lab's model, problems and pairs, loaded once."""

    lab: Lab
    plan: Plan
    folder: Path
    say: Callable[[str], None] = print

    @property
    def identity(self) -> dict[str, Any]:
        """What decides all cells, beside method and seed."""
        kept = {name: value for name, value in asdict(self.plan).items() if name != "rates"}
        return {"lab": self.lab.recipe.fingerprint, **kept}

    def claim(self) -> None:
        """Makes the folder this comparison's. Raises: ValueError where it is another's."""
        path = self.folder / "plan.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            names = sorted(k for k in kept.keys() | self.identity if kept.get(k) != self.identity.get(k))
            if names:
                raise ValueError(
                    f"{self.folder} is of another comparison ({', '.join(names)} differ); give another --out, or "
                    "delete it"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.identity, indent=2) + "\n", encoding="utf-8")

    @cached_property
    def _model(self) -> tuple[Pretrained, Params, Sampler]:
        keep_programs()
        pretrained = load_model(ModelSection(path=str(self.lab.model)))
        return pretrained, pretrained.load(), text_sampler(pretrained, rows=128)

    @cached_property
    def _problems(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Different training problems, and those of them that no pair is made of."""
        rows = list({row["prompt"]: row for row in read_rows(self.lab.prompts)}.values())
        return rows[: -self.unasked_count], rows[-self.unasked_count :]

    @property
    def unasked_count(self) -> int:
        """Training problems that learning rates are chosen on."""
        return self.lab.recipe.held_out

    def pairs(self, seed: int) -> Path:
        """The pairs of a seed: all methods train on this file."""
        return self._write(f"seed{seed}", self._problems[0], self.plan.pairs, self.plan.each, seed)

    def _write(self, name: str, problems: list[dict[str, Any]], count: int | None, most: int, seed: int) -> Path:
        path, answers = self.folder / "pairs" / f"{name}.jsonl", self.plan.answers
        if not path.is_file():
            self.say(f"drawing the answers of {name}")

        def draw(rows: Sequence[dict[str, Any]], numbers: Sequence[int]) -> list[Completion]:
            pretrained, params, sample = self._model
            prompts = [chat_prompt(pretrained.tokenizer, row["prompt"], None) for row in rows]
            wish = SamplingParams(n=answers, max_tokens=LONGEST, temperature=1.0)
            return sample(params, prompts, wish, seed=seed, example_ids=numbers)

        return write_pairs(path, problems, draw, count=count, most=most, answers=answers, seed=seed)

    @cached_property
    def _unseen(self) -> AnswerSource:
        """One pair of every unseen problem that has one, in order, a pair a row."""
        path = self._write("unseen", read_rows(self.lab.held_out), None, 1, HELD_SEED)
        section = AnswerDataSection(eval=(SourceSection(path=str(path)),), seq_len=SEQ_LEN, on_long_row="error")
        tokenizer = self._model[0].tokenizer
        data = prepare_answers(section, section.eval, tokenizer, kind="pairs", cache_dir=cache_folder() / "tokens")
        return make_answer_source(data, seq_len=SEQ_LEN, batch_size=32, packing=False, endless=False)

    @cached_property
    def _scan(self) -> Callable[..., Any]:
        read = partial(measure, self._model[0].model, needs=Needs(reference=False))
        return jax.jit(lambda params, batch: sides(read({"policy": params}, {}, batch, jax.random.key(0), {})))

    def log_probabilities(self, params: Params) -> np.ndarray:
        """log pi of the right and the wrong answer of every unseen pair, [pairs, 2]."""
        found = []
        with jax.set_mesh(self._model[0].mesh):
            for k in range(self._unseen.num_batches_per_epoch):
                pairs = self._scan(params, self._unseen.batch(k))
                both = np.stack([np.asarray(pairs.chosen.logprob), np.asarray(pairs.rejected.logprob)], axis=-1)
                found.append(both[np.asarray(pairs.weight) > 0])
        return np.concatenate(found)

    @cached_property
    def start(self) -> np.ndarray:
        """The same of the model before training."""
        return self.log_probabilities(self._model[1])

    def cell(
        self, name: str, method: Method | None, rate: float, seed: int, place: Path, *, chosen_on: bool = False
    ) -> Cell:
        """Trains, unless there is no method, and measures on unseen problems, or on those that rates are chosen on.

        Raises:
          KeyboardInterrupt: a signal stopped it; everything is saved.
        """
        began = time.perf_counter()
        pretrained, params, sample = self._model
        updates = 0
        if method is not None:
            where = {"model": self.lab.model, "pairs": self.pairs(seed), "folder": place / "run"}
            params, updates = _trained(lab_config(method, self.plan, name=name, rate=rate, seed=seed, **where))
        rows = self._problems[1] if chosen_on else read_rows(self.lab.held_out)
        answer = partial(ask, sample, pretrained.tokenizer, params, rows, seed=seed)
        greedy, sampled = answer(temperature=0.0), answer(temperature=1.0)
        gained = self.log_probabilities(params) - self.start
        by_task = {task: found.right / found.items for task, found in shares(greedy).items()}
        cell = Cell(
            name,
            seed,
            rate,
            updates,
            updates * self.plan.batch,
            greedy=by_task.pop("all"),
            sampled=sum(a.right for a in sampled) / len(sampled),
            order=float(np.mean(0.5 * (1 + np.sign(gained[:, 0] - gained[:, 1])))),
            chosen=float(gained[:, 0].mean()),
            rejected=float(gained[:, 1].mean()),
            tokens=sum(a.tokens for a in greedy) / len(greedy),
            seconds=round(time.perf_counter() - began, 1),
            tasks=by_task,
        )
        self.say(f"  {name}: greedy {cell.greedy:.1%}, sampled {cell.sampled:.1%}, pairs in order {cell.order:.1%}")
        shutil.rmtree(place / "run" / "checkpoints", ignore_errors=True)  # 40 MB that nothing reads again
        return cell


def _trained(config: PreferenceConfig) -> tuple[Params, int]:
    result = train(config, command=("jaxpost", "lab", "prefer", config.run.name))
    if result.stopped:
        raise KeyboardInterrupt(result.stopped)
    return result.state.params["policy"], result.step
