"""Inspection of reinforcement-learning presets, and faults of problems and rewards that are told before a run."""

import json
import re

import pytest

from jaxpost import assemble
from jaxpost.assemble.prompts import make_problems
from jaxpost.assemble.rl import make_job
from jaxpost.config import MeshSection, ModelSection, RunSection, SourceSection
from jaxpost.config_rewards import (
    ChoiceSection,
    FinishedSection,
    FunctionSection,
    MathSection,
    ReachesSection,
    RewardSection,
    TargetLengthSection,
)
from jaxpost.config_rl import (
    ArithmeticPrompts,
    EvalSection,
    FilePrompts,
    Game24Prompts,
    RLConfig,
    RolloutSection,
)
from jaxpost.text.tokenizer import load_tokenizer

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i, "note": "x" * 300} for i in range(5)]


@pytest.fixture
def make(tiny_model, tmp_path):
    def config(rows=ROWS, *, reward=RewardSection(parts=(MathSection(),)), columns=None, evals=(), **prompts):  # noqa: B008
        if isinstance(rows, list):
            data = tmp_path / "rows.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            rows = FilePrompts(sources=(SourceSection(path=str(data), columns=columns or {}),), **prompts)
        return RLConfig(
            model=ModelSection(path=str(tiny_model)),
            prompts=rows,
            rollout=RolloutSection(prompts=2, samples=2, max_tokens=8, rows=4),
            reward=reward,
            evals=evals,
            mesh=MeshSection(data=2, fsdp=4),
            run=RunSection(dir=str(tmp_path / "run")),
        )

    return config


def parts(*sections, **options):
    return RewardSection(parts=sections, **options)


def test_problems_are_shown_as_the_model_reads_them(make):
    text = assemble.inspect(make(), rows=2)
    assert "rows.jsonl:1 (33 tokens)\n<|im_start|>user\nWhat is 0 + 0?<|im_end|>\n<|im_start|>assistant\n" in text
    assert "  answer: 2   <- read by math\n" in text
    assert "  note: " + "x" * 200 + " ... (300 characters)\n" in text
    assert "rows.jsonl:3" not in text
    assert "5 problems\ntokens of a prompt: shortest 33, median 33, longest 33; answers of up to 8" in text
    assert "the model's context is 512" in text
    assert "math (reads answer): mean 1.000, 5 of 5 full" in text
    assert "WARNING" not in text


def test_a_wrong_key_shows_as_a_warning(make):
    text = assemble.inspect(make(reward=parts(MathSection(key="note", sources=("number",)))))
    assert "math (reads note): mean 0.000, 0 of 5 full" in text
    assert "WARNING: math does not give 5 reference answers full marks: " in text
    assert "WARNING: training would stop: " in text


def test_endless_problems_evaluations_and_left_out_rows(make):
    evals = (
        EvalSection(name="sums", prompts=ArithmeticPrompts(split="test", seed=1)),
        EvalSection(name="puzzle", prompts=Game24Prompts(), reward=parts(ReachesSection(), FinishedSection())),
    )
    text = assemble.inspect(make(evals=evals, max_tokens=60, rows=[*ROWS, {"prompt": "y" * 80, "answer": 1}]))
    assert "5 problems; 1 left out, longer than max_tokens" in text
    assert "== evaluation sums: arithmetic\n--- arithmetic problem 0 " in text
    assert "endless; lengths of the first 1000" in text
    assert "reaches (reads numbers): mean 1.000, 8 of 8 full" in text


def test_users_functions_are_tried_on_the_references(make, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def good(examples, completions):\n"
        "    return [float(str(e['answer']) == c.text) for e, c in zip(examples, completions)]\n"
        "def bad(examples, completions):\n    return [e['gold'] for e in examples]\n"
    )
    functions = [FunctionSection(path=f"{tmp_path}/mine.py:{name}") for name in ("good", "bad")]
    text = assemble.inspect(make(reward=parts(*functions)))
    assert "good: mean 1.000\n" in text
    assert "bad: no score\n" in text
    assert re.search(r"WARNING: bad raised for 5 of 5 rows; .*rows\.jsonl:1: KeyError: 'gold'", text)


def test_choices_and_lengths_are_judged_by_their_own_forms(make):
    rows = [{"prompt": "?", "answer": gold, "target_tokens": 7} for gold in ("B", "(C)", 3)]
    text = assemble.inspect(make(rows, reward=parts(ChoiceSection(), TargetLengthSection())))
    assert "choice (reads answer): mean 1.000, 3 of 3 full" in text
    assert "target_length (reads target_tokens): mean 0.000, 3 of 3 full" in text


