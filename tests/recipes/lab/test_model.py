"""The lab's tokenizer in transformers' hands, and a far smaller model all the way: made, trained, measured."""

import json

import jax
import numpy as np
import pytest

from jaxpost import sharding
from jaxpost.assemble.model import load_model
from jaxpost.config import ModelSection
from jaxpost.recipes.lab import folder, model
from jaxpost.recipes.lab.problems import LabProblems
from jaxpost.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return folder.write_tokenizer(tmp_path_factory.mktemp("characters") / "tokenizer")


def test_characters_survive_transformers(tokenizer_folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for text in ("47+38", "40+30=70;7+8=15;70+15=85", " Why? \n\tNo.".replace("\t", ""), folder.CHARACTERS):
        ids = theirs(text)["input_ids"]
        assert len(ids) == len(text), "one token per character"
        assert theirs.decode(ids) == text
    assert theirs.unk_token_id in theirs("é")["input_ids"]
    turn = [{"role": "user", "content": "1+2"}]
    text = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    # A turn's beginning is one token: begin, 1, +, 2, end, newline, begin.
    assert len(theirs(text)["input_ids"]) == 7
    assert theirs.decode(theirs(text)["input_ids"]) == text


def test_our_tokenizer_finds_the_training_template(tokenizer_folder):
    ours = load_tokenizer(tokenizer_folder)
    assert ours.chat.name == "chatml"
    assert ours.eos_ids == (ours.hf.convert_tokens_to_ids(folder.END),)
    assert ours.vocab_size <= folder.architecture(width=32, layers=1, heads=2, max_positions=64).vocab_size


def test_new_weights_are_a_function_of_the_seed(tmp_path):
    shape = folder.architecture(width=32, layers=2, heads=4, max_positions=64)
    made = [folder.write_new_model(tmp_path / f"m{i}", shape, seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert len({(path / "model.safetensors").read_bytes() for path in made}) == 2
    params = load_model(ModelSection(path=str(made[0]))).load()
    kernels = params["stacks"]["0"]["0"]
    # 1 / sqrt(inputs), measured on 2 * 32 * 96 and 2 * 96 * 32 numbers.
    assert np.std(kernels["up_proj"]["kernel"]) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(kernels["down_proj"]["kernel"]) == pytest.approx(96**-0.5, rel=0.05)


def test_the_recipe_is_of_the_promised_size_and_has_an_identity():
    recipe = model.Recipe()
    shape = folder.architecture(width=recipe.width, layers=recipe.layers, heads=recipe.heads, max_positions=64)
    from jaxpost.models.cost import param_count

    assert 2e6 < param_count(shape) < 5e6
    assert recipe.fingerprint == model.Recipe().fingerprint != model.Recipe(seed=1).fingerprint
    longest = max(len(LabProblems(direct=0.0).example(i)["completion"]) for i in range(500))
    assert longest + 1 <= model.LONGEST


def test_shares_are_counted_by_task():
    answers = [
        model.Answer(task, "", "", right, 1) for task, right in (("sum", True), ("sum", False), ("product", True))
    ]
    found = model.shares(answers)
    assert found == {"sum": model.Share(1, 2), "product": model.Share(1, 1), "all": model.Share(2, 3)}
    # Wilson's interval of 1 of 2, from its formula with z = 1.96: (0.5 + 0.96 -+ 1.96 * 0.7814) / 2.92.
    assert str(found["sum"]) == " 50.0%  [9.5%, 90.5%]"


@pytest.mark.slow
def test_a_small_lab_from_nothing(tmp_path, monkeypatch):
    """20 updates of a tiny model lower the loss; the folder it leaves is a model like any other, made only once."""
    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path))
    one = sharding.make_mesh({}, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda section: one)
    recipe = model.Recipe(
        width=32, layers=1, heads=4, rows=640, prompts=30, held_out=24, seq_len=64, batch_size=16, lr=1e-2
    )
    said: list[str] = []
    lab = model.make_lab(recipe, say=said.append)
    records = [json.loads(line) for line in (lab.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert len(losses) >= 2
    assert losses[-1] < 0.8 * losses[0]
    assert losses[0] < np.log(104), "the first mean is of several updates, all below a uniform guess"
    assert said == [f"making the lab in {lab.folder} (once)"]
    assert model.make_lab(recipe, say=said.append) == lab
    assert len(said) == 1
    assert load_model(ModelSection(path=str(lab.model))).tokenizer.chat.name == "chatml"
    assert len(model.read_rows(lab.prompts)) == 30
    report = lab.measured
    assert report["greedy"]["all"]["items"] == 24 == sum(report["greedy"][task]["items"] for task in recipe.tasks)
    assert str(lab.model) in model.describe(lab)
    assert "difference" in model.describe(lab)
