"""A new model as a Hugging Face folder: a tokenizer of characters, a small Llama, weights drawn at random."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxpost.models.config import BlockConfig, ModelConfig, RopeConfig, StackConfig
from jaxpost.models.table import nest
from jaxpost.models.transformer import build_model
from jaxpost.weights import huggingface

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
TURNS = ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>system\n")
"""A turn's beginning is one token, or the format would be longer than the arithmetic in it."""
END, UNKNOWN = "<|im_end|>", "<|unknown|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """A token for each printable ASCII character, each turn's beginning and its end, with the ChatML format.

    transformers reads the folder as it reads any tokenizer's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocabulary = {token: i for i, token in enumerate([UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (END, *TURNS)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def architecture(*, width: int, layers: int, heads: int, max_positions: int) -> ModelConfig:
    """A Llama of this width, with three widths in its MLPs and tied embeddings."""
    return ModelConfig(
        family="llama",
        vocab_size=-(-(len(CHARACTERS) + len(TURNS) + 2) // 8) * 8,
        width=width,
        mlp_width=3 * width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        stacks=(StackConfig(repeats=layers, period=(BlockConfig(rope=RopeConfig()),)),),
        max_positions=max_positions,
    )


def write_new_model(folder: Path, config: ModelConfig, *, seed: int) -> Path:
    """A model folder with random weights (a function of the seed) and the tokenizer of characters.

    Matrices have the deviation 1 / sqrt(inputs): the usual 0.02 is for wide models, and at this width learns slower.
    """
    tokenizer = write_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    model = build_model(config)
    keys = jax.random.split(jax.random.key(seed), len(model.table))
    params = {
        spec.path: jax.random.normal(key, spec.shape) / math.sqrt(spec.shape[-2])
        if spec.path[-1] == "kernel"
        else spec.init(key, spec.shape, jnp.float32)
        for key, spec in zip(keys, model.table, strict=True)
    }
    return huggingface.save(folder, config, nest(params), tokenizer_from=tokenizer, overwrite=True)
