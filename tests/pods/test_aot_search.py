"""A step beam of 8 prompts x 16 texts with an 8B policy and an 8B process model fits a v5e-16 slice."""

from pathlib import Path

import pytest
from _aot import BYTES, LAYERS, llama_8b
from _aot_search import CONTEXT, MESH, PAGE, PAGES, PROMPTS, WIDTH
from test_aot import HBM, compiler_says, needs_compiler

pytestmark = pytest.mark.slow


@needs_compiler
def test_a_step_beam_with_two_8b_models_fits_a_v5e_16(capsys):
    facts = compiler_says([Path(__file__).with_name("_aot_search.py")])
    config = llama_8b()
    layer = config.width * (2 * 4096 + 2 * 1024 + 3 * config.mlp_width + 2)
    weights = BYTES["bf16"] * (2 * config.vocab_size * config.width + LAYERS * layer) / MESH["tensor"] / 2**30
    page = 2 * BYTES["bf16"] * LAYERS * config.kv_heads * config.head_dim * PAGE / MESH["tensor"] / 2**30
    pool = PAGES * page
    # A cache of its own for every text would take twice what the pools do, and each of two models would have one.
    dense = PROMPTS * WIDTH * (CONTEXT // PAGE) / MESH["data"] * page
    held = 2 * (weights + pool)
    peak = held + max(f["besides"] for f in facts.values())
    with capsys.disabled():
        print(
            f"\nstep beam: {peak:.2f} GiB a chip: 2 x {weights:.2f} weights, 2 x {pool:.2f} pages ({dense:.2f} dense)",
            end="",
        )
        for name, f in facts.items():
            print(f"; {name} {f['besides']:.2f} GiB besides, compiled in {f['seconds']:.0f} s", end="")
        print()
    assert pool < 0.55 * dense
    assert peak < HBM
    for name in ("draw", "score"):
        # The process model has no use for the language model's head.
        unused = BYTES["bf16"] * config.vocab_size * config.width / MESH["tensor"] / 2**30 * (name == "score")
        assert weights + pool - unused < facts[name]["arguments"] + 0.01 < weights + pool - unused + 0.1
        assert facts[name]["aliased"] > 0.99 * pool, "no second pool"
    assert facts["fork"]["aliased"] > 0.99 * pool
    assert facts["fork"]["besides"] < 0.1
    assert facts["draw"]["kernels"] == ["paged_attention"]
