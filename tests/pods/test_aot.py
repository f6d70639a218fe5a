"""Llama-8B's training steps, compiled by the TPU compiler for a v5e-16 slice that is not there.

What the compiler says is the truth about memory, kernels and communication on that slice; speed it does not say.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from _aot import (
    ANSWERS,
    BYTES,
    CASES,
    CONTEXT,
    DECODING,
    LAYERS,
    PAGE,
    SCORING,
    Collective,
    collectives,
    llama_8b,
    summary,
)

PROGRAM = Path(__file__).with_name("_aot.py")
HBM = 15.75
"""GiB that a program can use of a v5e chip's 16."""

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install 'jaxpost[tpu]' (Linux x86-64; no TPU needed)",
)


def compiler_says(command):
    """The last line of JSON that a Python program prints which may load the TPU compiler."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parents[2]), str(PROGRAM.parent)]),
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # tests run side by side; no chip is there to quarrel about
    }
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def ask(case):
    """The facts of one case, compiled in a process of its own."""
    facts = compiler_says([PROGRAM, case])
    found = [Collective(c["kind"], tuple(c["shape"]), c["bytes"], c["times"]) for c in facts["collectives"]]
    return facts, found


def gathers_of_a_stack(found, layers, largest_kernel):
    """All-gathers (and all-reduces) of more than one layer's largest matrix, or that lead with every layer."""
    return [
        c
        for c in found
        if c.kind in ("all-gather", "all-reduce")
        and (math.prod(c.shape) > largest_kernel or (len(c.shape) > 2 and c.shape[0] == layers))
    ]


# Two minutes of CPU each: the newest jax compiles what matters most.
SOME = CASES if jax.__version_info__ < (0, 11) else [case for case in CASES if "tensor" not in case]


@needs_compiler
@pytest.mark.parametrize("case", SOME)
def test_llama_8b_fits_a_v5e_16(case, capsys):
    facts, found = ask(case)
    with capsys.disabled():
        print(f"\n{case}: {facts['hbm']:.2f} GiB a chip ({facts['arguments']:.2f} state and batch), ", end="")
        print(f"{facts['seconds']:.0f} s; GiB a step yielded by", end=" ")
        print(", ".join(f"{k} {v['gib_per_step']:.2f} ({v['per_step']}x)" for k, v in facts["summary"].items()))
    assert facts["hbm"] < (5 if "lora" in case else 12.5) < HBM
    config = llama_8b()
    width = config.width
    # Parameters and two moments in float32, or a bfloat16 base, over 16 chips: what is there besides is small.
    scalars = 2 * config.vocab_size * width + LAYERS * (
        width * (2 * 4096 + 2 * 1024 + 3 * config.mlp_width) + 2 * width
    )
    state = scalars * (2 if "lora" in case else 12) / 16 / 2**30
    assert state < facts["arguments"] < state + 0.4
    # The kernel runs in the forward pass, again in the recomputation, and in both halves of the backward pass.
    assert {name.split("_")[2] for name in facts["kernels"]} == {"fwd", "dkv", "dq"}
    assert all(name.startswith("splash_mha") for name in facts["kernels"])
    assert gathers_of_a_stack(found, LAYERS, width * config.mlp_width) == []
    # Something of every layer's matrices does travel, once per pass at least.
    assert sum(c.bytes * c.times for c in found) > 2 * 2 * LAYERS * 3 * width * config.mlp_width / 2
    # The head's gradient is summed where it lies: no chunk of the loss sends it anywhere.
    head = config.vocab_size * width * BYTES["bf16"] / 16
    assert not [c for c in found if c.times > 1 and c.times < LAYERS and c.bytes >= head]


