"""Every test runs on 8 CPU devices, with strict dtype promotion and a persistent compilation cache."""

import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# On fake CPU devices, XLA's default schedule lets each device of a program meet its collectives in an order of its own:
# they wait for one another for ever. Subprocesses of tests inherit this.
ORDERED = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ORDERED}".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jax._src import compiler

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
CACHE = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", Path(__file__).parent.parent / ".cache" / "xla"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

_strategy = compiler._resolve_compilation_strategy


def _uncached_on_several_devices(computation, devices, *rest):
    """A program of several CPU devices that was *loaded* from the cache has lost the order of its collectives: under
    load two devices wait in different ones, and the process aborts."""
    key, options = _strategy(computation, devices, *rest)
    return (None if devices.size > 1 else key), options


compiler._resolve_compilation_strategy = _uncached_on_several_devices


QUICK = ("adapters", "assemble", "envs", "generate", "rl", "search", "train")
"""Folders whose programs are so small that they run long before they would be optimised. A module may say otherwise by
`QUICK_COMPILER`."""


@pytest.fixture(scope="module", autouse=True)
def compiler_effort(request):
    before = jax.config.read("jax_disable_most_optimizations")
    quick = getattr(request.module, "QUICK_COMPILER", request.path.parent.name in QUICK)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data folder {SHARED}, which is not here")
    return SHARED


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: two random Llama layers of width 32 and a tokenizer of bytes with the ChatML format."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
    from jaxpost.models.transformer import build_model
    from jaxpost.weights import huggingface

    folder = tmp_path_factory.mktemp("tiny") / "model"
    files = tmp_path_factory.mktemp("tiny_tokenizer")
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(files / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (files / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    config = ModelConfig(
        family="llama",
        vocab_size=264,
        width=32,
        mlp_width=48,
        heads=4,
        kv_heads=2,
        head_dim=8,
        stacks=(StackConfig(repeats=2, period=(BlockConfig(rope=RopeConfig()),)),),
        max_positions=512,
    )
    params = build_model(config).init(jax.random.key(0))
    huggingface.save(folder, config, params, tokenizer_from=files)
    return folder
