"""The lab's model: written with random weights, trained on generated arithmetic, measured, and kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.assemble.model import load_model
from jaxpost.assemble.sft import train
from jaxpost.assemble.supervised import chat_prompt, text_sampler
from jaxpost.config import (
    AdamWSection,
    DataSection,
    ModelSection,
    RunSection,
    ScheduleSection,
    SFTConfig,
    SourceSection,
    TrainSection,
)
from jaxpost.eval.statistics import wilson
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import Sampler
from jaxpost.recipes.lab.folder import architecture, write_new_model
from jaxpost.recipes.lab.problems import TASKS, LabProblems, distinct
from jaxpost.rewards.answers import MathAnswer
from jaxpost.text.tokenizer import Tokenizer
from jaxpost.types import Params
from jaxpost.weights.resolve import cache_folder

REWARD = MathAnswer(sources=("number",), name="right")
"""The last number that a text states is the answer."""
LONGEST = 32
"""Tokens of an answer; the longest working has 28 characters and an end."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the lab's model and problems; another recipe has another folder."""

    seed: int = 0
    width: int = 256
    layers: int = 4
    heads: int = 4
    tasks: tuple[str, ...] = tuple(TASKS)
    direct: float = 0.5
    """Share of training answers without working."""
    rows: int = 18_000
    """Problems that supervised training sees, each once."""
    prompts: int = 6_000
    """Problems of the training split for reinforcement learning."""
    held_out: int = 300
    """Different problems that are measured."""
    seq_len: int = 128
    batch_size: int = 8
    lr: float = 1e-3

    @property
    def fingerprint(self) -> str:
        """Changes with the recipe and with what its generator makes."""
        sample = [
            LabProblems(split=split, tasks=self.tasks).example(i) for split in ("train", "test") for i in range(8)
        ]
        text = json.dumps([dataclasses.asdict(self), sample], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


class Answer(NamedTuple):
    """One problem's answer, as it was scored."""

    task: str
    prompt: str
    text: str
    right: bool
    tokens: int


class Share(NamedTuple):
    """k right of n, with a 95% Wilson interval."""

    right: int
    items: int

    def __str__(self) -> str:
        share = wilson(self.right, self.items)
        return f"{share.value:6.1%}  [{share.low:.1%}, {share.high:.1%}]"


@dataclass(frozen=True)
class Lab:
    """A lab that is made: the model's folder, the files of problems, and what was measured."""

    folder: Path
    recipe: Recipe

    @property
    def model(self) -> Path:
        """The trained model, as a Hugging Face folder."""
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        """Problems of the training split, without their working: prompt, answer, task, operands."""
        return self.folder / "prompts.jsonl"

    @property
    def held_out(self) -> Path:
        """Problems whose operands, in any order, are in no other file; the same keys."""
        return self.folder / "held_out.jsonl"

    @property
    def measured(self) -> dict[str, Any]:
        """Accuracy of the model by temperature and task, and the seconds that it took to make."""
        return json.loads((self.folder / "measured.json").read_text(encoding="utf-8"))

    @property
    def ready(self) -> bool:
        return (self.folder / "measured.json").is_file()


def find_lab(recipe: Recipe | None = None) -> Lab:
    """The lab of a recipe in the user's cache, made or not."""
    recipe = recipe or Recipe()
    return Lab(cache_folder() / "lab" / recipe.fingerprint, recipe)


def make_lab(recipe: Recipe | None = None, *, say: Callable[[str], None] = print) -> Lab:
    """The lab of a recipe, made once; interrupted, it goes on where it was.

    Raises:
      InterruptedError: a signal stopped its training.
    """
    lab = find_lab(recipe)
    if lab.ready:
        return lab
    began = time.perf_counter()
    say(f"making the lab in {lab.folder} (once)")
    write_problems(lab)
    if not lab.model.is_dir():
        new = lab.folder / "new"
        if not (new / "config.json").is_file():
            shape = architecture(
                width=lab.recipe.width, layers=lab.recipe.layers, heads=lab.recipe.heads, max_positions=256
            )
            write_new_model(new, shape, seed=lab.recipe.seed)
        result = train(training_config(lab, new), command=("jaxpost", "lab", "train"))
        if result.stopped:
            raise InterruptedError(f"stopped by {result.stopped} at step {result.step}; the same command goes on")
        shutil.move(lab.folder / "run" / "export", lab.model)
    answers = measure(lab.model, read_rows(lab.held_out), list(TEMPERATURES.values()))
    report = {
        name: {task: share._asdict() for task, share in shares(found).items()}
        for name, found in zip(TEMPERATURES, answers, strict=True)
    }
    seconds = round(time.perf_counter() - began, 1)
    _write(lab.folder / "measured.json", [json.dumps(report | {"seconds": seconds}, indent=2)])
    return lab


TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}