@needs_compiler
@pytest.mark.parametrize("case", DECODING)
def test_decoding_llama_8b_fits_a_slice_and_reads_little_more_than_weights_and_pages(case, capsys):
    facts, found = ask(case)
    config, sizes = llama_8b(), DECODING[case]["mesh_sizes"]
    width, copies, chips = config.width, sizes.get("data", 1), math.prod(sizes.values())
    layer = width * (2 * 4096 + 2 * 1024 + 3 * config.mlp_width)
    # Of the embedding a step reads one row a token; all other weights once.
    weights = 2 * (config.vocab_size * width + LAYERS * layer) * copies / chips / 2**30
    table = 2 * config.vocab_size * width * copies / chips / 2**30
    pages = 2 * 2 * LAYERS * config.kv_heads * config.head_dim * (ANSWERS * CONTEXT + copies * PAGE) / chips / 2**30
    with capsys.disabled():
        print(f"\n{case}: {facts['hbm']:.2f} GiB a chip ({weights + table:.2f} weights, {pages:.2f} pages)", end="")
        print(f", {facts['seconds']:.0f} s; a step reads {facts['read_in_loops']:.2f} GiB beside the pages, ", end="")
        print(f"a chunk once {facts['read_once']:.2f}")
    assert weights + table + pages < facts["arguments"] < weights + table + pages + 0.05
    assert facts["hbm"] < facts["arguments"] + 0.5 < HBM
    assert facts["aliased"] >= pages, "no second pool"
    # The kernel reads a row's pages once, where they lie; an instruction that copied or gathered a pool, or sliced a
    # layer's weights into memory, would count here.
    assert facts["kernels"] == ["paged_attention"]
    assert weights <= facts["read_in_loops"] < 1.15 * weights
    assert facts["read_once"] < 0.5 * weights
    # Each layer sums its two products over the tensor axis, and nothing else; no weights move at all.
    hidden = 2 * ANSWERS // copies * width
    per_layer = [c for c in found if c.times >= LAYERS]
    assert [(c.kind, c.bytes, c.times) for c in per_layer] == 2 * [("all-reduce", hidden, LAYERS)]
    logits = 4 * ANSWERS * config.vocab_size // chips
    assert max(c.bytes for c in found) <= max(logits, 4 * ANSWERS * CONTEXT)


@needs_compiler
@pytest.mark.parametrize("case", SCORING)
def test_what_networks_say_of_llama_8bs_samples_fits_a_v5e_16(case, capsys):
    """Policy and reference in one program, next to the moments that wait on the chips meanwhile."""
    facts, found = ask(case)
    config = llama_8b()
    layer = config.width * (2 * 4096 + 2 * 1024 + 3 * config.mlp_width + 2)
    scalars = 2 * config.vocab_size * config.width + LAYERS * layer
    networks, moments = scalars * (4 + 2) / 16 / 2**30, scalars * 8 / 16 / 2**30
    with capsys.disabled():
        print(f"\n{case}: {facts['hbm']:.2f} GiB a chip beside {moments:.2f} of moments, {facts['seconds']:.0f} s")
    assert networks < facts["arguments"] < networks + 0.1
    assert facts["hbm"] + moments < 13 < HBM
    assert {name.split("_")[2] for name in facts["kernels"]} == {"fwd"}
    assert gathers_of_a_stack(found, LAYERS, config.width * config.mlp_width) == []


WHOLE_STACK = """
import json
import jax, jax.numpy as jnp
from _aot import slice_devices, collectives
from jaxpost import sharding
mesh = sharding.make_mesh({"fsdp": 4}, slice_devices("v5e:2x2"))
constrain = sharding.make_constrain(mesh)
def f(w, x):
    w = constrain(w, ("layers", None, None))
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
place = lambda shape, axes: jax.ShapeDtypeStruct(
    shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, sharding.spec(axes, mesh=mesh)))
x = place((64, 512), ("batch", None))
text = jax.jit(f).lower(place((6, 512, 512), ("layers", "embed", "mlp")), x).compile().as_text()
print(json.dumps(collectives(text)))
"""


@needs_compiler
def test_a_gathered_stack_would_be_seen():
    found = [Collective(kind, tuple(shape), *rest) for kind, shape, *rest in compiler_says(["-c", WHOLE_STACK])]
    assert gathers_of_a_stack(found, 6, 512 * 512)


HLO = """\
HloModule small

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, dimensions={0}
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]) collective-permute-start(%x), channel_id=2
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %done)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> f32[] {
  %x = bf16[4,8]{1,0} parameter(0)
  %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %y = f32[2,3]{1,0} fusion(%loop), kind=kLoop, calls=%add
  ROOT %all-reduce.7 = (f32[], f32[2,3]{1,0}) all-reduce(%z, %y), channel_id=3, to_apply=%add
}
"""


def test_collectives_are_read_with_their_loops():
    found = {c.kind: c for c in collectives(HLO)}
    assert found == {
        "all-gather": Collective("all-gather", (16, 8), 256, 5),
        "collective-permute": Collective("collective-permute", (4, 8), 64, 5),
        "all-reduce": Collective("all-reduce", (2, 3), 24, 1),
    }
    assert summary(list(found.values()))["all-gather"] == {
        "in_program": 1,
        "per_step": 5,
        "gib_per_step": 5 * 256 / 2**30,
    }
