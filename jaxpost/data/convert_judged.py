"""Public files of judged answers, turned into the formats of `judged`. Each converter says what its labels mean.

    hh              chosen, rejected: whole transcripts "\\n\\nHuman: ...\\n\\nAssistant: ..." (HH, 2204.05862)
    alpaca_eval     instruction, baseline, candidates [{output, preference 1 (baseline) to 2 (candidate)}]
    compared        input, output_1, output_2, label 1 or 2 (LLMBar's files)
    pandalm         instruction, input, response1, response2, annotator1 ... (0: a tie)
    stack_exchange  question, response_j (better), response_k
    qa_feedback     question, passages, "prediction 1" ..., preference: of each two predictions (12 13 14 23 ...) the
                    better one, 1 the first, 2 the second, 0 a tie (fine-grained RLHF, 2306.01693)
    judge_prompts   an instruction and a response inside a rubric prompt (Prometheus): gpt4_score, or both sides
    solutions       question and models' solutions, each {solution, is_correct} (GSM8K's example_model_solutions)
    best_of_n       question, response [n], score [n] of true and false
    truthful        prompt "Q: ... A: ... True:", completion " yes" or " no" (TruthfulQA's judge)
    mathdial        question, ground_truth, student_incorrect_solution
    verify_cot      question, answer, flag 1 where the reasoning is valid (2306.03872)
    oasst           trees of messages whose sibling replies have ranks

Trees, solutions and comparisons with one baseline are rankings; where pairs are wanted, only comparisons that somebody
made become pairs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from jaxpost.data.judged import label
from jaxpost.text.messages import DataError

JudgedConverter = Callable[[Mapping[str, Any], Counter[str], str], list[dict[str, Any]]]
"""row, ignored, kind (what the rows are wanted for) -> rows."""


def keys(row: Mapping[str, Any], *needed: str) -> list[Any]:
    """The values of keys that a row must have. Raises: DataError naming what it lacks."""
    missing = [key for key in needed if key not in row]
    if missing:
        raise DataError(f"the row lacks {', '.join(missing)}; it has {', '.join(map(str, row))}")
    return [row[key] for key in needed]


def rest(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """What a converter leaves as it is, so that it is counted where nothing reads it."""
    return {key: value for key, value in row.items() if key not in used}


def from_hh(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """Transcripts as messages; the turns that both begin with are the prompt."""
    chosen, rejected = keys(row, "chosen", "rejected")
    return [
        {**rest(row), "chosen": transcript(chosen, "chosen"), "rejected": transcript(rejected, "rejected")},
    ]


def transcript(text: Any, key: str) -> list[dict[str, str]]:
    r"""The turns of a transcript.

    >>> transcript("\n\nHuman: Hi\n\nAssistant: Ho", "chosen")
    [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}]

    Raises: DataError where it does not begin with a speaker.
    """
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text) if isinstance(text, str) else []
    if len(parts) < 3 or parts[0].strip():
        raise DataError(f"{key} must be a transcript that begins with Human: or Assistant:, not {text!r:.80}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def from_alpaca_eval(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """A pair for each candidate and the baseline, |preference - 1.5| * 2 strong; or one ranking by preference."""
    instruction, baseline, candidates = keys(row, "instruction", "baseline", "candidates")
    left = rest(row, "instruction", "baseline", "candidates", "dataset")
    left |= {"prompt": instruction, "subset": row.get("dataset")}
    if kind not in ("pairs", "unpaired"):
        outputs = [baseline["output"], *(candidate["output"] for candidate in candidates)]
        first = {text: n for n, text in reversed(list(enumerate(outputs)))}
        kept = sorted(first.values())
        ignored["alpaca_eval: candidates with the same text as another"] += len(outputs) - len(kept)
        scores = [1.5, *(candidate["preference"] for candidate in candidates)]
        return [{**left, "completions": [outputs[n] for n in kept], "scores": [scores[n] for n in kept]}]
    out = []
    for candidate in candidates:
        better = candidate["preference"] - 1.5
        sides = [candidate["output"], baseline["output"]][:: 1 if better > 0 else -1]
        pair = {"chosen": sides[0], "rejected": sides[1], "strength": 2 * abs(better), "tie": better == 0}
        out.append({**left, **pair})
    return out


def from_compared(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """Two outputs and which of them is better (0: a tie)."""
    prompt, first, second, label = keys(row, "input", "output_1", "output_2", "label")
    return [_compared(rest(row, "input", "output_1", "output_2", "label"), prompt, first, second, label)]


def _compared(left: dict[str, Any], prompt: str, first: str, second: str, label: Any) -> dict[str, Any]:
    if label not in (0, 1, 2):
        raise DataError(f"label must be 1 or 2, the better output, or 0, not {label!r:.80}")
    chosen, rejected = (second, first) if label == 2 else (first, second)
    return {**left, "prompt": prompt, "chosen": chosen, "rejected": rejected, "tie": label == 0}


def from_pandalm(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """The response that more annotators prefer, by the share of all votes that it is ahead."""
    instruction, first, second = keys(row, "instruction", "response1", "response2")
    names = [key for key in row if key.startswith("annotator")]
    votes = Counter(row[name] for name in names)
    if set(votes) - {0, 1, 2} or not votes:
        raise DataError(f"annotators must say 0, 1 or 2; they say {', '.join(repr(row[name]) for name in names)}")
    ahead = votes[1] - votes[2]
    prompt = instruction + ("\n\n" + row["input"] if row.get("input") else "")
    left = rest(row, "instruction", "input", "response1", "response2", *names)
    out = _compared(left, prompt, first, second, 0 if ahead == 0 else 1 if ahead > 0 else 2)
    return [out | {"strength": abs(ahead) / len(names)}]


def from_stack_exchange(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """response_j is the better answer."""
    question, better, worse = keys(row, "question", "response_j", "response_k")
    left = rest(row, "question", "response_j", "response_k")
    return [{**left, "prompt": question, "chosen": better, "rejected": worse}]


def from_qa_feedback(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """A pair for each two predictions that were compared; or a ranking by comparisons won (half of one for a tie)."""
    question, passages, preference = keys(row, "question", "passages", "preference")
    names = sorted(key for key in row if key.startswith("prediction "))
    pairs = list(combinations(range(len(names)), 2))
    if len(preference) != len(pairs):
        raise DataError(f"preference must have {len(pairs)} entries, one for each two predictions", kind="length")
    prompt = "\n\n".join(f"{passage[0]}\n{' '.join(passage[1:])}" for passage in passages) + f"\n\n{question}"
    left = rest(row, "question", "passages", "preference", *names)
    texts = [row[name].strip() for name in names]
    if kind == "pairs":
        return [
            _compared(left, prompt, texts[a], texts[b], label) for (a, b), label in zip(pairs, preference, strict=True)
        ]
    won = [0.0] * len(names)
    for (a, b), better in zip(pairs, preference, strict=True):
        if better not in (0, 1, 2):
            raise DataError(f"preference must hold 1 or 2, the better prediction, or 0, not {better!r:.80}")
        won[a] += {1: 1.0, 0: 0.5}.get(better, 0.0)
        won[b] += {2: 1.0, 0: 0.5}.get(better, 0.0)
    return [{**left, "prompt": prompt, "completions": texts, "scores": won}]


_JUDGE = re.compile(
    r"###The instruction to evaluate:\n(.*?)\n+###Response to evaluate:\n(.*?)\n+###(?:Reference Answer|Score Rubrics)",
    re.DOTALL,
)


def from_judge_prompts(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """The instruction and the response out of a judge's prompt, with the mean of its scores, or as a pair."""
    if "gpt4_score" in row:
        instruction, scores = keys(row, "instruction", "gpt4_score")
        prompt, response = _evaluated(instruction, "instruction")
        given = scores if isinstance(scores, Sequence) else [scores]
        if not given or not all(isinstance(score, int | float) for score in given):
            raise DataError(f"gpt4_score must be numbers, not {scores!r:.80}", kind="score")
        left = rest(row, "instruction", "gpt4_score")
        return [{**left, "prompt": prompt, "completion": response, "score": sum(given) / len(given)}]
    chosen, rejected = keys(row, "chosen_instruction", "rejected_instruction")
    prompt, better = _evaluated(chosen, "chosen_instruction")
    other, worse = _evaluated(rejected, "rejected_instruction")
    if other != prompt:
        message = "chosen_instruction and rejected_instruction evaluate different instructions"
        raise DataError(message, kind="prompts_differ")
    left = rest(row, "chosen_instruction", "rejected_instruction", "source")
    return [{**left, "prompt": prompt, "chosen": better, "rejected": worse, "subset": row.get("source")}]


