"""Judged rows as groups: what each kind gives, grades and ties, bad rows by name, windows, steps, the cache."""

import json

import numpy as np
import pytest

from jaxpost.data import cache as module
from jaxpost.text.messages import DataError


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is 5."}
RANKING = {"prompt": "2+2?", "completions": ["five", "4", "5"], "ranks": [1, 0, 2]}
SCORES = {"prompt": "2+2?", "completions": ["4", "5", "four"], "scores": [1, 0, 0.5]}
STEPS = {"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=7", "So 7"], "labels": [True, False, None]}


def text_of(dataset, tokenizer, index=0):
    """The prompt's text, and each answer's text with its rank."""
    group = dataset.group(index)
    show = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)  # noqa: E731
    return show(group.prompt), [(show(answer.tokens), answer.rank) for answer in group.answers]


def test_a_plain_pair_is_a_turn_and_two_answers(judged, tokenizer):
    prompt, answers = text_of(judged("pairs", [PAIR]), tokenizer)
    assert prompt == tokenizer.render([user("2+2?")], add_generation_prompt=True)
    assert answers == [("It is 4.<|im_end|>", 0), ("It is 5.<|im_end|>", 1)]


def test_mask_completion_keeps_plain_text_as_it_is(judged, tokenizer):
    dataset = judged("pairs", [PAIR], mask="completion")
    assert text_of(dataset, tokenizer) == ("2+2?", [("It is 4.<|im_end|>", 0), ("It is 5.<|im_end|>", 1)])
    assert all(answer.weights.all() for answer in dataset.group(0).answers)


def test_an_implicit_prompt_is_the_common_beginning_in_tokens_too(judged, tokenizer):
    row = {
        "chosen": [user("Hi"), said("Hello"), user("2+2?"), said("4")],
        "rejected": [user("Hi"), said("Hello"), user("2+2?"), said("5")],
    }
    prompt, answers = text_of(judged("pairs", [row]), tokenizer)
    assert prompt == tokenizer.render(row["chosen"][:3], add_generation_prompt=True)
    assert answers == [("4<|im_end|>", 0), ("5<|im_end|>", 1)]


def test_answers_of_several_turns_train_only_what_the_assistant_says(judged, tokenizer):
    row = {"prompt": [user("Hi")], "chosen": [said("A"), user("Go on"), said("B")], "rejected": [said("C")]}
    chosen = judged("pairs", [row]).group(0).answers[0]
    trained = tokenizer.decode(chosen.tokens[chosen.weights > 0], skip_special_tokens=False)
    assert trained == "A<|im_end|>B<|im_end|>"
    assert "Go on" in tokenizer.decode(chosen.tokens, skip_special_tokens=False)


def test_the_system_prompt_comes_first(judged, tokenizer):
    prompt, _ = text_of(judged("pairs", [PAIR], system_prompt="Be brief."), tokenizer)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?")


def test_rankings_and_their_pairs(judged, tokenizer):
    assert text_of(judged("rankings", [RANKING]), tokenizer)[1] == [
        ("five<|im_end|>", 1),
        ("4<|im_end|>", 0),
        ("5<|im_end|>", 2),
    ]
    expected = {
        "all": [("4", "five"), ("4", "5"), ("five", "5")],
        "best_worst": [("4", "5")],
        "neighbours": [("4", "five"), ("five", "5")],
    }
    for choice, pairs in expected.items():
        dataset = judged("pairs", [RANKING], pairs_of_rankings=choice)
        found = [text_of(dataset, tokenizer, n)[1] for n in range(len(dataset))]
        assert [tuple(text.removesuffix("<|im_end|>") for text, _ in pair) for pair in found] == pairs
        assert all([rank for _, rank in pair] == [0, 1] for pair in found)


