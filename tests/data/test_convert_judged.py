"""Converters of public files of judged answers and steps: small rows of each shape, by hand."""

from collections import Counter

import pytest

from jaxpost.data.convert import convert, detect_converter
from jaxpost.data.convert_judged import JUDGED_CONVERTERS, detect_judged
from jaxpost.data.convert_steps import STEP_CONVERTERS, detect_steps
from jaxpost.data.formats import detect_format, parse_example
from jaxpost.text.messages import DataError


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def converted(row, kind="pairs", ignored=None):
    return convert(row, "auto", Counter() if ignored is None else ignored, kind)


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: 2+2?\n\nAssistant: 4",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: 2+2?\n\nAssistant: 5\n\nIndeed",
}
ALPACA_EVAL = {
    "instruction": "2+2?",
    "dataset": "koala",
    "baseline": {"generator": "b", "output": "4"},
    "candidates": [
        {"generator": "x", "output": "5", "preference": 1.1},
        {"generator": "y", "output": "four", "preference": 1.75},
        {"generator": "z", "output": "4", "preference": 1.5},
    ],
}
COMPARED = {"subset": "s", "input": "2+2?", "output_1": "5", "output_2": "4", "label": 2}
PANDALM = {
    **{"instruction": "Add", "input": "2 2", "response1": "4", "response2": "5"},
    **{"annotator1": 1, "annotator2": 0, "annotator3": 1},
}
STACK = {"question": "2+2?", "response_j": "4", "response_k": "5"}
QA = {
    "question": "2+2?",
    "passages": [["Sums", "One.", "Two."]],
    **{f"prediction {n}": text for n, text in enumerate(["5", "4", "6"], 1)},
    "preference": [2, 0, 1],  # of 1 and 2, of 1 and 3, of 2 and 3
}
JUDGE = (
    "###Task Description:\nRate.\n\n###The instruction to evaluate:\n2+2?\n\nReally?\n\n"
    "###Response to evaluate:\n{}\n\n###{}Score Rubrics:\n[Right?]"
)
HHH = {
    "source": "honest",
    "chosen_instruction": JUDGE.format("4", ""),
    "rejected_instruction": JUDGE.format("5", "Reference Answer (Score 5):\n4\n\n###"),
}
RUBRIC = {"instruction": JUDGE.format("4", ""), "gpt4_score": [5, 4, 3], "subset": "vicuna"}
GSM = {
    "question": "2+2?",
    "ground_truth": "A: 4",
    "a": {"is_correct": True, "solution": "A: 4"},
    "b": {"is_correct": False, "solution": "A: 5"},
    "c": {"is_correct": True, "solution": "4 A: 4"},
    "d": {"is_correct": False, "solution": "A: 5"},
}
BEST = {"question": "2+2?", "system": "Think.", "response": ["4", "5"], "score": [True, False], "pred": ["4", "5"]}
TRUTH = {"prompt": "Q: 2+2?\nA: 4\nTrue:", "completion": " yes"}
MATHDIAL = {"question": "2+2?", "ground_truth": "4\n", "student_incorrect_solution": " 5"}
HELPSTEER = {"prompt": "2+2?", "response": "4", "helpfulness": 4, "correctness": 3, "coherence": 2, "split": "train"}
VERIFY = {"task": "gsm8k", "question": "2+2?", "answer": "#1. 4", "flag": 1, "correct": True}
TREE = {
    "prompt": {
        "text": "2+2?",
        "role": "prompter",
        "replies": [
            {"text": "5", "role": "assistant", "rank": 1, "replies": []},
            {
                "text": "4",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {
                        "text": "Thanks",
                        "role": "prompter",
                        "replies": [
                            {"text": "Welcome", "role": "assistant", "rank": 0},
                            {"text": "...", "role": "assistant", "rank": 1},
                            {"text": "?", "role": "assistant"},
                        ],
                    }
                ],
            },
            {"text": "spam", "role": "assistant", "rank": 2, "deleted": True},
        ],
    }
}
PRM800K = {
    "question": {"problem": "2+2+2?", "ground_truth_answer": "6"},
    "label": {
        "steps": [
            {"completions": [{"text": "2+2=4", "rating": 1}], "human_completion": None, "chosen_completion": 0},
            {
                "completions": [{"text": "So 7", "rating": -1}, {"text": "So on", "rating": 0}],
                "human_completion": None,
                "chosen_completion": 1,
            },
            {
                "completions": [{"text": "7", "rating": -1}, {"text": "8", "rating": -1}],
                "human_completion": {"text": "6", "rating": None},
                "chosen_completion": None,
            },
            {"completions": [{"text": "No", "rating": -1}], "human_completion": None, "chosen_completion": None},
        ]
    },
}
SHEPHERD = {
    "input": "2+2+2? Step 1: 2+2=4 ки\nStep 2: So + 7 ки",
    "label": "2+2+2? Step 1: 2+2=4 +\nStep 2: So + 7 -",
    "task": "GSM8K",
}
OMEGA_TREE = {
    "question": "Q",
    "reasoning_steps": {
        "text": "Q",
        "mc_value": 0.5,
        "children": [
            {
                "text": "a",
                "mc_value": 0.25,
                "children": [{"text": "b", "mc_value": 1.0, "children": []}, {"text": "c", "mc_value": 0.0}],
            },
            {"text": "d", "mc_value": 0.75, "children": []},
        ],
    },
}
OMEGA = {
    "question": "Q",
    "reasoning_steps": [
        {"solution_prefix": "Q", "mc_value": 0.5},
        {"solution_prefix": "Q\n\n a", "mc_value": 0.25},
        {"solution_prefix": "Q\n\n a b", "mc_value": 1.0},
        {"solution_prefix": "Q\n\n a c", "mc_value": 0.0},
        {"solution_prefix": "Q\n\n d", "mc_value": 0.75},
    ],
}
PRMBENCH = {
    "classification": "circular",
    "question": "Q",
    "original_question": "Q1",
    "modified_question": "Q2",
    "original_process": ["a", "b"],
    "modified_process": ["a", "x", "b"],
    "error_steps": [2, 3],
}
MISTAKE = {"task": "t", "input": "Q", "steps": ["a", "b", "c"], "mistake_index": 1, "target": "c"}

