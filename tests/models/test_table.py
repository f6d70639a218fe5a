import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, GEMMA, LLAMA

from jaxpost.models.table import abstract_params, axes_tree, flatten, nest, parameter_table
from jaxpost.models.transformer import build_model
from jaxpost.ops.linear import LoRA


@pytest.mark.parametrize("name", CONFIGS)
def test_init_makes_exactly_what_the_table_says(name):
    model = build_model(CONFIGS[name])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.bfloat16))
    assert params == abstract_params(model.table, jnp.bfloat16)
    axes = flatten(axes_tree(model.table))
    assert {path: len(leaf.shape) for path, leaf in flatten(params).items()} == {p: len(a) for p, a in axes.items()}


def test_which_parameters_an_architecture_has():
    def modules(config):
        return {spec.path[-2] for spec in parameter_table(config)}

    linears = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert modules(LLAMA) == linears | {"embed", "final_norm", "attn_norm", "mlp_norm"}
    assert modules(GEMMA) - modules(LLAMA) == {"q_norm", "k_norm", "attn_post_norm", "mlp_post_norm"}
    biases = {spec.path[-2] for spec in parameter_table(CONFIGS["qwen"]) if spec.path[-1] == "bias"}
    assert biases == linears
    assert ("lm_head", "kernel") in {spec.path for spec in parameter_table(CONFIGS["qwen"])}


def test_norms_start_as_the_identity_and_arrays_differ():
    for spec in parameter_table(GEMMA) + parameter_table(LLAMA):
        if spec.path[-1] == "scale":
            offset = 1.0 if spec in parameter_table(GEMMA) else 0.0
            assert (spec.init(jax.random.key(0), spec.shape, jnp.float32) + offset == 1).all()
    block = build_model(LLAMA).init(jax.random.key(0))["stacks"]["0"]["0"]
    assert not np.array_equal(block["gate_proj"]["kernel"], block["up_proj"]["kernel"])
    assert not np.array_equal(*block["gate_proj"]["kernel"])
    assert float(block["gate_proj"]["kernel"].std()) == pytest.approx(0.02, rel=0.2)


def test_flatten_is_the_inverse_of_nest_and_stops_at_weight_leaves():
    leaf = LoRA(*(jnp.ones((1, 1)) for _ in range(3)), jnp.ones(()))
    flat = {("a", "b"): leaf, ("a", "c"): 1, ("d",): 2}
    assert flatten(nest(flat)) == flat
