"""Reward models as functions: a folder in any of the layouts, or a run's parameters -> scores of answers and steps."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxpost import sharding
from jaxpost.adapters import peft
from jaxpost.adapters.bind import bind
from jaxpost.assemble.model import Pretrained, load_model
from jaxpost.assemble.readout import KEY, Readout, stored_readout
from jaxpost.config import ModelSection
from jaxpost.data.answer_rows import AnswerSource
from jaxpost.data.answers import answer_options
from jaxpost.data.groups import Answer, AnswerOptions, Group, Kind
from jaxpost.data.judged import Judged, Stepwise, UnpairedPreference
from jaxpost.data.texts import Text, is_empty, parse_text, same_kind
from jaxpost.eval.reward import Labelled, Ranked, judge_graded, judge_labelled, judge_ranked
from jaxpost.generate.scoring import Scorer
from jaxpost.models import heads
from jaxpost.models.families import config_to_hf
from jaxpost.text.messages import DataError, Message
from jaxpost.text.tokenizer import Tokenizer
from jaxpost.types import Params
from jaxpost.weights import heads as stored_heads
from jaxpost.weights import huggingface


def read_head(params: Params, hidden: Array) -> Array:
    """Outputs of the head beside the policy."""
    return heads.score(params["head"], hidden)


class Encoded(NamedTuple):
    """An answer with its prompt in tokens, after which of them scores are read, and where the answer begins."""

    tokens: np.ndarray
    places: list[int]
    start: int


@dataclass(frozen=True)
class Reduce:
    """How the scores of one answer, [steps, members, objectives], become one number and its uncertainty.

    Objectives first (a weighted mean), then members: their mean, their least, or mean - penalty * deviation
    (2310.02743), then steps. The uncertainty is the members' deviation: of the step that decides, or its mean.

    Example:
      >>> both = np.array([[[0.5], [0.9]], [[0.2], [0.4]]])  # two steps, two members
      >>> [round(x, 2) for x in Reduce(members="min", steps="min")(both)]
      [0.2, 0.1]
    """

    members: Literal["mean", "min", "mean_std"] = "mean"
    penalty: float = 1.0
    steps: Literal["min", "last", "prod", "mean"] = "min"
    objectives: tuple[float, ...] = ()
    """Weights; (): equal, adding up to 1."""

    def by_step(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores [n] of every step, and the members' deviations [n].

        Raises:
          ValueError: other weights than objectives.
        """
        count = scores.shape[2]
        weights = np.array(self.objectives or (1.0 / count,) * count)
        if len(weights) != count:
            raise ValueError(f"{len(weights)} weights for a reward model of {count} objectives; give one for each")
        each = scores @ weights
        mean, spread = each.mean(axis=1), each.std(axis=1)
        value = {"mean": mean, "min": each.min(axis=1), "mean_std": mean - self.penalty * spread}[self.members]
        return value, spread

    def __call__(self, scores: np.ndarray) -> tuple[float, float]:
        value, spread = self.by_step(scores)
        if self.steps in ("min", "last"):
            at = int(np.argmin(value)) if self.steps == "min" else -1
            return float(value[at]), float(spread[at])
        whole = np.prod(value) if self.steps == "prod" else np.mean(value)
        return float(whole), float(spread.mean())


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model: encode texts, then score them.

    Scores are float64 arrays [n, members, objectives], n being 1, or of a process model the number of steps.
    """

    pretrained: Pretrained
    params: Params
    """{"policy": the tree below the head, "head"}"""
    readout: Readout
    scorer: Scorer
    path: str

    @property
    def tokenizer(self) -> Tokenizer:
        return self.pretrained.tokenizer

    @cached_property
    def _options(self) -> dict[Kind, AnswerOptions]:
        section = self.readout.section(self.pretrained.config.max_positions)
        kinds: tuple[Kind, ...] = ("unpaired", "steps")
        return {kind: answer_options(section, kind, share_prompts=False) for kind in kinds}

    def encode(self, prompt: Any, completion: Any, *, steps: Sequence[str] | None = None) -> Encoded:
        """Tokens of an answer, written as in training; a process model reads scores after every step.

        Args:
          prompt, completion: texts or messages.
          steps: the completion in steps; None: a process model splits its text at the separator.

        Raises:
          DataError: an empty side, a missing step separator, more tokens than the model's context.
        """
        prompt, completion = same_kind(_text(prompt, "prompt"), _text(completion, "completion"))
        if is_empty(prompt):
            raise DataError("the prompt is empty", kind="empty")
        example: Judged
        if not self.readout.steps:
            example = UnpairedPreference(prompt=prompt, completion=completion, label=True)
        else:
            found = tuple(steps) if steps is not None else self._split(completion)
            example = Stepwise(prompt=prompt, completions=found, labels=(1.0,) * len(found))
        options = self._options["steps" if self.readout.steps else "unpaired"]
        (text,) = options.split(example, self.tokenizer, Counter())
        if isinstance(text, str):
            raise DataError(text)
        group = options.encode([text], self.tokenizer)[0]
        if isinstance(group, DataError):
            raise group
        if isinstance(group, str):
            raise DataError(group)
        return _encoded(group, group.answers[0])

    def _split(self, completion: Text) -> tuple[str, ...]:
        text = completion if isinstance(completion, str) else completion[-1].content
        found = tuple(part for part in str(text).split(self.readout.step_separator) if part.strip())
        if not found:
            raise DataError("the answer is empty: it has no step to score", kind="empty")
        return found

    def scores(self, encoded: Sequence[Encoded]) -> list[np.ndarray]:
        """Scores of many answers at once."""
        found = self.scorer(self.params, [e.tokens for e in encoded], [e.places for e in encoded])
        return [self.readout.read(outputs) for outputs in found]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[np.ndarray]:
        """Scores of answers to prompts, each a text or messages."""
        return self.scores([self.encode(p, c) for p, c in zip(prompts, completions, strict=True)])


def _text(value: Any, key: str) -> Text:
    """A text, or messages that may be parsed already."""
    parsed = isinstance(value, tuple) and all(isinstance(turn, Message) for turn in value)
    return value if parsed else parse_text(value, key)


def _encoded(group: Group, answer: Answer) -> Encoded:
    marks = [len(answer.tokens) - 1] if answer.marks is None else np.flatnonzero(answer.marks)
    begin = len(group.prompt)
    return Encoded(np.concatenate([group.prompt, answer.tokens]), [begin + int(at) for at in marks], begin)


def load_reward_model(
    path: str, *, mesh: Mesh | None = None, section: ModelSection | None = None, tokens: int = 16_384, base: Any = None
) -> RewardModel:
    """A reward model from a folder, a hub id, or an adapter folder with a head.

    Args:
      path: `AutoModelForSequenceClassification` or `...ForTokenClassification` layout, ours or anybody's.
      section: dtypes and attention; its `path` is not read.
      tokens: most tokens of a batch.
      base: another `RewardModel` whose base weights are used again where an adapter names the same base.

    Raises:
      FileNotFoundError, ValueError: it is no reward model, or one that is not supported; says why.
    """
    section = ModelSection() if section is None else section
    adapter = Path(path).expanduser()
    is_adapter = (adapter / peft.CONFIG).is_file()
    named = huggingface.read_json(adapter / peft.CONFIG).get("base_model_name_or_path") if is_adapter else path
    if not named:
        raise ValueError(f"{adapter / peft.CONFIG} names no base model (base_model_name_or_path)")
    if isinstance(base, RewardModel) and base.pretrained.section.path == named:
        pretrained, weights, scorer = base.pretrained, _base_of(base), base.scorer
    else:
        pretrained = load_model(replace(section, path=named), mesh, trunk=True)
        if not is_adapter:
            stored_heads.read_head(pretrained.folder)  # says at once that it is no reward model
        weights = pretrained.load()
        scorer = Scorer(
            pretrained.model, read_head, mesh=pretrained.mesh, tokens=tokens, pad_id=pretrained.tokenizer.pad_id
        )
    if is_adapter:
        overlay, scales = peft.load(adapter, pretrained.config, trunk=True)
        found = peft.load_head(adapter)
        if found is None:
            raise ValueError(f"{adapter} is an adapter without a head (base_model.model.score.weight): no reward model")
        about = adapter / peft.ABOUT
        given = huggingface.read_json(about).get(KEY) if about.is_file() else None
        names, by_token = [f"LABEL_{i}" for i in range(found["kernel"].shape[1])], _by_token(adapter)
        readout = stored_readout(given, names, tokens=by_token, where=str(about))
        placed = jax.device_put((overlay, scales), sharding.replicated(pretrained.mesh))
        weights = bind(weights, *placed)
    else:
        stored = stored_heads.read_head(pretrained.folder)
        config = pretrained.folder / "config.json"
        given = (huggingface.read_json(config).get("task_specific_params") or {}).get(KEY)
        readout, found = stored_readout(given, stored.labels, tokens=stored.tokens, where=str(config)), stored.params
    head = jax.device_put(jax.tree.map(jnp.asarray, found), sharding.replicated(pretrained.mesh))
    return RewardModel(pretrained, {"policy": weights, "head": head}, readout, scorer, path)


def load_ensemble(paths: Sequence[str], *, tokens: int = 16_384, **how: Any) -> list[RewardModel]:
    """Several reward models; adapters of one base share its weights.

    Raises:
      ValueError: they do not score the same things.
    """
    loaded: list[RewardModel] = []
    for path in paths:
        same = next((m for m in loaded if (Path(m.path).expanduser() / peft.CONFIG).is_file()), None)
        loaded.append(load_reward_model(path, tokens=tokens, base=same, **how))
    first = loaded[0]
    for model in loaded[1:]:
        ours, theirs = ((m.readout.objectives, m.readout.steps, m.readout.probability) for m in (first, model))
        if ours != theirs:
            raise ValueError(f"{first.path} and {model.path} score different things, so they are no ensemble")
    return loaded


def _by_token(adapter: Path) -> bool:
    return huggingface.read_json(adapter / peft.CONFIG).get("task_type") == "TOKEN_CLS"


def _base_of(model: RewardModel) -> Params:
    """The base's weights below an adapter, by reference."""
    from jaxpost.ops.linear import LoRA, is_leaf

    strip = lambda x: x.base if isinstance(x, LoRA) else x  # noqa: E731
    return jax.tree.map(strip, model.params["policy"], is_leaf=is_leaf)


