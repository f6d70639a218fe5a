"""Compiles training steps of Llama-8B for a TPU slice, on a machine without one, and reads what came out.

Run as a program: `python _aot.py CASE` compiles one case and prints its facts as one line of JSON. It wants a
process of its own, since it loads the TPU compiler.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections import Counter
from functools import partial
from typing import NamedTuple

GIB = 2**30
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
ROLES = ("calls", "to_apply", "body", "condition", "branch_computations", "called_computations")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


# Reading a compiled program


class Collective(NamedTuple):
    """One communication of a program, as one device sees it."""

    kind: str
    shape: tuple[int, ...]
    """Of the largest array it yields."""
    bytes: int
    times: int
    """How often one call of the program runs it: the product of the trip counts of the loops around it."""


def collectives(text: str, unknown: int | None = None) -> list[Collective]:
    """Every collective of an optimised HLO module; pieces of one asynchronous collective count once."""
    bodies = dict(_computations(text))
    times = _multiplicities(bodies, unknown)
    found: dict[tuple[str, str], Collective] = {}
    for name, lines in bodies.items():
        for line in lines:
            match = re.match(rf"(?:ROOT )?%\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
            if not match:
                continue
            arrays = [
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            ]
            dtype, shape = max(arrays, key=lambda a: math.prod(a[1]) * BYTES.get(a[0], 4))
            channel = re.search(r"channel_id=(\d+)", line)
            key = (match[2], channel[1] if channel else f"{name} {line}")
            one = Collective(match[2], shape, math.prod(shape) * BYTES.get(dtype, 4), times[name])
            # A piece may run in each turn of an inner loop that hides the communication: the start does not.
            found[key] = min(found.get(key, one), one, key=lambda c: (c.times, -c.bytes))
    return list(found.values())


def _computations(text: str):
    """(name, instruction lines) of each computation; the entry is called ENTRY."""
    name, lines = "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
        if head:
            name, lines = "ENTRY" if head[1] else head[2], []
        elif line == "}":
            yield name, lines
        elif name:
            lines.append(line.strip())


def _multiplicities(bodies: dict[str, list[str]], unknown: int | None = None) -> Counter:
    """How often each computation runs in one call of the program; `unknown`: turns of a loop that the text lacks."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in bodies}
    for name, lines in bodies.items():
        for line in lines:
            loop = re.search(r"while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line)
            trips = _trips(bodies[loop[1]], unknown) if loop else 1
            for role, names in re.findall(rf"({'|'.join(ROLES)})=(%[\w.-]+|\{{[^}}]*\}})", line):
                for callee in set(re.findall(r"%([\w.-]+)", names)):
                    calls[name].append((callee, trips if role == "body" else 1))
    times: Counter = Counter({"ENTRY": 1})
    for name in reversed(list(bodies)):  # callers stand after what they call
        for callee, trips in calls[name]:
            times[callee] += times[name] * trips
    return times


def _trips(condition: list[str], unknown: int | None = None) -> int:
    """The bound of a loop that counts from 0 to a constant, as scans do; 1 for any other loop.

    A bound known only when the program runs is the loss's: the chunks that hold trained tokens, at most all of them.
    """
    if not any("direction=LT" in line for line in condition):
        return 1
    bounds = [int(m[1]) for line in condition if (m := re.search(r"= [su]32\[\]\S* constant\((\d+)\)", line))]
    return bounds[0] if len(bounds) == 1 else 1 if bounds else unknown or ROWS * LENGTH // CHUNK


def summary(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Per kind: collectives in the program, how often they run in a step, GiB they yield in a step."""
    table = {kind: {"in_program": 0, "per_step": 0, "gib_per_step": 0.0} for kind in KINDS}
    for c in found:
        row = table[c.kind]
        row["in_program"] += 1
        row["per_step"] += c.times
        row["gib_per_step"] += c.times * c.bytes / GIB
    return {kind: row for kind, row in table.items() if row["in_program"]}


# Compiling for a slice


def slice_devices(topology: str = "v5e:4x4"):
    """The devices of a TPU slice that is not there."""
    from jax.experimental import topologies

    x, y = (int(n) for n in topology.split(":")[1].split("x"))
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology,
        chip_config_name="default",
        chips_per_host_bounds=(min(x, 2), min(y, 2), 1),
        num_slices=1,
    ).devices


CASES = {
    "sft_fsdp16": {"mesh_sizes": {"fsdp": 16}},
    "grpo_fsdp8_tensor2": {"mesh_sizes": {"fsdp": 8, "tensor": 2}, "method": "rl"},
    "lora_fsdp16": {"mesh_sizes": {"fsdp": 16}, "lora": True},
    "dpo_fsdp16": {"mesh_sizes": {"fsdp": 16}, "method": "preference"},
}
SCORING = {"rescore_fsdp16": {"mesh_sizes": {"fsdp": 16}}}
DECODING = {
    "decode_tensor8": {"mesh_sizes": {"tensor": 8}},
    "decode_data4_tensor4": {"mesh_sizes": {"data": 4, "tensor": 4}, "topology": "v5e:4x4"},
}
LAYERS, ROWS, LENGTH, CHUNK = 32, 16, 2048, 4096
ANSWERS, CONTEXT, PAGE = 64, 4096, 64


def llama_8b():
    """The shape of Llama 3.1 8B."""
    from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig

    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0)
    return ModelConfig(
        family="llama",
        vocab_size=128_256,
        width=4096,
        mlp_width=14_336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        stacks=(StackConfig(repeats=LAYERS, period=(BlockConfig(rope=rope),)),),
        max_positions=131_072,
        tie_embeddings=False,
    )


def lower_step(mesh_sizes: dict[str, int], *, lora: bool = False, method: str = "sft"):
    """The jitted training step of 16 x 2048 tokens, lowered for a v5e-16: AdamW, bfloat16 computation.

    Full fine-tuning keeps parameters and moments in float32; LoRA has a bfloat16 base and float32 factors.
    """
    import jax
    import jax.numpy as jnp

    from jaxpost import sharding
    from jaxpost.adapters import lora as adapters
    from jaxpost.adapters.bind import bind_policy
    from jaxpost.config import AdamWSection, LoRASection
    from jaxpost.models.table import abstract_params, axes_tree
    from jaxpost.models.transformer import build_model
    from jaxpost.train.optim import make_optimizer
    from jaxpost.train.step import init_state, make_train_step

    mesh = sharding.make_mesh(mesh_sizes, slice_devices())
    model = build_model(llama_8b(), sharding.make_constrain(mesh), compute_dtype=jnp.bfloat16, mesh=mesh)
    base = abstract_params(model.table, jnp.bfloat16 if lora else jnp.float32)
    base_places = sharding.param_shardings(axes_tree(model.table), mesh, base)
    loss_fn, names, batch = METHODS[method](model, mesh)
    hyper = dict.fromkeys(names, jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh)))
    frozen, trained, places = {}, base, base_places
    if lora:
        new = partial(adapters.init, table=model.table, section=LoRASection())
        trained, scales = jax.eval_shape(new, jax.random.key(0))
        places = sharding.param_shardings(adapters.axes_tree(model.table, trained), mesh, trained)
        whole = jax.tree.map(lambda _: sharding.replicated(mesh), scales)
        frozen = {"base": _placed(base, base_places), "scales": _placed(scales, whole)}
        loss_fn = bind_policy(loss_fn)
    optimizer, _ = make_optimizer(AdamWSection(), 1000)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), {"policy": trained})
    state_places = sharding.state_shardings(state, {"policy": places}, mesh)
    step = make_train_step(sharding.pinned(loss_fn, {"policy": places}), optimizer)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=sharding.replicated(mesh))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_places, None))
    return jitted.lower(_placed(state, state_places), frozen, batch, key, hyper)


def of_sft(model, mesh):
    """Loss, names of its scalars, and a batch: supervised."""
    from jaxpost.losses.supervised import cross_entropy

    return partial(cross_entropy, model, chunk_tokens=CHUNK), (), rows_of_tokens(mesh)


def of_rl(model, mesh):
    """The same of GRPO: clipped ratios, a KL from the reference's log-probabilities, an importance correction."""
    from jaxpost.losses.aggregate import sequence_mean
    from jaxpost.losses.correction import truncated
    from jaxpost.losses.kl import k3, plain
    from jaxpost.losses.policy import policy_gradient

    methods = {"kl": plain(k3), "correction": truncated(cap=2.0), "aggregate": sequence_mean}
    loss = partial(policy_gradient, model, **methods, chunk_tokens=CHUNK)
    return loss, ("clip_low", "clip_high", "kl_coef", "temperature"), rows_of_samples(mesh)


def of_preference(model, mesh):
    """The same of DPO with cached reference log-probabilities, a pair in every row."""
    from jaxpost.assemble.preference_losses import make_preference_loss, preference_hyper
    from jaxpost.config_preference_losses import DPOLoss

    losses = (DPOLoss(),)
    loss = make_preference_loss(losses, model, mesh, chunk_tokens=CHUNK // mesh.size)
    return loss, tuple(preference_hyper(losses)), rows_of_pairs(mesh)


METHODS = {"sft": of_sft, "rl": of_rl, "preference": of_preference}


def rows_of_pairs(mesh):
    """A batch of pairs, each side behind its own copy of the prompt, as splash attention reads them."""
    import jax
    import jax.numpy as jnp

    from jaxpost.sharding import batch_sharding
    from jaxpost.types import AnswerBatch

    table = _placed(jax.ShapeDtypeStruct((ROWS, 2), jnp.int32), batch_sharding(mesh))
    strengths = _placed(jax.ShapeDtypeStruct((ROWS, 2), jnp.float32), batch_sharding(mesh))
    batch = rows_of_tokens(mesh)
    return AnswerBatch(*batch, groups=table, ranks=table, strengths=strengths, ref_logprobs=batch.weights)


def rows_of_tokens(mesh):
    """A supervised batch."""
    import jax
    import jax.numpy as jnp

    from jaxpost.sharding import batch_sharding
    from jaxpost.types import TokenBatch

    ints, rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    batch = TokenBatch(ints, ints, ints, jax.ShapeDtypeStruct(ints.shape, jnp.float32), rows)
    return _placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))


def rows_of_samples(mesh):
    """A batch of the policy's samples, with the log-probabilities of learner, sampler and reference."""
    from jaxpost.types import RolloutBatch

    batch = rows_of_tokens(mesh)
    known = dict.fromkeys(("old_logprobs", "sampler_logprobs", "ref_logprobs"), batch.weights)
    return RolloutBatch(*batch, advantages=batch.weights, **known)


def lower_rescore(mesh_sizes: dict[str, int]):
    """Log-probabilities of the policy (float32) and the reference (bfloat16) for 16 x 2048 tokens in two pieces."""
    import jax
    import jax.numpy as jnp

    from jaxpost import sharding
    from jaxpost.losses.rescore import logprobs, rescore
    from jaxpost.models.table import abstract_params, axes_tree
    from jaxpost.models.transformer import build_model

    mesh = sharding.make_mesh(mesh_sizes, slice_devices())
    model = build_model(llama_8b(), sharding.make_constrain(mesh), compute_dtype=jnp.bfloat16, mesh=mesh)
    policy, reference = (abstract_params(model.table, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    axes = axes_tree(model.table)
    policy, reference = (_placed(x, sharding.param_shardings(axes, mesh, x)) for x in (policy, reference))
    said = partial(logprobs, model, chunk_tokens=CHUNK)
    functions = (
        lambda params, frozen, batch, hyper: {"logprobs": said(params, batch, hyper)},
        lambda params, frozen, batch, hyper: {"reference": said(frozen, batch, hyper)},
    )
    run = lambda params, frozen, batch: rescore(functions, params, frozen, batch, {}, pieces=1)  # noqa: E731
    jitted = jax.jit(run, out_shardings=sharding.replicated(mesh))
    return jitted.lower(policy, reference, rows_of_samples(mesh))


def lower_decode(mesh_sizes: dict[str, int], topology: str = "v5e:2x4"):
    """A chunk of decoding, bfloat16 throughout, lowered for a slice: every row with pages for the whole context."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpost import sharding
    from jaxpost.generate import programs
    from jaxpost.generate.params import SamplingParams
    from jaxpost.generate.rows import pack
    from jaxpost.models.pages import Tables, init_pools, places
    from jaxpost.models.table import abstract_params, axes_tree
    from jaxpost.models.transformer import build_model

    mesh = sharding.make_mesh(mesh_sizes, slice_devices(topology))
    model = build_model(llama_8b(), sharding.make_constrain(mesh), compute_dtype=jnp.bfloat16, mesh=mesh)
    params = abstract_params(model.table, jnp.bfloat16)
    params = _placed(params, sharding.param_shardings(axes_tree(model.table), mesh, params))
    parts = sharding.row_shards(mesh)
    count = parts * (1 + ANSWERS // parts * CONTEXT // PAGE)
    pools = jax.eval_shape(partial(init_pools, model.config, pages=count, page_size=PAGE, dtype=jnp.bfloat16))
    where = places(pools, mesh)
    ints, row = np.zeros((ANSWERS, CONTEXT), np.int32), np.zeros(ANSWERS, np.int32)
    rows = programs.Rows(ints, row, row, row, row > 0, np.zeros((ANSWERS, 2), np.uint32))
    table = np.zeros((ANSWERS, CONTEXT // PAGE), np.int32)
    wishes = pack([SamplingParams()] * ANSWERS, vocab_size=model.config.vocab_size, eos_ids=[0, 1])
    inputs = (Tables(table, table), rows, wishes)
    inputs = _placed(inputs, jax.tree.map(lambda _: sharding.batch_sharding(mesh), inputs))
    run = partial(programs.decode, model, max_steps=32, mesh=mesh)
    jitted = jax.jit(run, donate_argnums=1, out_shardings=(where, sharding.replicated(mesh)))
    return jitted.lower(params, _placed(pools, where), *inputs, np.int32(32), np.int32(0))


def _placed(tree, places):
    import jax

    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)


def main(case: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jaxpost.ops import platform

    start = time.monotonic()
    with platform.target("tpu"):
        if case in SCORING:
            lowered = lower_rescore(**SCORING[case])
        else:
            lowered = lower_decode(**DECODING[case]) if case in DECODING else lower_step(**CASES[case])
        compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if folder := os.environ.get("JAXPOST_AOT_TEXT"):
        with open(os.path.join(folder, f"{case}.txt"), "w") as file:
            file.write(text)
    from _traffic import traffic

    # Of a chunk of decoding one token's pass is counted.
    found = collectives(text, 1 if case in DECODING else None)
    moved = traffic(text)
    facts = {
        "seconds": time.monotonic() - start,
        "arguments": memory.argument_size_in_bytes / GIB,
        "temporaries": memory.temp_size_in_bytes / GIB,
        "hbm": (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
            - memory.alias_size_in_bytes
        )
        / GIB,
        "kernels": re.findall(r'%([a-z_]+)\S* = [^\n]*custom_call_target="tpu_custom_call"', text),
        "collectives": [c._asdict() for c in found],
        "summary": summary(found),
        "aliased": memory.alias_size_in_bytes / GIB,
        "read_once": sum(n for name, n in moved.items() if name.startswith("ENTRY")) / GIB,
        "read_in_loops": sum(n for name, n in moved.items() if not name.startswith("ENTRY")) / GIB,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
