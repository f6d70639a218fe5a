"""Speed and memory against PyTorch on this machine: the same model, batch, dtype and threads, in one run.

    make bench            # or: python tools/bench.py --tasks full,lora --rounds 3

Each measurement is a process of its own, the two libraries take turns (A B A B ...), each keeps its best
round, and the table prints the ratio torch / jaxpost: above 1 jaxpost is faster. Memory is the process's
peak resident size. Compile time is apart: it is paid once a run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

BATCH = {"full": (4, 256), "lora": (4, 256), "forward": (8, 256)}
TARGET = {"full": 1.15, "lora": 1.15, "forward": 1.2}
THREADS = "2"
STEPS = 4


def timed(step, steps: int = STEPS) -> list[float]:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def tokens(task: str, vocab: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab, BATCH[task]).astype("int32")


def run_torch(task: str, folder: str) -> dict:
    import torch
    import transformers

    torch.set_num_threads(int(THREADS))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(tokens(task, model.config.vocab_size)).long()
    if task == "forward":
        model.eval()

        def step():
            with torch.no_grad():
                model(ids)

        return {"compile": 0.0, "seconds": timed(step, STEPS + 1)[1:]}
    if task == "lora":
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"compile": 0.0, "seconds": timed(step, STEPS + 1)[1:]}


def run_jaxpost(task: str, folder: str) -> dict:
    import jax
    import numpy as np

    from jaxpost import assemble
    from jaxpost.config import AdamWSection, CrossEntropySection, FullSection, LoRASection, ModelSection
    from jaxpost.types import Inputs, TokenBatch

    pretrained = assemble.load_model(ModelSection(path=folder))
    ids = tokens(task, pretrained.config.vocab_size)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    ones = np.ones_like(ids)
    if task == "forward":

        def forward(params, inputs):
            return pretrained.model.unembed(params, pretrained.model.forward(params, inputs).hidden)

        arguments = (pretrained.load(), Inputs(ids, positions, ones))
        compiled, seconds = compile_timed(jax.jit(forward), *arguments)
        return {"compile": seconds, "seconds": timed(lambda: jax.block_until_ready(compiled(*arguments)))}

    training = assemble.make_training(
        pretrained,
        loss=CrossEntropySection(),
        adapter=LoRASection(rank=16) if task == "lora" else FullSection(),
        optim=AdamWSection(),
        num_steps=100,
    )
    batch = TokenBatch(ids, positions, ones, ones.astype(np.float32), np.arange(len(ids), dtype=np.int32))
    rest = (training.frozen, batch, jax.random.key(0), training.hyper)
    state = training.init_state()
    step, seconds = compile_timed(jax.jit(training.step, donate_argnums=0), state, *rest)

    def run():
        nonlocal state
        state, metrics = step(state, *rest)
        jax.block_until_ready(metrics)

    return {"compile": seconds, "seconds": timed(run, STEPS + 1)[1:]}


def compile_timed(jitted, *arguments):
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def measure(library: str, task: str, folder: str) -> dict:
    """Runs one measurement in its own process and returns what it printed."""
    env = dict(os.environ, OMP_NUM_THREADS=THREADS, JAX_PLATFORMS="cpu", PYTHONWARNINGS="ignore")
    command = [sys.executable, __file__, "--worker", library, "--tasks", task, "--model", folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{library} {task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(task: str, folder: str, rounds: int) -> str:
    best: dict[str, dict] = {}
    for _ in range(rounds):
        for library in ("torch", "jaxpost"):
            result = measure(library, task, folder)
            result["best"] = min(result["seconds"])
            if library not in best or result["best"] < best[library]["best"]:
                best[library] = result
    ours, theirs = best["jaxpost"], best["torch"]
    count = BATCH[task][0] * BATCH[task][1]
    return (
        f"| {task} {BATCH[task][0]}x{BATCH[task][1]} | {theirs['best']:.2f} s ({count / theirs['best']:.0f} tok/s) "
        f"| {ours['best']:.2f} s ({count / ours['best']:.0f} tok/s) | {theirs['best'] / ours['best']:.2f} "
        f"| {TARGET[task]:.2f} | {theirs['peak_gib']:.2f} | {ours['peak_gib']:.2f} | {ours['compile']:.1f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="full,lora,forward", help="comma-separated: full, lora, forward")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds of each library")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--worker", choices=["torch", "jaxpost"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run = run_torch if arguments.worker == "torch" else run_jaxpost
        result = run(arguments.tasks, arguments.model)
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result))
        return
    from jaxpost.weights.resolve import resolve_model

    folder = str(Path(resolve_model(arguments.model)))
    print("| float32, 2 threads | torch | jaxpost | torch / jaxpost | target | torch GiB | jaxpost GiB | compile |")
    print("|---|---|---|---|---|---|---|---|")
    for task in arguments.tasks.split(","):
        print(compare(task, folder, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
