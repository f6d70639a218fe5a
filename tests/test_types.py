from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig


def test_layer_index_counts_through_stacks_and_periods():
    block = BlockConfig(rope=RopeConfig())
    config = ModelConfig(
        family="x",
        vocab_size=8,
        width=4,
        mlp_width=8,
        heads=1,
        kv_heads=1,
        head_dim=4,
        max_positions=8,
        stacks=(StackConfig(repeats=2, period=(block, block, block)), StackConfig(repeats=1, period=(block, block))),
    )
    order = [
        config.layer_index(s, r, b)
        for s, stack in enumerate(config.stacks)
        for r in range(stack.repeats)
        for b in range(len(stack.period))
    ]
    assert order == list(range(config.num_layers)) == list(range(8))
