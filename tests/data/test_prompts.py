"""The prompt that answers share: named, repeated in every answer, or neither."""

import pytest

from jaxpost.data.prompts import split_prompt
from jaxpost.data.texts import parse_text
from jaxpost.text.messages import DataError


def turns(*said: tuple[str, str]):
    return parse_text([{"role": role, "content": text} for role, text in said], "side")


def test_a_prompt_beside_dialogues_stands_behind_their_system_turn():
    head = (("system", "be brief"), ("user", "why?"))
    sides = {"chosen": turns(*head, ("assistant", "so")), "rejected": turns(*head, ("assistant", "no"))}
    prompt, answers = split_prompt("why?", sides)
    assert prompt == turns(*head)
    assert answers == {"chosen": turns(("assistant", "so")), "rejected": turns(("assistant", "no"))}


def test_system_turns_that_differ_are_different_prompts():
    sides = {
        "chosen": turns(("system", "be brief"), ("user", "why?"), ("assistant", "so")),
        "rejected": turns(("system", "be long"), ("user", "why?"), ("assistant", "no")),
    }
    with pytest.raises(DataError, match="answer different prompts"):
        split_prompt("why?", sides)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("what is it? a cat", "what is it? a dog", "what is it? a"),
        ("what is it? cats", "what is it? cattle", "what is it?"),
        ("天空是什么颜色？蓝色。", "天空是什么颜色？绿色。", "天空是什么颜色？"),
        ("空は何色？青。", "空は何色？緑。", "空は何色？"),
    ],
)
def test_texts_part_between_words(chosen, rejected, prompt):
    found, answers = split_prompt(None, {"chosen": chosen, "rejected": rejected})
    assert found == prompt
    assert answers == {"chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
