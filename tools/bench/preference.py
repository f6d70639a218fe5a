"""A step of DPO with reference log-probabilities computed before, against TRL's DPOTrainer with precomputed ones.

Both read the same two pairs: prompts of 64 tokens, answers of 192, all weights trained by AdamW, float32.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from typing import Any

import numpy as np
from common import Task, compile_timed, timed

PAIRS, PROMPT, ANSWER, STEPS = 2, 64, 192, 4


def pairs(vocab: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Prompt, chosen and rejected answer of each pair."""
    rng = np.random.default_rng(0)
    sizes = (PROMPT, ANSWER, ANSWER)
    return [tuple(rng.integers(10, vocab, size).astype("int32") for size in sizes) for _ in range(PAIRS)]


def run_torch(task: str, folder: str) -> dict[str, Any]:
    import datasets
    import torch
    import transformers
    import trl

    class Prepared(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {"prompt": "", "chosen": "", "rejected": "", **{n: x.tolist() for n, x in zip(names, pair, strict=True)}}
        for pair in pairs(model.config.vocab_size)
    ]
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        config = trl.DPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS + 1,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            precompute_ref_log_probs=True,
            activation_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=STEPS + 1,
            disable_tqdm=True,
        )
        trainer = Prepared(
            model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        inner, spans = trainer.training_step, []

        def step(*args: Any, **kwargs: Any) -> Any:
            spans.append(time.perf_counter())
            return inner(*args, **kwargs)

        trainer.training_step = step
        trainer.train()
        spans.append(time.perf_counter())
    return {"seconds": [b - a for a, b in itertools.pairwise(spans)][1:]}


def batch(vocab: int, share: bool) -> Any:
    """Both pairs as rows, each behind one copy of its prompt or each side behind its own."""
    from jaxpost.types import AnswerBatch

    width = PROMPT - 1 + 2 * (1 + ANSWER) if share else 2 * (PROMPT + ANSWER)
    tokens, positions, segments, prefixes = np.zeros((4, PAIRS, width), np.int32)
    weights = np.zeros((PAIRS, width), np.float32)
    groups, ranks = np.zeros((2, PAIRS, 3 if share else 2), np.int32)
    for row, (prompt, *sides) in enumerate(pairs(vocab)):
        at, head = 0, PROMPT - 1 if share else 0
        tokens[row, :head], positions[row, :head], segments[row, :head] = prompt[:head], np.arange(head), int(share)
        at = head
        for rank, answer in enumerate(sides):
            text = np.concatenate([prompt[head:], answer])
            end, column = at + len(text), rank + int(share)
            tokens[row, at:end], positions[row, at:end] = text, np.arange(head, head + len(text))
            segments[row, at:end], prefixes[row, at:end] = column + 1, int(share)
            weights[row, end - ANSWER : end] = 1.0
            groups[row, column], ranks[row, column] = 1, rank
            at = end
    return AnswerBatch(
        tokens, positions, segments, weights, np.arange(PAIRS, dtype=np.int32), groups, ranks,
        np.ones(groups.shape, np.float32), ref_logprobs=np.zeros_like(weights), prefix_ids=prefixes if share else None,
    )  # fmt: skip


def run_jaxpost(task: str, folder: str) -> dict[str, Any]:
    import jax

    from jaxpost import assemble
    from jaxpost.assemble.preference_losses import make_preference_loss, preference_hyper
    from jaxpost.config import AdamWSection, FullSection, ModelSection
    from jaxpost.config_preference_losses import DPOLoss
    from jaxpost.losses import rescore

    pretrained = assemble.load_model(ModelSection(path=folder))
    losses = (DPOLoss(),)
    training = assemble.make_training(
        pretrained,
        loss=make_preference_loss(losses, pretrained.model, pretrained.mesh),
        adapter=FullSection(),
        optim=AdamWSection(lr=1e-6),
        num_steps=100,
        hyper=preference_hyper(losses),
    )
    rows = batch(pretrained.config.vocab_size, share=task == "dpo")
    state = training.init_state()
    score = jax.jit(lambda params: rescore.logprobs(pretrained.model, params, rows, {}))
    rows = rows._replace(ref_logprobs=np.asarray(score(state.params["policy"])))
    forward = min(timed(lambda: jax.block_until_ready(score(state.params["policy"])), 2))
    rest = (training.frozen, rows, jax.random.key(0), training.hyper)
    step, seconds = compile_timed(jax.jit(training.step, donate_argnums=0), state, *rest)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, *rest)
        jax.block_until_ready(metrics)

    found = timed(run, STEPS)
    split = {"forward pass": forward, "recomputation, backward pass, AdamW": min(found) - forward}
    return {"compile": seconds, "seconds": found, "split": split}


BOTH = {"torch": run_torch, "jaxpost": run_jaxpost}
TOKENS = PAIRS * 2 * (PROMPT + ANSWER)
TASKS = {
    "dpo": Task(f"DPO step {PAIRS} pairs x {PROMPT + ANSWER}", TOKENS, {"torch": 1.6}, BOTH),
    "dpo_apart": Task(f"DPO step {PAIRS} pairs x {PROMPT + ANSWER}, prompts not shared", TOKENS, {}, BOTH),
}
