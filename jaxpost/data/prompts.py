"""The prompt that several answers share, where rows repeat it in every answer or do not name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from unicodedata import east_asian_width

from jaxpost.data.texts import Text, is_empty, same_kind
from jaxpost.text.messages import DataError


def split_prompt(prompt: Text | None, answers: Mapping[str, Text]) -> tuple[Text, dict[str, Text]]:
    """The prompt of answers, and the answers without it, as all of the same kind (plain or conversational).

    Some files repeat the prompt at the head of every answer, some give whole dialogues and no prompt: what all begin
    with is the prompt then.

    Raises: DataError where a side is empty, two sides are the same, or the sides answer different prompts.
    """
    kinds = {isinstance(value, str) for value in answers.values()}
    names = " and ".join(answers)
    if len(kinds) > 1:
        raise DataError(f"{names} must both be text or both be messages")
    _check_empty(answers)
    whole = dict(answers)
    if prompt is not None:
        for key, value in answers.items():
            prompt, whole[key] = same_kind(prompt, value)
        prompt = _after_system_turn(prompt, list(whole.values()))
        head = len(prompt)
        if not isinstance(prompt, str) and all(value[:head] == prompt for value in whole.values()):
            whole = {key: value[head:] for key, value in whole.items()}
    else:
        first, *others = answers.values()
        if all(other == first for other in others):
            raise DataError(f"{names} are identical, so neither is better", kind="identical")
        shared = min(_common_prefix(first, other) for other in others)
        if shared == 0:
            raise DataError(
                f"{names} begin differently, so they answer different prompts; give the prompt in a column of its own "
                "(the source's columns: {prompt: NAME})",
                kind="prompts_differ",
            )
        prompt, whole = first[:shared], {key: value[shared:] for key, value in whole.items()}
    _check_empty(whole)
    for key, value in whole.items():
        if not isinstance(value, str) and value[0].role != "assistant":
            raise DataError(
                f"{key} begins with a turn of role {value[0].role} that the other side lacks, so {names} answer "
                "different prompts",
                kind="prompts_differ",
            )
    return prompt, whole


def _check_empty(answers: Mapping[str, Text]) -> None:
    for key, value in answers.items():
        if is_empty(value):
            raise DataError(f"{key} is empty, or has nothing that the other side lacks", kind="empty")


def _after_system_turn(prompt: Text, dialogues: Sequence[Text]) -> Text:
    """A prompt as it stands in whole dialogues: behind the system turn with which all of them begin, if they do."""
    first = dialogues[0]
    if isinstance(prompt, str) or isinstance(first, str) or first[0].role != "system":
        return prompt
    behind = (first[0], *prompt)
    return behind if all(tuple(value[: len(behind)]) == behind for value in dialogues) else prompt


def _common_prefix(a: Text, b: Text) -> int:
    """Turns or characters that both begin with; of plain texts, up to the start of the word where they part."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    if isinstance(a, str) and isinstance(b, str):
        while n > 0 and not _ends_word(a[n - 1]):
            n -= 1
        while n > 0 and a[n - 1] == " ":
            n -= 1
    return n


def _ends_word(character: str) -> bool:
    """Whether a word may end with it: space, and every character of scripts that write no spaces (wide ones)."""
    return character.isspace() or east_asian_width(character) in "WF"