def test_an_edited_answer_stands_above_chosen(judged, tokenizer):
    dataset = judged("rankings", [{**PAIR, "edited": "4."}])
    assert [rank for _, rank in text_of(dataset, tokenizer)[1]] == [0, 1, 2]
    assert text_of(dataset, tokenizer)[1][0][0] == "4.<|im_end|>"
    assert len(judged("pairs", [{**PAIR, "edited": "4."}])) == 3


def test_unpaired_answers_come_from_labels_pairs_and_scores(judged):
    labelled = {"prompt": "2+2?", "completion": "4", "label": True}
    assert [judged("unpaired", [labelled, PAIR]).group(n).answers[0].rank for n in range(3)] == [0, 0, 1]
    scored = judged("unpaired", [SCORES], good_score=0.5)
    assert [scored.group(n).answers[0].rank for n in range(3)] == [0, 1, 0]
    with pytest.raises(DataError, match=r"rows0\.jsonl:1: .*good_score"):
        judged("unpaired", [SCORES])


def test_a_score_stands_at_the_last_token(judged):
    rows = [
        {"prompt": "2+2?", "completion": "It is four.", "score": 4},
        {"prompt": "2+2?", "completion": "5", "label": False},
        SCORES,
    ]
    dataset = judged("scores", rows)
    found = [answer for n in range(3) for answer in dataset.group(n).answers]
    for answer, score in zip(found, [4, 0, 1, 0, 0.5], strict=True):
        assert answer.marks.tolist() == [0.0] * (len(answer.tokens) - 1) + [1.0]
        assert answer.labels[-1] == score


def test_several_objectives_have_a_label_each(judged):
    row = {"prompt": "2+2?", "completion": "It is four.", "score": {"help": 4, "brief": None, "fun": 1}}
    dataset = judged("scores", [row, {**row, "score": {"fun": 2}}], objectives=("brief", "fun"))
    first, second = (dataset.group(n).answers[0] for n in range(2))
    np.testing.assert_array_equal(first.labels[first.marks > 0], [[np.nan, 1.0]])
    np.testing.assert_array_equal(second.labels[-1], [np.nan, 2.0])
    assert judged("scores", [row]).group(0).answers[0].labels[-1] == 2.5  # the mean of what is known
    with pytest.raises(DataError, match=r"score lacks tone \(data\.objectives\): it has help, brief, fun"):
        judged("scores", [row], objectives=("tone",))


@pytest.mark.parametrize(("mark", "carriers"), [("separator", ["\n", "\n", "\n"]), ("last", ["4", "7", "7"])])
def test_a_step_is_marked_at_its_separator_or_its_last_token(mark, carriers, judged, tokenizer):
    row = {**STEPS, "labels": [1, 0, 0.25]}
    answer = judged("steps", [row], step_mark=mark).group(0).answers[0]
    at = np.flatnonzero(answer.marks)
    assert [tokenizer.decode(answer.tokens[[n]]) for n in at] == carriers
    assert answer.labels[at].tolist() == [1.0, 0.0, 0.25]
    ends = [tokenizer.decode(answer.tokens[: n + 1]) for n in at]
    texts = ["2+2=4", "2+2=4\n4+2=7", "2+2=4\n4+2=7\nSo 7"]
    assert ends == [text + ("\n" if mark == "separator" else "") for text in texts]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, [0.75, 0.25, 1.0]),
        ({"step_labels": "hard"}, [1.0, 0.0, 1.0]),
        ({"after_error": "ignore"}, [0.75, 0.25]),
        ({"after_error": "wrong", "step_labels": "hard"}, [1.0, 0.0, 0.0]),
    ],
)
def test_step_labels_by_option(options, labels, judged):
    row = {**STEPS, "labels": [0.75, 0.25, 1]}
    answer = judged("steps", [row], **options).group(0).answers[0]
    assert answer.labels[answer.marks > 0].tolist() == labels