def save_reward_model(folder: Path, pretrained: Pretrained, policy: Params, head: Params, readout: Readout) -> Path:
    """Writes a folder that transformers' AutoModelFor(Sequence|Token)Classification loads, with equal scores.

    A sequence classifier finds an answer's end as the last token that is no padding. Where the tokenizer pads with a
    token that ends answers, the folder's tokenizer gets another padding token.
    """
    fields = stored_heads.head_config(config_to_hf(pretrained.config), readout.labels, tokens=readout.steps)
    fields |= {
        "tie_word_embeddings": huggingface.read_config(pretrained.folder).tie_embeddings,
        "task_specific_params": {KEY: readout.to_json()},
        "problem_type": "multi_label_classification"
        if readout.probability and readout.classes == 1
        else "single_label_classification"
        if readout.probability
        else "regression",
    }
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        fields |= huggingface.copy_tokenizer(pretrained.tokenizer_folder, source)
        fields["pad_token_id"] = _padding(pretrained.tokenizer, source)
        return huggingface.save(
            folder,
            pretrained.config,
            policy,
            tokenizer_from=source,
            overwrite=True,
            head=(head, stored_heads.head_sources(head), fields),
        )


def _padding(tokenizer: Tokenizer, folder: Path) -> int:
    """The padding token's id; written into the folder's tokenizer_config.json where it has to be another one."""
    hf = tokenizer.hf
    given = hf.pad_token_id
    if given is not None and given not in tokenizer.eos_ids:
        return given
    special = [i for i, token in hf.added_tokens_decoder.items() if token.special and i not in tokenizer.eos_ids]
    if not special:
        return tokenizer.pad_id
    path = folder / "tokenizer_config.json"
    config = huggingface.read_json(path) if path.is_file() else {}
    config["pad_token"] = hf.convert_ids_to_tokens(special[0])
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return special[0]


