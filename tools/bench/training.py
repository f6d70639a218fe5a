"""Training steps and the forward pass: SmolLM2 against transformers' model, torch.optim.AdamW and PEFT."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Task, compile_timed, timed

STEPS = 4
SHAPES = {"full": (4, 256), "lora": (4, 256), "forward": (8, 256)}


def batch(task: str, vocab: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, SHAPES[task]).astype("int32")


def run_torch(task: str, folder: str) -> dict[str, Any]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(batch(task, model.config.vocab_size)).long()
    if task == "forward":
        model.eval()

        def step():
            with torch.no_grad():
                model(ids)

        return {"seconds": timed(step, STEPS)}
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

    return {"seconds": timed(step, STEPS)}


def run_jaxpost(task: str, folder: str) -> dict[str, Any]:
    import jax

    from jaxpost import assemble
    from jaxpost.config import AdamWSection, CrossEntropySection, FullSection, LoRASection, ModelSection
    from jaxpost.types import Inputs, TokenBatch

    pretrained = assemble.load_model(ModelSection(path=folder))
    ids = batch(task, pretrained.config.vocab_size)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    ones = np.ones_like(ids)
    if task == "forward":

        def forward(params, inputs):
            return pretrained.model.unembed(params, pretrained.model.forward(params, inputs).hidden)

        arguments = (pretrained.load(), Inputs(ids, positions, ones))
        compiled, seconds = compile_timed(jax.jit(forward), *arguments)
        return {"compile": seconds, "seconds": timed(lambda: jax.block_until_ready(compiled(*arguments)), STEPS)}

    training = assemble.make_training(
        pretrained,
        loss=assemble.make_loss(CrossEntropySection(), pretrained.model, pretrained.mesh),
        adapter=LoRASection(rank=16) if task == "lora" else FullSection(),
        optim=AdamWSection(),
        num_steps=100,
    )
    tokens = TokenBatch(ids, positions, ones, ones.astype(np.float32), np.arange(len(ids), dtype=np.int32))
    rest = (training.frozen, tokens, jax.random.key(0), training.hyper)
    state = training.init_state()
    step, seconds = compile_timed(jax.jit(training.step, donate_argnums=0), state, *rest)

    def run():
        nonlocal state
        state, metrics = step(state, *rest)
        jax.block_until_ready(metrics)

    return {"compile": seconds, "seconds": timed(run, STEPS)}


BOTH = {"torch": run_torch, "jaxpost": run_jaxpost}


def task(name: str, title: str, target: float) -> Task:
    rows, length = SHAPES[name]
    return Task(f"{title} {rows}x{length}", rows * length, {"torch": target}, BOTH)


TASKS = {
    "full": task("full", "full step", 1.15),
    "lora": task("lora", "LoRA step", 1.15),
    "forward": task("forward", "forward", 1.2),
}