def write_problems(lab: Lab) -> None:
    """The files of problems: supervised rows, prompts, and held-out problems."""
    recipe = lab.recipe
    lab.folder.mkdir(parents=True, exist_ok=True)
    made = LabProblems(seed=recipe.seed, tasks=recipe.tasks, direct=recipe.direct)
    asked = dataclasses.replace(made, seed=recipe.seed + 1)
    unseen = dataclasses.replace(made, split="test")
    keys = ("prompt", "answer", "task", "operands")
    for path, rows, kept in (
        (lab.folder / "train.jsonl", (made.example(i) for i in range(recipe.rows)), ("prompt", "completion")),
        (lab.prompts, (asked.example(i) for i in range(recipe.prompts)), keys),
        (lab.held_out, distinct(unseen, recipe.held_out), keys),
    ):
        if not path.is_file():
            _write(path, (json.dumps({key: row[key] for key in kept}) for row in rows))


def _write(path: Path, lines: Iterable[str]) -> None:
    new = path.with_suffix(".new")
    new.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    new.replace(path)


def training_config(lab: Lab, model: Path) -> SFTConfig:
    """Supervised training of the new model on the lab's rows, once each."""
    recipe = lab.recipe
    return SFTConfig(
        model=ModelSection(path=str(model)),
        data=DataSection(
            train=(SourceSection(path=str(lab.folder / "train.jsonl")),), seq_len=recipe.seq_len, seed=recipe.seed
        ),
        optim=AdamWSection(
            lr=recipe.lr, b2=0.95, weight_decay=0.1, schedule=ScheduleSection(kind="cosine", warmup=0.05, final=0.05)
        ),
        train=TrainSection(batch_size=recipe.batch_size, log_every=10, save_every=300, keep_checkpoints=1),
        run=RunSection(dir=str(lab.folder / "run"), name="lab", seed=recipe.seed),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of problems."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(
    model: Path, rows: Sequence[dict[str, Any]], temperatures: Sequence[float] = (0.0,), *, seed: int = 0
) -> list[list[Answer]]:
    """A model's answers to problems at each temperature, one each, by the engine that every other answer comes from."""
    pretrained = load_model(ModelSection(path=str(model)))
    params, sample = pretrained.load(), text_sampler(pretrained, rows=min(128, len(rows)))
    return [ask(sample, pretrained.tokenizer, params, rows, temperature=t, seed=seed) for t in temperatures]


def ask(
    sample: Sampler, tokenizer: Tokenizer, params: Params, rows: Sequence[dict[str, Any]], *, temperature: float,
    seed: int = 0,
) -> list[Answer]:  # fmt: skip
    """One scored answer to each problem, at temperature 0 the most probable one token by token."""
    prompts = [chat_prompt(tokenizer, row["prompt"], None) for row in rows]
    found = sample(params, prompts, SamplingParams(max_tokens=LONGEST, temperature=temperature), seed=seed)
    scores = REWARD(rows, found)[REWARD.name]
    return [
        Answer(row["task"], row["prompt"], answer.text, bool(score), len(answer.tokens))
        for row, answer, score in zip(rows, found, scores, strict=True)
    ]


def shares(answers: Sequence[Answer]) -> dict[str, Share]:
    """How many were right, by task, and of "all"."""
    groups = {task: [a for a in answers if a.task == task] for task in dict.fromkeys(a.task for a in answers)}
    groups["all"] = list(answers)
    return {name: Share(sum(a.right for a in group), len(group)) for name, group in groups.items()}


def describe(lab: Lab) -> str:
    """Where the lab is and what its model can do."""
    report = lab.measured
    lines = [f"model     {lab.model}", f"made in   {report['seconds']:.0f} s", ""]
    lines.append(f"{'held-out problems':<18}" + "".join(f"{name:>8}  {'95% interval':<18}" for name in TEMPERATURES))
    for task in report["greedy"]:
        lines.append(f"{task:<18}" + "  ".join(f"{Share(**report[name][task])!s:<26}" for name in TEMPERATURES))
    return "\n".join(lines)
