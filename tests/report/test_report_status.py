"""How far a run came, as its page says it."""

import pytest
from synthetic_run import jsonl

from jaxpost.report.read import read_run
from jaxpost.report.summary import status

LIMITS = {"": True, ", samples: 65": True, ", samples: 64": False}
"""Of 100 steps, two of 4 problems x 8 samples are done: settings of `train` -> whether the run goes on."""


@pytest.mark.parametrize("limit", LIMITS)
def test_a_run_whose_samples_are_all_drawn_has_ended(limit, tmp_path):
    (tmp_path / "config.yaml").write_text(f"method: rl\nrollout: {{samples: 8}}\ntrain: {{steps: 100{limit}}}\n")
    jsonl(tmp_path / "metrics.jsonl", [{"step": step, "kind": "train", "problems": 4 * step} for step in (1, 2)])
    going_on = " (in progress, or stopped)" if LIMITS[limit] else ""
    assert status(read_run(tmp_path)) == f"2 of 100 steps{going_on}"
