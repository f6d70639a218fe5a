import jax
import jax.numpy as jnp
import pytest
from tiny_models import CONFIGS, GEMMA, rows

from jaxpost.models import cost
from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.transformer import build_model

SMOLLM2 = ModelConfig(
    family="llama", vocab_size=49152, width=576, mlp_width=1536, heads=9, kv_heads=3, head_dim=64, max_positions=8192,
    stacks=(StackConfig(repeats=30, period=(BlockConfig(rope=RopeConfig()),)),),
)  # fmt: skip


def test_smollm2_135m_by_hand():
    """134,515,008 parameters, as published; 6 operations a matrix element and 12 a key, head and channel."""
    assert cost.param_count(SMOLLM2) == 134_515_008
    layer = 576 * 576 + 2 * 576 * 192 + 576 * 576 + 3 * 576 * 1536
    matrices = 30 * layer + 49152 * 576
    keys = (1 + 1024) / 2
    assert cost.flops_per_token(SMOLLM2, 1024, trained="none") == 2 * matrices + 30 * 4 * 576 * keys
    assert cost.flops_per_token(SMOLLM2, 1024, trained="full") == 6 * matrices + 30 * 12 * 576 * keys
    # A frozen matrix has no gradient of its own; attention's products have both.
    assert cost.flops_per_token(SMOLLM2, 1024, trained="lora") == 4 * matrices + 30 * 12 * 576 * keys


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    model = build_model(CONFIGS[name])
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert cost.param_count(CONFIGS[name]) == sum(x.size for x in jax.tree.leaves(params))
    assert cost.param_bytes(CONFIGS[name], jnp.bfloat16) == 2 * cost.param_count(CONFIGS[name])


def test_windows_are_counted_key_by_key():
    length, window = 10, 3
    seen = [min(t + 1, window) for t in range(length)]
    assert cost.attended(length, window) == sum(seen) / length
    assert cost.attended(2, window) == 1.5
    local, whole = (4 * GEMMA.heads * GEMMA.head_dim * cost.attended(length, w) for w in (window, None))
    assert cost.attention_flops_per_token(GEMMA, length) == pytest.approx(3 * local + 2 * whole)


def test_cache_bytes_are_those_of_the_arrays():
    cache = jax.eval_shape(lambda: build_model(GEMMA).init_cache(3, 11, jnp.bfloat16))
    arrays = jax.tree.leaves((cache.keys, cache.values))
    assert cost.cache_bytes(GEMMA, 3, 11, jnp.bfloat16) == sum(x.size * x.dtype.itemsize for x in arrays)


def test_forward_flops_agree_with_xla():
    """One layer, where XLA's count (a scan's body once) is the whole program's; it also counts elementwise work."""
    config = ModelConfig(
        family="llama", vocab_size=256, width=128, mlp_width=384, heads=4, kv_heads=2, head_dim=32, max_positions=64,
        stacks=(StackConfig(repeats=1, period=(BlockConfig(rope=RopeConfig()),)),),
    )  # fmt: skip
    model, inputs = build_model(config), rows(32, 32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    program = jax.jit(lambda p: model.unembed(p, model.forward(p, inputs).hidden)).lower(params).compile()
    ours = 64 * cost.flops_per_token(config, 32, trained="none")
    assert program.cost_analysis()["flops"] == pytest.approx(ours, rel=0.1)