def _evaluated(text: Any, key: str) -> tuple[str, str]:
    found = _JUDGE.search(text) if isinstance(text, str) else None
    if found is None:
        raise DataError(f"{key} has no ###The instruction to evaluate: and ###Response to evaluate: parts")
    return found.group(1).strip(), found.group(2).strip()


def from_solutions(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """Right solutions above wrong ones; a solution that stands there twice counts once."""
    (question,) = keys(row, "question")
    names = [key for key, value in row.items() if _is_solution(value)]
    if not names:
        raise DataError("the row has no solutions {solution, is_correct}")
    judged = [(row[name]["solution"], label(row[name]["is_correct"], f"{name}.is_correct")) for name in names]
    return _by_correctness(rest(row, "question", *names), question, judged, ignored, kind)


def _is_solution(value: Any) -> bool:
    return isinstance(value, Mapping) and {"solution", "is_correct"} <= value.keys()


def from_best_of_n(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """Right responses above wrong ones; the system prompt, if there is one, comes first."""
    question, responses, scores = keys(row, "question", "response", "score")
    if len(responses) != len(scores):
        raise DataError(f"{len(responses)} responses have {len(scores)} scores", kind="length")
    prompt: Any = [{"role": "user", "content": question}]
    if row.get("system"):
        prompt.insert(0, {"role": "system", "content": row["system"]})
    judged = [
        (text, label(score, f"score[{n}]")) for n, (text, score) in enumerate(zip(responses, scores, strict=True))
    ]
    return _by_correctness(rest(row, "question", "response", "score", "system"), prompt, judged, ignored, kind)


def _by_correctness(
    left: dict[str, Any], prompt: Any, judged: Sequence[tuple[str, bool]], ignored: Counter[str], kind: str
) -> list[dict[str, Any]]:
    kept = dict(judged)
    ignored["solutions that stand there twice"] += len(judged) - len(kept)
    if kind == "unpaired":
        return [{**left, "prompt": prompt, "completion": text, "label": right} for text, right in kept.items()]
    return [{**left, "prompt": prompt, "completions": list(kept), "scores": [float(right) for right in kept.values()]}]


_STATEMENT = re.compile(r"Q: (.*?)\nA: (.*)\nTrue:", re.DOTALL)


def from_truthful(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """A question and an answer that is true or not."""
    prompt, verdict = keys(row, "prompt", "completion")
    found = _STATEMENT.fullmatch(prompt)
    if found is None or str(verdict).strip() not in ("yes", "no"):
        raise DataError('the row must be "Q: ...\\nA: ...\\nTrue:" and " yes" or " no"')
    label = str(verdict).strip() == "yes"
    return [{**rest(row), "prompt": found.group(1), "completion": found.group(2), "label": label}]


def from_mathdial(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """The right solution above the student's."""
    question, right, wrong = keys(row, "question", "ground_truth", "student_incorrect_solution")
    left = rest(row, "question", "ground_truth", "student_incorrect_solution")
    return [{**left, "prompt": question, "chosen": right.strip(), "rejected": wrong.strip()}]


def from_verify_cot(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """A chain of reasoning that is valid or flawed, whatever its answer."""
    question, answer, flag = keys(row, "question", "answer", "flag")
    left = rest(row, "question", "answer", "flag", "task")
    return [{**left, "prompt": question, "completion": answer, "label": flag, "subset": row.get("task")}]


def from_oasst_ranked(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """A ranking for each turn that two ranked replies answer or more; deleted and unranked replies are counted."""
    (root,) = keys(row, "prompt")
    if not isinstance(root, Mapping):
        raise DataError("an OpenAssistant tree needs prompt {text, role, replies}")
    found = list(_ranked(root, [], ignored))
    ignored["oasst: trees without ranked replies"] += not found
    return found


def _ranked(node: Mapping[str, Any], path: list[dict[str, Any]], ignored: Counter[str]) -> Iterator[dict[str, Any]]:
    path = [*path, {"role": node.get("role"), "content": node.get("text")}]
    replies = [reply for reply in node.get("replies") or () if isinstance(reply, Mapping)]
    kept = [reply for reply in replies if not reply.get("deleted")]
    ignored["oasst: deleted messages"] += len(replies) - len(kept)
    answers = [reply for reply in kept if reply.get("role") == "assistant"]
    ranked = [reply for reply in answers if reply.get("rank") is not None]
    if len(ranked) > 1:
        ignored["oasst: replies without a rank"] += len(answers) - len(ranked)
        completions = [[{"role": "assistant", "content": reply.get("text")}] for reply in ranked]
        yield {"prompt": path, "completions": completions, "ranks": [reply["rank"] for reply in ranked]}
    for reply in kept:
        yield from _ranked(reply, path, ignored)


ASPECTS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def from_helpsteer(row: Mapping[str, Any], ignored: Counter[str], kind: str) -> list[dict[str, Any]]:
    """A response with its five grades from 0 to 4 (HelpSteer, 2311.09528; HelpSteer2, 2406.08673)."""
    prompt, response = keys(row, "prompt", "response")
    score = {name: row[name] for name in ASPECTS if name in row}
    return [{**rest(row, "prompt", "response", *ASPECTS), "prompt": prompt, "completion": response, "score": score}]


JUDGED_CONVERTERS: dict[str, JudgedConverter] = {
    "hh": from_hh,
    "alpaca_eval": from_alpaca_eval,
    "compared": from_compared,
    "pandalm": from_pandalm,
    "stack_exchange": from_stack_exchange,
    "qa_feedback": from_qa_feedback,
    "judge_prompts": from_judge_prompts,
    "solutions": from_solutions,
    "best_of_n": from_best_of_n,
    "truthful": from_truthful,
    "mathdial": from_mathdial,
    "verify_cot": from_verify_cot,
    "oasst": from_oasst_ranked,
    "helpsteer": from_helpsteer,
}
_SHAPES: tuple[tuple[str, set[str]], ...] = (
    ("alpaca_eval", {"instruction", "baseline", "candidates"}),
    ("compared", {"input", "output_1", "output_2", "label"}),
    ("pandalm", {"instruction", "response1", "response2"}),
    ("stack_exchange", {"question", "response_j", "response_k"}),
    ("qa_feedback", {"question", "passages", "preference", "prediction 1"}),
    ("judge_prompts", {"instruction", "gpt4_score"}),
    ("judge_prompts", {"chosen_instruction", "rejected_instruction"}),
    ("best_of_n", {"question", "response", "score"}),
    ("mathdial", {"question", "ground_truth", "student_incorrect_solution"}),
    ("verify_cot", {"question", "answer", "flag"}),
    ("helpsteer", {"prompt", "response", "helpfulness", "correctness"}),
)


def detect_judged(row: Mapping[str, Any]) -> str | None:
    """The converter of this module that a row needs, by its keys.

    >>> detect_judged({"question": "2+2?", "response_j": "4", "response_k": "5"})
    'stack_exchange'
    """
    for name, shape in _SHAPES:
        if shape <= row.keys():
            return name
    if isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]:
        return "oasst"
    if "prompt" not in row and isinstance(row.get("chosen"), str) and re.match(r"\s*Human:", row["chosen"]):
        return "hh"
    if "question" in row and any(_is_solution(value) for value in row.values()):
        return "solutions"
    prompt = row.get("prompt")
    if isinstance(prompt, str) and _STATEMENT.fullmatch(prompt) and row.get("completion") in (" yes", " no"):
        return "truthful"
    return None
