"""Writes the chitchat preset's training and held-out conversations from the `chitchat-dataset` package (MIT).

The package holds 7,168 conversations between volunteers about everyday questions (BYU PCC lab), each rated
by its speakers. Kept are those with at least two turns a side and a mean rating of 4 or more, up to three turns
a side; the first speaker becomes the user, the second the assistant. Every twentieth conversation is held out.

    python tools/chitchat_data.py OUT_FOLDER
"""

import importlib.util
import json
import sys
from pathlib import Path

MIN_TURNS, MAX_TURNS, MIN_RATING, HELD_OUT_EVERY = 4, 6, 4.0, 20


def dataset_file() -> Path:
    """The package's one data file, found without importing the package."""
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or spec.origin is None:
        raise SystemExit("the package chitchat-dataset is not installed: pip install --no-deps chitchat-dataset==0.9.0")
    return Path(spec.origin).parent / "dataset.json"


def to_messages(conversation: dict) -> list[dict[str, str]] | None:
    """One chat row, or None where the conversation is one-sided, too short or rated low."""
    turns: list[tuple[str, str]] = []
    for group in conversation["messages"]:
        for utterance in group:
            sender, text = utterance["sender"], utterance["text"].strip()
            if not text:
                continue
            if turns and turns[-1][0] == sender:
                turns[-1] = (sender, f"{turns[-1][1]} {text}")
            else:
                turns.append((sender, text))
    turns = turns[:MAX_TURNS]
    turns = turns[: len(turns) // 2 * 2]
    ratings = conversation.get("ratings", {}).values()
    if len(turns) < MIN_TURNS or not ratings or sum(ratings) / len(ratings) < MIN_RATING:
        return None
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, (_, text) in enumerate(turns)]


def main(folder: str) -> None:
    rows = [m for c in json.loads(dataset_file().read_text("utf-8")).values() if (m := to_messages(c))]
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (
        ("train", [r for i, r in enumerate(rows) if i % HELD_OUT_EVERY]),
        ("heldout", rows[::HELD_OUT_EVERY]),
    ):
        text = "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in part)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{out / name}.jsonl: {len(part)} conversations")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