def test_steps_of_one_text_and_of_a_first_error(judged, tokenizer):
    whole = {"prompt": "2+2+2?", "completion": "2+2=4\n4+2=7\n", "labels": [True, False]}
    first = {"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=7", "So 7"], "first_error": 1}
    right = {"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=6"], "first_error": None}
    dataset = judged("steps", [whole, first, right])
    found = [dataset.group(n).answers[0] for n in range(3)]
    assert [a.labels[a.marks > 0].tolist() for a in found] == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert tokenizer.decode(found[0].tokens) == "2+2=4\n4+2=7\n"


def test_grades_are_numbers_by_the_table(judged):
    grades = ["significantly", "Significantly better", "slightly_better", "better", "marginally", None]
    rows = [{**PAIR, "strength": grade} for grade in grades] + [{**PAIR, "margin": 2.5}]
    np.testing.assert_allclose(judged("pairs", rows).strengths, [1, 1, 1 / 3, 2 / 3, 0, 1, 2.5])
    assert judged("pairs", [{**PAIR, "strength": "much"}], grades={"much": 3.0}).strengths.tolist() == [3.0]
    named = judged("pairs", [{**PAIR, "strength": "Far_Better"}], grades={"Far_Better": 2.0})
    assert named.strengths.tolist() == [2.0], "the table's names are read as the rows' are"
    with pytest.raises(DataError, match=r"strength is 'huge', which data.grades lacks; it has significantly, better"):
        judged("pairs", [{**PAIR, "strength": "huge"}])


def test_ties_by_policy(judged):
    rows = [PAIR, {**PAIR, "tie": True}, {"prompt": "2+2?", "completions": ["4", "four"], "ranks": [0, 0]}]
    skipped = judged("rankings", rows)
    assert (len(skipped), skipped.stats[0].dropped, skipped.stats[0].rows) == (1, {"tie": 2}, 3)
    kept = judged("rankings", rows, on_tie="keep")
    assert [[answer.rank for answer in kept.group(n).answers] for n in range(3)] == [[0, 1], [0, 0], [0, 0]]
    assert kept.stats[0].notes == {"ties kept": 2}
    with pytest.raises(DataError, match=r"rows0\.jsonl:2: no answer is better \(a tie\)"):
        judged("rankings", rows, on_tie="error")
    with pytest.raises(
        DataError, match=r"none of its 2 rows can be trained on \(2 tie\); the first: .*rows0\.jsonl:1: "
    ):
        judged("pairs", rows[1:])


