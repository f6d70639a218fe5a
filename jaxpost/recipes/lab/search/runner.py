"""Accuracy against tokens on the lab's model: every method and the allocators, at several budgets, over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxpost.assemble.answer import keep_programs
from jaxpost.assemble.model import load_model
from jaxpost.assemble.supervised import chat_prompt, text_sampler
from jaxpost.config import ModelSection
from jaxpost.eval.search import Outcome
from jaxpost.recipes.lab.model import Lab, Recipe, make_lab, read_rows
from jaxpost.recipes.lab.search import results, scorers
from jaxpost.recipes.lab.search.cells import judged, run_cells
from jaxpost.recipes.lab.search.methods import MEASURING, Tried, table
from jaxpost.recipes.lab.search.samples import last_number, write_samples
from jaxpost.search.allocate import Option, spend
from jaxpost.search.contract import SearchOutput, Verifier
from jaxpost.search.curves import Fitted, Trial, fit
from jaxpost.search.difficulty import probe_only
from jaxpost.search.drive import search
from jaxpost.search.policy import EnginePolicy

ALLOCATED = "fitted allocation"
FIT_SEED = 1_000
"""Of the noise of the trials that the allocator is fitted on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compared, and on what."""

    budgets: tuple[int, ...] = (32, 64, 128, 256)
    """Most generated + verifier tokens of a problem."""
    seeds: int = 5
    items: int = 100
    """Held-out problems."""
    labelled: int = 1_500
    """Training problems whose answers train the reward models."""
    fitted: int = 60
    """Other training problems that the allocator is fitted on."""
    rows: int = 64
    together: int = 64
    """Problems that are searched side by side."""


@dataclass
class Bench:
    """The lab's model, its scorers and problems, loaded once."""

    lab: Lab
    plan: Plan
    folder: Path
    say: Callable[[str], None] = print
    _policies: dict[int, EnginePolicy] = field(default_factory=dict)

    @cached_property
    def _pretrained(self) -> Any:
        keep_programs()
        pretrained = load_model(ModelSection(path=str(self.lab.model)))
        return pretrained, pretrained.load(), text_sampler(pretrained, rows=self.plan.rows)

    def policy(self, seed: int) -> EnginePolicy:
        """The lab's model with the noise of a seed."""
        if seed not in self._policies:
            pretrained, params, sampler = self._pretrained
            render = lambda prompt: chat_prompt(pretrained.tokenizer, prompt, None)  # noqa: E731
            self._policies[seed] = EnginePolicy(sampler, params, render=render, seed=seed)
        return self._policies[seed]

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """Training problems; a problem that comes twice is kept once."""
        return list({row["prompt"]: row for row in read_rows(self.lab.prompts)}.values())

    @cached_property
    def files(self) -> dict[str, Path]:
        problems = self.training[: self.plan.labelled]
        place = self.folder / "labelled"
        return write_samples(place, problems, self.policy(FIT_SEED), together=self.plan.together, say=self.say)

    @cached_property
    def models(self) -> dict[str, Any]:
        """The outcome and the process reward model."""
        made = {
            kind: scorers.make_scorer(kind, self.lab.model, self.files, self.folder / "scorers", self.say)
            for kind in scorers.KINDS
        }
        return {kind: scorers.load(path) for kind, path in made.items()}

    @cached_property
    def verifiers(self) -> dict[str, Verifier]:
        return scorers.verifiers(self.models)

    @cached_property
    def report(self) -> tuple[str, dict[str, float]]:
        """What the scorers are worth on held-out labelled answers."""
        text, ratios = scorers.examine(self.models, self.files["outcomes_held"])
        (self.folder / "verifiers.md").write_text(text + "\n", encoding="utf-8")
        return text, ratios

    def tried(self, budget: int) -> dict[str, Tried]:
        return table(budget, snr=self.report[1]["prm"])

    def asked(self, tried: Tried) -> dict[str, Verifier]:
        """The verifier of a method, if it asks one."""
        return {} if tried.scorer == "none" else {"verifier": self.verifiers[tried.scorer]}

    def run(self, rows: Sequence[Mapping[str, Any]], tried: Tried, budget: int | None, seed: int) -> list[SearchOutput]:
        """One method on problems."""
        return search(
            [row["prompt"] for row in rows],
            tried.method,
            self.policy(seed),
            budget=budget,
            verifiers=self.asked(tried),
            canonical=last_number,
            together=self.plan.together,
        )

    def outcomes(self, rows: Sequence[Mapping[str, Any]], method: str, budget: int, seed: int) -> list[Outcome]:
        answers = [row["answer"] for row in rows]
        return judged(self.run(rows, self.tried(budget)[method], budget, seed), answers)

    @cached_property
    def fitted(self) -> Fitted:
        """The allocator, fitted on training problems that the scorers did not learn from."""
        path = self.folder / f"fitted-{'-'.join(map(str, self.plan.budgets))}.json"
        if path.is_file():
            return Fitted.load(path)
        rows = self.training[self.plan.labelled : self.plan.labelled + self.plan.fitted]
        self.say(f"fitting the allocator on {len(rows)} training problems")
        probed = self.run(rows, Tried(lambda problem: probe_only(problem, MEASURING)), None, FIT_SEED)
        levels = [float(output.tree.facts["difficulty"]) for output in probed]
        answers = [row["answer"] for row in rows]
        trials = [
            Trial(d, "", 0, 0, float(o.right)) for d, o in zip(levels, judged(probed, answers), strict=True)
        ]  # fmt: skip
        names = [name for name in self.tried(self.plan.budgets[0]) if name not in ("plain policy", "metacognition")]
        runs = run_cells(
            names, self.plan.budgets, [FIT_SEED + 1], lambda *cell: self.outcomes(rows, *cell), self.folder / "fit",
            identity=self.identity, say=self.say,
        )  # fmt: skip
        for each in runs:
            trials += [
                Trial(d, each.method, each.budget, o.tokens, float(o.right))
                for d, o in zip(levels, each.seeds[0], strict=True)
            ]
        found = fit(trials, bins=3, cost="mean")
        found.save(path)
        return found

    def allocated(self, rows: Sequence[Mapping[str, Any]], budget: int, seed: int) -> list[Outcome]:
        """The fitted allocation of budget x problems tokens."""
        options = {
            name: Option(lambda tokens, name=name: self.tried(tokens)[name].method, self.asked(tried))
            for name, tried in self.tried(budget).items()
        }
        found = spend(
            [row["prompt"] for row in rows], self.fitted, self.policy(seed), total=budget * len(rows), options=options,
            measuring=MEASURING, canonical=last_number, together=self.plan.together,
        )  # fmt: skip
        outcomes = judged(found.outputs, [row["answer"] for row in rows])
        report = found.report([o.right for o in outcomes])
        self.say(
            f"  allocation of {budget} a problem: predicted {report['predicted']:.1%}, realised "
            f"{report['realised']:.1%}, spent {report['tokens'] / len(rows):.0f} a problem"
        )
        return outcomes

    @property
    def identity(self) -> dict[str, Any]:
        """What decides outcomes, beside method, budget and seed."""
        kept = {k: v for k, v in asdict(self.plan).items() if k in ("items", "labelled", "fitted")}
        return {"lab": self.lab.recipe.fingerprint, **kept}


