"""The report on a search's verifier, from the rows of its results."""

from __future__ import annotations

import json

from jaxpost.assemble.search_folder import result_row
from jaxpost.assemble.search_numbers import verifier_report
from jaxpost.assemble.search_prompts import Question
from jaxpost.search.best_of_n import best_of_n
from jaxpost.search.compose import Composed
from jaxpost.search.drive import search
from tests.search.toy import ToyPolicy, ToyVerifier


def test_calibration_and_false_accepts_of_every_part_from_the_rows():
    parts = {"sure": ToyVerifier(lambda text: 1.0), "knows": ToyVerifier(lambda text: float(text == "a"))}
    policy = ToyPolicy(lambda text: {"$": 1.0} if len(text) > 1 else {"a": 0.5, "b": 0.5})
    outs = search(["1", "2"], lambda problem: best_of_n(problem, n=8, max_tokens=2), policy,
                  verifiers={"verifier": Composed(parts)})  # fmt: skip
    rows = [
        result_row(Question(i, "", str(i)), out, [c.canonical == "a" for c in out.answers])
        for i, out in enumerate(outs)
    ]
    text = verifier_report([json.loads(json.dumps(row)) for row in rows])
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert lines["sure"][3].startswith("100.0%")  # accepts all that is wrong
    assert lines["knows"][3].startswith("0.0%")
    assert lines["verifier"][1:3] == ["0.000", "1.000"]
    assert (
        verifier_report([{**row, "candidates": [c for c in row["candidates"] if c["right"]]} for row in rows]) is None
    )
    assert verifier_report([{"error": "none"}]) is None