NO_ANSWER = [{"prompt": "What?", "answer": 1}, {"prompt": "What?", "answer": None}, {"prompt": "What?"}]
BLANK = [{"prompt": "What?", "answer": given} for given in ("1", [], [" "], 0)]
FAULTS = {
    "no rows": ({"rows": []}, r"prompts\.sources\.0: .*rows\.jsonl has no rows; give another"),
    "wrong column": (
        {"columns": {"prompt": "promt"}},
        r"rows\.jsonl:1: columns maps prompt to 'promt', which the row lacks .* did you mean 'prompt'",
    ),
    "no prompt": ({"rows": [{"question": "?"}]}, r"rows\.jsonl:1: there is no prompt among question; map one with"),
    "empty prompt": (
        {"rows": [{"prompt": "?", "answer": 1}, {"prompt": " \n"}]},
        r"rows\.jsonl:2: prompt is empty; fill it in, or take",
    ),
    "no list of messages": ({"rows": [{"prompt": 5}]}, r"rows\.jsonl:1: prompt is of type int \(5\); give a text or a"),
    "no answer in some rows": (
        {"rows": NO_ANSWER},
        r"rows\.jsonl:2, .*rows\.jsonl:3: reward 'math' needs 'answer', which 2 of 3 rows lack .* take the rows out",
    ),
    "empty answers": (
        {"rows": BLANK},
        r"rows\.jsonl:2, .*rows\.jsonl:3: reward 'math' needs 'answer', which 2 of 4 rows",
    ),
    "no answer in any row": (
        {"rows": [{"prompt": "?", "answers": 1}]},
        r"'answer', which 1 of 1 rows lack \(they have answers\); map one with prompts\.sources\.0\.columns "
        r"'{answer: answers}'",
    ),
    "answers that cannot be right": (
        {"reward": parts(MathSection(key="note", sources=("number",)))},
        r"prompts: reward 'math' gives none of the first 5 reference answers full marks.*rows\.jsonl:1 has note 'xxx",
    ),
    "prompt beyond the context": (
        {"rows": [*ROWS, {"prompt": "y" * 490, "answer": 1}]},
        r"rows\.jsonl:6: a prompt of 509 tokens and an answer of 8 \(rollout\.max_tokens\) exceed the model's context "
        r"of 512; lower rollout\.max_tokens, or leave long prompts out with --prompts\.max_tokens N",
    ),
    "all prompts too long": (
        {"max_tokens": 10},
        r"none of 5 prompts has at most prompts\.max_tokens 10 tokens; the shortest has 33",
    ),
    "evaluation without answers": (
        {"evals": (EvalSection(prompts=Game24Prompts()),)},
        r"game24 problem 0, .*: reward 'math' needs 'answer', which 1000 of 1000 rows lack",
    ),
    "no reward file": ({"reward": parts(FunctionSection(path="gone.py:f"))}, r"reward: .*gone\.py is not there"),
    "no reward function": (
        {"reward": parts(FunctionSection(path="FOLDER/mine.py:absent"))},
        r"mine\.py has no function 'absent'",
    ),
    "reward file that raises": (
        {"reward": parts(FunctionSection(path="FOLDER/raises.py:f"))},
        r"raises\.py:2 could not be run: ZeroDivisionError",
    ),
    "reward file that is no Python": (
        {"reward": parts(FunctionSection(path="FOLDER/wrong.py:f"))},
        r"wrong\.py:1 could not be run: SyntaxError",
    ),
}


@pytest.mark.parametrize(("options", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_told_before_a_run_starts(make, options, message, tmp_path):
    (tmp_path / "mine.py").write_text("def f(examples, completions):\n    return [0.0] * len(examples)\n")
    (tmp_path / "raises.py").write_text("\n1 / 0\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    reward = options.get("reward")
    if reward is not None and isinstance(reward.parts[0], FunctionSection):
        path = reward.parts[0].path.replace("FOLDER", str(tmp_path))
        options = {**options, "reward": parts(FunctionSection(path=path))}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_job(make(**options))
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_cut_within_a_letter_is_told_by_file_and_line(make, tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"prompt": "fine", "answer": 1}\n{"prompt": "cut \\ud83d", "answer": 1}\n')
    prompts = FilePrompts(sources=(SourceSection(path=str(tmp_path / "cut.jsonl")),))
    with pytest.raises(ValueError, match=r"cut.jsonl:2: a text holds half of a character"):
        assemble.inspect(make(prompts))


def test_problems_of_files_tell_the_thought_that_their_prompt_begins(tiny_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    codec = load_tokenizer(tiny_model)
    for template, opened in (("{prompt}\n<think>\n", "<think>"), ("{prompt}", "")):
        section = FilePrompts(sources=(SourceSection(path=str(data)),), chat=False, template=template)
        asked = [make_problems(section, codec).at(i) for i in range(len(ROWS) + 1)]
        assert [problem.opened for problem in asked] == [opened] * len(asked)
        assert [problem.number for problem in asked] == list(range(len(asked)))