def test_ties_are_named_and_refused_where_single_answers_are_needed(judged, tmp_path):
    rows = [PAIR, {**PAIR, "tie": True}]
    assert judged("unpaired", rows).stats[0].dropped == {"tie": 1}
    (left,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert (left["kind"], left["reason"], left["where"][-14:]) == ("dropped", "tie", "/rows0.jsonl:2")
    with pytest.raises(DataError, match=r"rows0\.jsonl:2: no answer is better \(a tie\)"):
        judged("unpaired", rows, on_tie="error")
    three = {"prompt": "2+2?", "completions": ["4", "four", "IV", "5"], "ranks": [0, 0, 0, 1]}
    assert judged("pairs", [three]).stats[0].dropped == {"tie": 3}
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 1


def test_rankings_may_have_places_and_scores(judged):
    row = {"prompt": "2+2?", "completions": ["4", "5", "6"], "ranks": [0, 1, 1], "scores": [3, 2, 1]}
    assert [answer.rank for answer in judged("rankings", [row]).group(0).answers] == [0, 1, 1]
    found = judged("scores", [row]).group(0).answers
    assert [float(answer.labels[-1]) for answer in found] == [3.0, 2.0, 1.0]
    for key in ("ranks", "scores"):
        assert len(judged("pairs", [{**row, key: None}])) in (2, 3)


def test_an_edited_answer_may_be_missing_and_steps_may_be_counted_in_floats(judged):
    rows = [{**PAIR, "edited": "It is four."}, {**PAIR, "edited": None}]
    assert judged("rankings", rows).sizes_of_groups.tolist() == [3, 2]
    first = {"prompt": "a", "completions": ["b", "c"], "first_error": 1.0}
    (answer,) = judged("steps", [first]).group(0).answers
    assert answer.labels[answer.marks > 0].tolist() == [1.0, 0.0]


def dialogues(chosen, rejected):
    return {"chosen": [user(chosen[0]), said(chosen[1])], "rejected": [user(rejected[0]), said(rejected[1])]}


ANSWER = {"prompt": "a", "completion": "b"}
BAD = {
    # name: (kind of data, row, kind of fault, words of the error)
    "identical": ("pairs", {**PAIR, "rejected": "It is 4."}, "identical", "chosen and rejected are identical"),
    "identical dialogues": ("pairs", dialogues("ab", "ab"), "identical", "chosen and rejected are identical"),
    "equal answers apart": (
        "rankings",
        {**RANKING, "completions": ["4", "5", "4"]},
        "identical",
        "completions[0] and completions[2] are identical",
    ),
    "an empty side": ("pairs", {**PAIR, "rejected": " "}, "empty", "rejected is empty"),
    "an empty turn": ("pairs", dialogues("ab", ("a", "")), "empty", "rejected is empty"),
    "an empty answer": ("unpaired", {"prompt": "a", "completion": "\n", "label": 1}, "empty", "completion is empty"),
    "an empty step": ("steps", {**STEPS, "completions": ["a", "", "b"]}, "empty", "completions[1] is empty"),
    "prompts that differ": ("pairs", dialogues("ab", "cd"), "prompts_differ", "begin differently"),
    "a question more": (
        "pairs",
        {"prompt": [user("a")], "chosen": [said("b")], "rejected": [user("c"), said("d")]},
        "prompts_differ",
        "rejected begins with a turn of role user",
    ),
    "texts of nothing common": ("pairs", {"chosen": "Yes", "rejected": "No"}, "prompts_differ", "begin differently"),
    "a missing separator": (
        "steps",
        {"prompt": "a", "completion": "one two", "labels": [1, 0]},
        "step_separator",
        "splits the completion into 1 steps, but the row has 2 labels",
    ),
    "no score": ("scores", {**ANSWER, "score": None}, "score", "score must be a finite number, not None"),
    "a score that is no number": ("scores", {**ANSWER, "score": float("nan")}, "score", "finite number, not nan"),
    "an endless score": ("scores", {**SCORES, "scores": [1, float("inf"), 0]}, "score", "scores[1] must be a finite"),
    "a probability above 1": ("steps", {**STEPS, "labels": [1, 0, 1.5]}, "score", "labels[2] must be true or false"),
    "a probability that is none": ("steps", {**STEPS, "labels": [1, 0, float("nan")]}, "score", "labels[2] must be"),
    "an unjudged row": ("steps", {**STEPS, "labels": [None] * 3}, "empty_mask", "no step of the row is judged"),
    "labels of wrong length": ("steps", {**STEPS, "labels": [1, 0]}, "length", "each of the 3 completions; it has 2"),
    "ranks of wrong length": ("rankings", {**RANKING, "ranks": [0, 1]}, "length", "ranks must have one entry for each"),
    "an error behind the end": (
        "steps",
        {"prompt": "a", "completions": ["b"], "first_error": 1},
        "length",
        "first_error must be null or 0 to 0",
    ),
    "an error that is only said to be": (
        "steps",
        {"prompt": "a", "completions": ["b", "c"], "first_error": True},
        "length",
        "first_error must be null or 0 to 1",
    ),
    "ranks against scores": (
        "rankings",
        {**RANKING, "completions": ["a", "b", "c"], "ranks": [0, 1, 2], "scores": [1, 2, 3]},
        "format",
        "ranks and scores contradict one another",
    ),
    "neither ranks nor scores": ("rankings", {**RANKING, "ranks": None}, "format", "both are null"),
    "an empty prompt": ("pairs", {**PAIR, "prompt": ""}, "empty", "prompt is empty; leave it out"),
    "a prompt that is a number": ("pairs", {**PAIR, "prompt": 0}, "format", "prompt must be text or a list"),
    "a number too large": ("scores", {**ANSWER, "score": 10**400}, "score", "score must be a finite number"),
    "half a character": ("pairs", {**PAIR, "chosen": "cut \ud83d"}, "encoding", "holds half of a character"),
    "a ranking of one": ("rankings", {"prompt": "a", "completions": ["b"], "ranks": [0]}, "length", "two answers"),
    "a strength below zero": ("pairs", {**PAIR, "strength": -1}, "strength", "strength must not be negative"),
    "another kind": ("pairs", {**ANSWER, "label": True}, "format", "does not give pairs"),
    "no judgement": ("pairs", ANSWER, "format", "does not say how good"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_skipped_and_counted(name, judged, tmp_path):
    kind, row, fault, words = BAD[name]
    fine = {"pairs": PAIR, "rankings": RANKING, "steps": STEPS, "scores": SCORES}.get(
        kind, {"prompt": "a", "completion": "b", "label": True}
    )
    with pytest.raises(DataError) as caught:
        judged(kind, [fine, row])
    assert "rows0.jsonl:2: " in str(caught.value)
    assert words in str(caught.value)
    dataset = judged(kind, [fine, row, fine], on_bad_row="skip")
    stats = dataset.stats[0]
    assert (stats.rows, stats.bad) == (3, {fault: 1})
    assert len(dataset) == 2 * len(judged(kind, [fine]))
    (left,) = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert left["kind"] == fault
    assert words in left["reason"]


def test_a_template_that_takes_the_separator_away_is_an_error(judged, tokenizer, monkeypatch):
    plain = type(tokenizer.chat).render

    def trimmed(self, messages, *args, **options):
        short = [message.__class__(role=message.role, content=message.content.strip()) for message in messages]
        return plain(self, short, *args, **options)

    monkeypatch.setattr(type(tokenizer.chat), "render", trimmed)
    with pytest.raises(DataError, match=r"no step separator '\\n' stands behind step 2.*step_mark: last"):
        judged("steps", [STEPS])
    assert judged("steps", [STEPS], step_mark="last").group(0).answers[0].marks.sum() == 2
    with pytest.raises(DataError, match="two answers are identical in tokens"):
        judged("pairs", [{**PAIR, "rejected": "It is 4. "}])


def test_a_mask_that_says_nothing_of_answers(judged):
    with pytest.raises(DataError, match=r"data\.mask is all"):
        judged("pairs", [PAIR], mask="all")


LONG = {"prompt": "p" * 40, "chosen": "c" * 60, "rejected": "r" * 20}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("cut", ["answers", "prompt"])
@pytest.mark.parametrize("max_length", [None, 75])
def test_long_groups_are_cut_to_the_window(share, cut, max_length, judged):
    whole = judged("pairs", [LONG], mask="completion", seq_len=1000).group(0)
    lengths = [len(answer.tokens) for answer in whole.answers]
    window = whole.cost(share) - 10
    options = {"mask": "completion", "seq_len": window, "max_length": max_length, "cut": cut}
    dataset = judged("pairs", [LONG], share_prompts=share, **options)
    group = dataset.group(0)
    found = [len(answer.tokens) for answer in group.answers]
    assert group.cost(share) <= window
    assert dataset.costs(share).tolist() == [group.cost(share)]
    assert max_length is None or len(group.prompt) + max(found) <= max_length
    # As much as the window allows is kept, and only what is too long is cut.
    assert found[1] == lengths[1]
    assert group.cost(share) == window or (max_length and len(group.prompt) + found[0] == max_length)
    if cut == "answers":
        assert len(group.prompt) == len(whole.prompt)
        assert found[0] < lengths[0]
    else:
        assert len(group.prompt) < len(whole.prompt)
        np.testing.assert_array_equal(group.prompt, whole.prompt[-len(group.prompt) :])
    stats = dataset.stats[0]
    assert (stats.truncated, stats.truncated_tokens) == (1, whole.cost(share) - group.cost(share))


def test_what_a_window_leaves_nothing_of_is_dropped_counted_and_named(judged, tmp_path):
    fine = {"prompt": "a", "chosen": "b", "rejected": "c"}
    options = {"mask": "completion", "seq_len": 30}
    alike = {"prompt": "a", "chosen": "b" * 40 + "1", "rejected": "b" * 40 + "2"}
    counts = judged("pairs", [fine, LONG, alike], **options).stats[0].dropped
    assert counts == {"the prompt leaves no room for an answer": 1, "identical within the window": 1}
    saved = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [(row["where"][-13:], row["kind"], row["reason"]) for row in saved] == [
        ("rows0.jsonl:2", "dropped", "the prompt leaves no room for an answer"),
        ("rows0.jsonl:3", "dropped", "identical within the window"),
    ]
    assert judged("pairs", [fine, LONG], on_long_row="drop", **options).stats[0].dropped == {"too long": 1}
    with pytest.raises(DataError, match=r"rows0\.jsonl:2: the group takes \d+ tokens of a row of 30"):
        judged("pairs", [fine, LONG], on_long_row="error", **options)
    late = {**STEPS, "completions": ["x" * 40, "y"], "labels": [1, 0]}
    assert judged("steps", [STEPS, late], **options).stats[0].dropped == {"no judged step within the window": 1}


def test_a_cut_score_is_read_where_the_answer_now_ends(judged):
    row = {"prompt": "a", "completion": "b" * 50, "score": 3}
    answer = judged("scores", [row], mask="completion", seq_len=20).group(0).answers[0]
    assert len(answer.tokens) == 19
    assert answer.marks.tolist() == [0.0] * 18 + [1.0]
    assert answer.labels[-1] == 3


def test_the_cache_is_read_again_and_knows_its_options(judged, monkeypatch):
    rows = [PAIR, RANKING]
    first = judged("pairs", rows)
    encode = module.encoded_chunks
    monkeypatch.setattr(module, "encoded_chunks", None)  # would fail if rows were tokenised again
    again = judged("pairs", rows)
    assert again.fingerprint == first.fingerprint
    assert again.stats == first.stats
    for n in range(len(first)):
        for a, b in zip(first.group(n).answers, again.group(n).answers, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
    monkeypatch.setattr(module, "encoded_chunks", encode)
    changed = [judged("pairs", rows, pairs_of_rankings="best_worst"), judged("rankings", rows)]
    changed += [judged("pairs", rows, share_prompts=False)]
    assert len({first.fingerprint, *(other.fingerprint for other in changed)}) == 4


def test_subsets_and_columns_nobody_reads(judged):
    dataset = judged("pairs", [{**PAIR, "subset": "maths", "id": 7}, PAIR])
    assert dataset.subsets.tolist() == ["maths", ""]
    assert dataset.stats[0].ignored == {"id": 1}


def test_tools_are_shown_to_both_sides(judged, section, tmp_path):
    from toy_text import fast_tokenizer

    from jaxpost.config import AnswerDataSection
    from jaxpost.data.answers import prepare_answers
    from jaxpost.text.chat import builtin
    from jaxpost.text.tokenizer import Tokenizer

    qwen = Tokenizer(fast_tokenizer("chatml", builtin("qwen3")), chat_template="qwen3")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
    row = {"prompt": [user("2+2?")], "chosen": [call], "rejected": [said("5")], "tools": tools}
    data = AnswerDataSection(train=section([row]).train, seq_len=1000)
    group = prepare_answers(data, data.train, qwen, kind="pairs", cache_dir=tmp_path / "cache").group(0)
    assert '"name": "add"' in qwen.decode(group.prompt)
    assert "add" in qwen.decode(group.answers[0].tokens)
    with pytest.raises(DataError, match="tools stand beside plain text"):
        judged("pairs", [{**PAIR, "tools": tools}], mask="completion")
