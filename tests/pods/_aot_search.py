"""A step beam's programs, an 8B policy and an 8B process model on one v5e-16, compiled by the TPU compiler.

Run in a process of its own by test_aot_search.py; prints what the compiler says as JSON.
"""

import json
import os
import re
import time
from functools import partial

from _aot import GIB, _placed, llama_8b, slice_devices

MESH = {"data": 4, "tensor": 4}
PROMPTS, WIDTH, CONTEXT, PAGE, STEP = 8, 16, 4096, 64, 128
ROWS = PROMPTS * WIDTH
PAGES = 1 + PROMPTS * (CONTEXT // 4 + WIDTH * CONTEXT // 2) // PAGE // MESH["data"]
"""Of each part: prompts of a quarter of the context, and half of one for each of a prompt's texts."""


def lowered():
    """Name -> the lowered program: drawing a step, copying forks' last pages, the process model's new steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpost import sharding
    from jaxpost.generate import programs
    from jaxpost.generate.params import SamplingParams
    from jaxpost.generate.rows import pack
    from jaxpost.models import heads
    from jaxpost.models import pages as page_ops
    from jaxpost.models.pages import Tables, init_pools, places
    from jaxpost.models.table import abstract_params, axes_tree
    from jaxpost.models.transformer import build_model

    mesh = sharding.make_mesh(MESH, slice_devices())
    model = build_model(llama_8b(), sharding.make_constrain(mesh), compute_dtype=jnp.bfloat16, mesh=mesh)
    params = abstract_params(model.table, jnp.bfloat16)
    params = _placed(params, sharding.param_shardings(axes_tree(model.table), mesh, params))
    parts = sharding.row_shards(mesh)
    pools = jax.eval_shape(partial(init_pools, model.config, pages=parts * PAGES, page_size=PAGE, dtype=jnp.bfloat16))
    where, whole = places(pools, mesh), sharding.replicated(mesh)
    pools = _placed(pools, where)

    def rows(tree):
        return _placed(tree, jax.tree.map(lambda _: sharding.batch_sharding(mesh), tree))

    ints, row, keys = np.zeros((ROWS, CONTEXT), np.int32), np.zeros(ROWS, np.int32), np.zeros((ROWS, 2), np.uint32)
    table = np.zeros((ROWS, CONTEXT // PAGE), np.int32)
    tables = rows(Tables(table, table))
    wishes = rows(pack([SamplingParams()] * ROWS, vocab_size=model.config.vocab_size, eos_ids=[0, 1]))
    pause = rows(np.zeros((ROWS, model.config.vocab_size // 32), np.uint32))
    draw = jax.jit(
        partial(programs.decode, model, max_steps=32, mesh=mesh), donate_argnums=1, out_shardings=(where, whole)
    )
    decoding = rows(programs.Rows(ints, row, row, row, row > 0, keys))
    yield "draw", draw.lower(params, pools, tables, decoding, wishes, np.int32(32), np.int32(0), None, pause)
    fork = jax.jit(partial(page_ops.copy, config=model.config, mesh=mesh), donate_argnums=0, out_shardings=where)
    pairs = rows(np.zeros((parts, 2, ROWS // parts), np.int32))
    yield "fork", fork.lower(pools, pairs, pairs)
    read = jax.jit(
        partial(programs.measure, model, read=heads.score, fresh=False, mesh=mesh), donate_argnums=1,
        out_shardings=(where, whole),
    )  # fmt: skip
    part = rows(programs.Part(np.zeros((ROWS, STEP), np.int32), row, row))
    head = {"kernel": jax.ShapeDtypeStruct((model.config.width, 1), jnp.float32, sharding=whole)}
    yield "score", read.lower(params, pools, tables, part, rows(row[:, None]), head)


def main():
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    from jaxpost.ops import platform

    facts = {}
    with platform.target("tpu"):
        for name, program in lowered():
            start = time.monotonic()
            compiled = program.compile()
            memory, text = compiled.memory_analysis(), compiled.as_text()
            facts[name] = {
                "seconds": time.monotonic() - start,
                "arguments": memory.argument_size_in_bytes / GIB,
                "aliased": memory.alias_size_in_bytes / GIB,
                # What the compiler calls temporaries leaves out some of what lives during the program.
                "besides": (
                    max(
                        memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
                        memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
                    )
                    + memory.generated_code_size_in_bytes
                )
                / GIB,
                "kernels": sorted(set(re.findall(r'%([a-z_]+)\S* = [^\n]*custom_call_target="tpu_custom_call"', text))),
            }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