def score_groups(
    scorer: Scorer, params: Params, groups: Sequence[Group], readout: Readout
) -> list[tuple[Group, list[np.ndarray]]]:
    """Every answer's scores where it is marked, or after its last token: arrays [n, members, objectives]."""
    encoded = [_encoded(group, answer) for group in groups for answer in group.answers]
    outputs = scorer(params, [e.tokens for e in encoded], [e.places for e in encoded])
    found = iter([readout.read(x) for x in outputs])
    return [(group, [next(found) for _ in group.answers]) for group in groups]


def read_groups(
    source: AnswerSource, outputs: Sequence[np.ndarray], readout: Readout
) -> list[tuple[Group, list[np.ndarray]]]:
    """`score_groups` of what a head has said of the first batches of a source.

    Args:
      outputs: of each batch: of every token [B T K], or, of a model that ranks, of every segment's answer [B S K].
    """
    by_token = source.dataset.kind not in ("pairs", "rankings")
    found: dict[int, tuple[Group, list[np.ndarray]]] = {}
    for k, batch in enumerate(outputs):
        for place in source.places(k):
            group, scores = found.setdefault(place.group, (source.dataset.group(place.group), []))
            marks = group.answers[place.answer].marks
            last = place.end - place.start - 1
            at = place.start + (np.array([last]) if marks is None else np.flatnonzero(marks))
            scores.append(readout.read(batch[place.row, at if by_token else [place.column]]))
    return [found[index] for index in sorted(found)]


