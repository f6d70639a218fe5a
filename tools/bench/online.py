"""A step of GRPO: samples, rewards, update; against TRL's GRPOTrainer on transformers' generate.

Both draw 2 x 8 samples of exactly 64 tokens after prompts of 64, score them by a function of the text, and make one
update. The step's time is the whole of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from common import Task

PROMPTS, SAMPLES, LENGTH, NEW, STEPS = 2, 8, 64, 64, 4
REWARD = """\
import zlib

def digits(examples, completions):
    return [zlib.crc32(c.text.encode()) % 100 / 100 for c in completions]
"""


def prompts(folder: str) -> list[str]:
    """Texts of exactly 64 tokens."""
    from jaxpost.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    found = []
    for start in range(100, 100 + 7 * PROMPTS, 7):
        words = " ".join(f"item {chr(97 + (start + i) % 26)}" for i in range(200))
        text = tokenizer.decode(tokenizer.encode(words)[:LENGTH])
        assert len(tokenizer.encode(text)) == LENGTH
        found.append(text)
    return found


def run_torch(task: str, folder: str) -> dict[str, Any]:
    import datasets
    import transformers
    import trl

    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = datasets.Dataset.from_list([{"prompt": text} for text in prompts(folder)] * STEPS)
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        config = trl.GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW},
            max_steps=STEPS,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            beta=0.0,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=STEPS,
            disable_tqdm=True,
        )
        reward = lambda completions, **_: [zlib.crc32(text.encode()) % 100 / 100 for text in completions]  # noqa: E731
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=rows, processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
        # Generation comes before the callback's "begin" in some versions: the whole step is timed instead.
        inner, spans = trainer.training_step, []

        def step(*args: Any, **kwargs: Any) -> Any:
            spans.append(time.perf_counter())
            return inner(*args, **kwargs)

        trainer.training_step = step
        trainer.train()
        spans.append(time.perf_counter())
    return {"seconds": [b - a for a, b in zip(spans, spans[1:], strict=False)][1:]}


def run_jaxpost(task: str, folder: str) -> dict[str, Any]:
    from jaxpost.assemble.rl import train
    from jaxpost.config_check_rl import check_rl
    from jaxpost.config_io import loads

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        problems, reward = Path(out, "problems.jsonl"), Path(out, "reward.py")
        problems.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(folder)), encoding="utf-8")
        reward.write_text(REWARD, encoding="utf-8")
        config = loads(
            f"""
            method: rl
            model: {{path: {folder}}}
            prompts: {{kind: files, chat: false, sources: [{{path: {problems}}}]}}
            rollout: {{prompts: {PROMPTS}, samples: {SAMPLES}, max_tokens: {NEW}, min_tokens: {NEW}, rows: 16}}
            reward: {{parts: [{{kind: function, path: "{reward}:digits"}}]}}
            loss: {{kind: ppo, aggregate: token_mean}}
            learner: {{microbatch_rows: 2}}
            optim: {{kind: adamw, lr: 1e-5, schedule: {{kind: constant, warmup: 0}}}}
            train: {{steps: {STEPS}, save_every: 0}}
            run: {{dir: "{out}/run", export: false}}
            """
        )
        result = train(check_rl(config))
        lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = [json.loads(line)["time"] for line in lines][1:]
    best = min(times, key=lambda t: t["seconds"])
    split = {name: best[name] for name in ("rollout", "reward", "reference", "learner")}
    return {"seconds": [t["seconds"] for t in times], "compile": times[0]["compile_seconds"], "split": split}


TASKS = {
    "grpo": Task(
        f"GRPO step {PROMPTS}x{SAMPLES}, {LENGTH}+{NEW}",
        PROMPTS * SAMPLES * NEW,
        {"torch": 2.5},
        {"torch": run_torch, "jaxpost": run_jaxpost},
    )
}