def search_lab(
    methods: Sequence[str],
    *,
    plan: Plan,
    folder: Path,
    recipe: Recipe | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Runs what is missing of methods x budgets x seeds, and writes table.md, points.json and curve.svg.

    Args:
      methods: names; none: all, and the fitted allocation.
      folder: of everything; what it holds is kept, so the same command goes on where it stopped.

    Returns:
      The table as Markdown, with the report on the verifiers.

    Raises:
      ValueError: no such method, or the folder is another comparison's.
    """
    folder = Path(folder)
    known = [*table(plan.budgets[0]), ALLOCATED]
    unknown = sorted(set(methods) - set(known))
    if unknown:
        raise ValueError(f"no method is named {', '.join(unknown)}; there are {', '.join(known)}")
    if plan.seeds < 1 or not plan.budgets or min(plan.budgets) < 1 or plan.items < 2:
        raise ValueError("at least one seed, one budget above 0 and two problems are needed")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(make_lab(recipe, say=say), plan, folder, say)
    rows = read_rows(bench.lab.held_out)[: plan.items]
    named = list(methods) or known

    def draw(method: str, budget: int, seed: int) -> list[Outcome]:
        if method == ALLOCATED:
            return bench.allocated(rows, budget, seed)
        return bench.outcomes(rows, method, budget, seed)

    seeds, identity = range(plan.seeds), bench.identity
    tried = [name for name in named if name != ALLOCATED]
    runs = run_cells(tried, plan.budgets, seeds, draw, folder, identity=identity, say=say)
    if ALLOCATED in named:
        fitted_on = {**identity, "budgets": list(plan.budgets)}
        runs += run_cells([ALLOCATED], plan.budgets, seeds, draw, folder, identity=fitted_on, say=say)
    return results.write(folder, runs, title=_title(bench), verifiers=bench.report[0])


def _title(bench: Bench) -> str:
    plan = bench.plan
    return (
        f"Lab {bench.lab.recipe.fingerprint}: {plan.items} held-out problems, {plan.seeds} seeds; budgets of generated "
        f"+ verifier tokens; reward models trained on answers to {plan.labelled} training problems, the allocation "
        f"fitted on {plan.fitted} others. Brackets are 95% intervals over problems, each the mean over seeds."
    )