PAIRS = {
    "hh": (
        HH,
        [
            {
                "chosen": [user("Hi"), said("Ho"), user("2+2?"), said("4")],
                "rejected": [user("Hi"), said("Ho"), user("2+2?"), said("5\n\nIndeed")],
            }
        ],
    ),
    "compared": (COMPARED, [{"subset": "s", "prompt": "2+2?", "chosen": "4", "rejected": "5", "tie": False}]),
    "pandalm": (
        PANDALM,
        [{"prompt": "Add\n\n2 2", "chosen": "4", "rejected": "5", "tie": False, "strength": 2 / 3}],
    ),
    "stack_exchange": (STACK, [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}]),
    "qa_feedback": (
        QA,
        [
            {"prompt": "Sums\nOne. Two.\n\n2+2?", "chosen": "4", "rejected": "5", "tie": False},
            {"prompt": "Sums\nOne. Two.\n\n2+2?", "chosen": "5", "rejected": "6", "tie": True},
            {"prompt": "Sums\nOne. Two.\n\n2+2?", "chosen": "4", "rejected": "6", "tie": False},
        ],
    ),
    "judge_prompts": (HHH, [{"prompt": "2+2?\n\nReally?", "chosen": "4", "rejected": "5", "subset": "honest"}]),
    "mathdial": (MATHDIAL, [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    row, expected = PAIRS[name]
    assert detect_judged(row) == name
    assert converted(row) == expected


def test_candidates_against_their_baseline():
    found = converted(ALPACA_EVAL)
    assert [(row["chosen"], row["rejected"], row["tie"]) for row in found] == [
        ("4", "5", False),
        ("four", "4", False),
        ("4", "4", True),
    ]
    assert [row["strength"] for row in found] == pytest.approx([0.8, 0.5, 0.0])
    ignored = Counter()
    (ranking,) = converted(ALPACA_EVAL, "rankings", ignored)
    assert ranking == {
        "prompt": "2+2?",
        "subset": "koala",
        "completions": ["4", "5", "four"],
        "scores": [1.5, 1.1, 1.75],
    }
    assert ignored == {"alpaca_eval: candidates with the same text as another": 1}


def test_annotators_who_disagree_make_a_tie():
    (row,) = converted({**PANDALM, "annotator2": 2, "annotator3": 0})
    assert (row["tie"], row["strength"]) == (True, 0.0)
    with pytest.raises(DataError, match="annotators must say 0, 1 or 2; they say 1, 'x', 1"):
        converted({**PANDALM, "annotator2": "x"})


def test_predictions_are_ranked_by_comparisons_won():
    (row,) = converted(QA, "rankings")
    assert (row["completions"], row["scores"]) == (["5", "4", "6"], [0.5, 2.0, 0.5])


def test_a_rubric_gives_the_mean_score():
    assert converted(RUBRIC, "scores") == [
        {"subset": "vicuna", "prompt": "2+2?\n\nReally?", "completion": "4", "score": 4.0}
    ]
    with pytest.raises(DataError, match="different instructions"):
        converted({**HHH, "rejected_instruction": JUDGE.format("5", "").replace("2+2?", "3+3?")})


def test_solutions_by_kind():
    ignored = Counter()
    (row,) = converted(GSM, "scores", ignored)
    assert row == {
        "ground_truth": "A: 4",
        "prompt": "2+2?",
        "completions": ["A: 4", "A: 5", "4 A: 4"],
        "scores": [1.0, 0.0, 1.0],
    }
    assert ignored == {"solutions that stand there twice": 1}
    found = converted(GSM, "unpaired")
    assert [(row["completion"], row["label"]) for row in found] == [("A: 4", True), ("A: 5", False), ("4 A: 4", True)]
    for wrong in ({**GSM, "a": {**GSM["a"], "is_correct": "False"}}, {**BEST, "score": [0.1, 0.9]}):
        with pytest.raises(DataError, match="must be true or false, not"):  # and nothing is guessed of it
            converted(wrong)
    (row,) = converted(BEST, "pairs")
    assert row["prompt"] == [{"role": "system", "content": "Think."}, user("2+2?")]
    assert (row["completions"], row["scores"]) == (["4", "5"], [1.0, 0.0])


def test_grades_of_several_aspects():
    score = {"helpfulness": 4, "correctness": 3, "coherence": 2}
    assert converted(HELPSTEER, "scores") == [{"split": "train", "prompt": "2+2?", "completion": "4", "score": score}]


def test_statements_and_chains():
    assert converted(TRUTH, "unpaired") == [{"prompt": "2+2?", "completion": "4", "label": True}]
    (row,) = converted(VERIFY, "scores")
    assert (row["prompt"], row["completion"], row["label"], row["subset"]) == ("2+2?", "#1. 4", 1, "gsm8k")
    # For supervised training the judge's own words stay.
    assert convert(TRUTH, "auto", Counter(), None) == [TRUTH]


def test_sibling_replies_of_a_tree_are_rankings():
    ignored = Counter()
    first, second = converted(TREE, "rankings", ignored)
    ask = {"role": "prompter", "content": "2+2?"}
    assert first == {"prompt": [ask], "completions": [[said("5")], [said("4")]], "ranks": [1, 0]}
    assert second["prompt"] == [ask, said("4"), {"role": "prompter", "content": "Thanks"}]
    assert (second["completions"], second["ranks"]) == ([[said("Welcome")], [said("...")]], [0, 1])
    assert +ignored == {"oasst: deleted messages": 1, "oasst: replies without a rank": 1}
    assert detect_converter(TREE) == "oasst"
    assert "messages" in convert(TREE, "auto", Counter(), None)[0]  # supervised training reads its best path


def steps(row):
    return [(item["prompt"], item["completions"], item["labels"]) for item in converted(row, "steps")]


def test_prm800k_judges_the_path_and_what_stood_beside_it():
    path = ["2+2=4", "So on", "6", "No"]
    assert steps(PRM800K) == [
        ("2+2+2?", path, [1.0, 1.0, None, 0.0]),
        ("2+2+2?", ["2+2=4", "So 7"], [None, 0.0]),
        ("2+2+2?", ["2+2=4", "So on", "7"], [None, None, 0.0]),
        ("2+2+2?", ["2+2=4", "So on", "8"], [None, None, 0.0]),
    ]


def test_math_shepherd_reads_the_marks_not_the_signs_of_the_text():
    assert steps(SHEPHERD) == [("2+2+2?", ["Step 1: 2+2=4", "Step 2: So + 7"], [1.0, 0.0])]
    for change, words, kind in (
        ({"input": "2+2? Step 1: 4 ки and on"}, "must end every step with the step separator", "step_separator"),
        ({"label": "2+2+2? Step 1: 2+2=4 +\nStep 2: So + 8 -"}, "step 1 differs", "length"),
        ({"label": "2+2+2? Step 1: 2+2=4 ки\nStep 2: So + 7 -"}, "step 0 differs", "length"),
        ({"input": "2 ки", "label": "2 +"}, '"Step 1:"', "step_separator"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            steps({**SHEPHERD, **change})
        assert caught.value.kind == kind


@pytest.mark.parametrize("row", [OMEGA_TREE, OMEGA])
def test_omega_prm_judges_each_step_once(row):
    expected = {("a", "b"): [0.25, 1.0], ("a", "c"): [None, 0.0], ("d",): [0.75]}
    assert {tuple(texts): labels for _, texts, labels in steps(row)} == expected
    assert {prompt for prompt, _, _ in steps(row)} == {"Q"}


def test_prmbench_counts_steps_from_one():
    assert steps(PRMBENCH) == [("Q2", ["a", "x", "b"], [1.0, 0.0, 0.0]), ("Q1", ["a", "b"], [1.0, 1.0])]
    assert [row["subset"] for row in converted(PRMBENCH, "steps")] == ["circular", "original"]
    with pytest.raises(DataError, match="error_steps names 4, but the process has the steps 1 to 3"):
        steps({**PRMBENCH, "error_steps": [2, 4]})
    with pytest.raises(DataError, match="error_steps names 0"):
        steps({**PRMBENCH, "error_steps": [0]})


def test_big_bench_mistake_counts_steps_from_zero():
    (row,) = converted(MISTAKE, "steps")
    assert (row["completions"], row["first_error"], row["subset"]) == (["a", "b", "c"], 1, "t")


ROWS = [HH, ALPACA_EVAL, COMPARED, PANDALM, STACK, QA, HHH, GSM, BEST, TRUTH, MATHDIAL, VERIFY, HELPSTEER, TREE]
STEP_ROWS = [PRM800K, SHEPHERD, OMEGA, PRMBENCH, MISTAKE]


def test_every_converter_is_detected():
    assert {detect_judged(row) for row in ROWS} == set(JUDGED_CONVERTERS)
    assert [detect_steps(row) for row in STEP_ROWS] == list(STEP_CONVERTERS)
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert detect_judged(plain) is None
    assert detect_steps(plain) is None


def read(row, name):
    for item in convert(row, name, Counter(), "steps" if name in STEP_CONVERTERS else "pairs"):
        parse_example(item, detect_format(list(item)))


@pytest.mark.parametrize("name", [*JUDGED_CONVERTERS, *STEP_CONVERTERS])
def test_a_row_of_another_shape_is_an_error_with_words(name):
    for row in (
        {"text": "Hi"},
        {key: 5 for shape in ROWS + STEP_ROWS for key in shape},
        {key: None for shape in ROWS + STEP_ROWS for key in shape},
    ):
        with pytest.raises(DataError, match=r"lacks|is not as|must|has no|needs"):
            read(row, name)