def judge(
    scored: Sequence[tuple[Group, list[np.ndarray]]],
    *,
    graded: bool = False,
    objectives: Sequence[str] = (),
    questions: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """An evaluation's numbers: by order, label or grade. An ensemble's mean is judged, and its spread told.

    Args:
      graded: labels are grades, not right or wrong.
      objectives: names, where there are several.
      questions: of each group; None: by their prompts.
    """
    spread = [float(np.std(each, axis=1).mean()) for _, scores in scored for each in scores]
    out = {"uncertainty": float(np.mean(spread))} if scored and scored[0][1][0].shape[1] > 1 else {}
    ranked = [(group, x) for group, x in scored if len(group.answers) > 1 and group.answers[0].labels is None]
    if ranked:
        ordered = any(len({answer.rank for answer in group.answers}) > 1 for group, _ in ranked)
        return out | (judge_ranked([_ranked(group, x) for group, x in ranked]) if ordered else {})
    each = [(group, a, x) for group, scores in scored for a, x in zip(group.answers, scores, strict=True)]
    if len(objectives) > 1:
        for m, name in enumerate(objectives):
            found = judge_graded([_labelled(g, a, x[..., m], m) for g, a, x in each])
            out |= {f"objective/{name}/{key}": value for key, value in found.items()}
        return out
    asked = [g.prompt.tobytes() or None for g, _ in scored] if questions is None else list(questions)
    of = [question for question, (group, _) in zip(asked, scored, strict=True) for _ in group.answers]
    labelled = [
        _labelled(g, a, x[..., 0], 0)._replace(question=question) for (g, a, x), question in zip(each, of, strict=True)
    ]
    return out | (judge_graded(labelled) if graded else judge_labelled(labelled))


def _ranked(group: Group, scores: Sequence[np.ndarray]) -> Ranked:
    return Ranked(
        np.array([each[-1].mean() for each in scores]),
        np.array([answer.rank for answer in group.answers]),
        np.array([len(answer.tokens) for answer in group.answers]),
        group.strength,
        group.subset,
    )


def _labelled(group: Group, answer: Answer, scores: np.ndarray, objective: int) -> Labelled:
    """One objective of an answer, scores [n, members]."""
    if answer.labels is None or answer.marks is None:
        labels = np.array([float(answer.rank == 0)])
    else:
        labels = np.asarray(answer.labels, np.float64)[np.flatnonzero(answer.marks)]
        labels = labels[:, objective] if labels.ndim == 2 else labels
    return Labelled(scores.mean(axis=1), labels, len(answer.tokens), group.subset)
