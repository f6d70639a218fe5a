"""Every preset is read, checked, described in configs/PAPERS.md, and run for some steps on a tiny model.

Of reinforcement learning's presets, one is run for each way in which they are composed.
"""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from jaxpost import sharding
from jaxpost.config import SFTConfig
from jaxpost.config_check_preference import data_kind
from jaxpost.config_check_rl import check_config as check
from jaxpost.config_flags import apply_flags
from jaxpost.config_io import flatten, load, tag_of
from jaxpost.config_preference import PreferenceConfig
from jaxpost.config_reward import RewardConfig
from jaxpost.config_rl import FilePrompts, RLConfig
from jaxpost.config_search import SearchConfig
from jaxpost.config_search_trees import SearchMethodSection

QUICK_COMPILER = True

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "configs").glob("*/*.yaml"))
SPEC = importlib.util.spec_from_file_location("papers", ROOT / "tools" / "papers.py")
papers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(papers)


CONFIGS = {preset: load(preset) for preset in PRESETS}
SUPERVISED = [preset for preset, config in CONFIGS.items() if isinstance(config, SFTConfig)]
REWARD = [preset for preset, config in CONFIGS.items() if isinstance(config, RewardConfig)]
PREFERENCE = [preset for preset, config in CONFIGS.items() if isinstance(config, PreferenceConfig)]


def composition(config: RLConfig) -> tuple:
    """What decides which code a preset of reinforcement learning runs through."""
    loss, critic = config.loss, config.critic.network if config.advantage.kind == "gae" else None
    kl = (config.kl.where, config.kl.estimator) if config.kl.coef else None
    scale, sides = getattr(config.advantage, "scale", None), getattr(loss, "sides", None)
    several = config.learner.epochs * config.learner.minibatches > 1
    return (config.advantage.kind, scale, loss.kind, sides, loss.aggregate, kl, critic, several,
            bool(config.rollout.max_refills))  # fmt: skip


ONLINE = {composition(config): preset for preset, config in CONFIGS.items() if isinstance(config, RLConfig)}


SHARDED = ("demo", "tulu3_rlvr", "chitchat", "local_dpo", "deepconf")
"""Presets that run on every device."""


@pytest.fixture
def few_devices(monkeypatch, request):
    """One device for most presets: its programs compile sooner and are cached, so that many presets share them."""
    if request.node.callspec.params["preset"].stem not in SHARDED:
        make_mesh = sharding.make_mesh
        monkeypatch.setattr(sharding, "make_mesh", lambda section: make_mesh({"data": 1}, jax.devices()[:1]))


def ids(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def tiny(preset: Path, model: Path, folder: Path) -> list[str]:
    """Flags that make a preset small: a random model, a local file, few steps, short rows, every device."""
    data = folder / "data.jsonl"
    turns = [
        [{"role": "user", "content": f"What is {i} + {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]
        for i in range(40)
    ]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    config = load(preset)
    weights = [source.weight for source in config.data.train]
    train = ", ".join(f"{{path: {data}, weight: {'null' if w is None else w}}}" for w in weights)
    return [
        *("--model.path", str(model), "--model.revision", "null", "--model.tokenizer", "null"),
        *("--model.chat_template", "null", "--model.compute_dtype", "float32", "--model.param_dtype", "float32"),
        *("--data.train", f"[{train}]", "--data.eval", f"[{{path: {data}, limit: 8}}]"),
        *("--data.seq_len", "128", "--data.workers", "0", "--mesh", "{fsdp: -1}"),
        *("--train.steps", "3", "--train.batch_size", "16", "--train.microbatches", "2", "--train.eval_every", "0"),
        *("--optim.schedule.warmup", "0.1", "--optim.schedule.decay", "0.2"),
        *("--train.eval_batches", "1", "--train.samples.prompts", "Hi", "--train.samples.max_tokens", "4"),
        *("--run.dir", str(folder / "run"), "--run.loggers", "[]"),
    ]


@pytest.mark.parametrize("preset", PRESETS, ids=ids)
def test_preset_is_sound_and_says_where_it_comes_from(preset):
    config = check(load(preset))
    header = papers.read_header(preset)
    assert str(preset.relative_to(ROOT)) in header["command"] or header["command"].startswith("make ")
    assert config.run.name == preset.stem, "its runs are found by the preset's name"


@pytest.mark.slow
@pytest.mark.usefixtures("few_devices")
@pytest.mark.parametrize("preset", SUPERVISED, ids=ids)
def test_preset_runs_three_steps_on_a_tiny_model(preset, tiny_model, tmp_path, monkeypatch):
    from jaxpost import assemble

    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    config = check(apply_flags(load(preset), tiny(preset, tiny_model, tmp_path)))
    result = assemble.train(config)
    assert result.step == 3
    assert result.stopped is None
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 3
    assert all(0 <= loss < 20 for loss in losses)
    exported = tmp_path / "run" / "export"
    assert (exported / ("adapter_config.json" if config.adapter.kind == "lora" else "config.json")).is_file()


def tiny_preference(
    config: PreferenceConfig | RewardConfig, model: Path, folder: Path, rows: list | None = None
) -> list[str]:
    """Flags that make a preset small: a random model, rows of short answers, few steps, every device."""
    data = folder / "pairs.jsonl"
    rows = rows or [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No " * (1 + i % 3)} for i in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model.path", str(model), "--model.revision", "null", "--model.tokenizer", "null"),
        *("--model.chat_template", "null", "--model.compute_dtype", "float32", "--model.param_dtype", "float32"),
        *("--data.train", f"[{{path: {data}}}]", "--data.eval", f"[{{path: {data}, limit: 16}}]"),
        *("--data.seq_len", "160", "--data.max_length", "null", "--mesh", "{fsdp: -1}", "--optim.lr", "1e-3"),
        *("--train.steps", "3", "--train.batch_size", "16", "--train.microbatches", "2", "--train.eval_every", "0"),
        *("--optim.schedule.warmup", "0", "--train.eval_batches", "1", "--train.samples.prompts", "[]"),
        *("--train.save_every", "0", "--run.dir", str(folder / "run"), "--run.loggers", "[]", "--run.export", "false"),
    ]


def reward_composition(config: RewardConfig) -> tuple:
    """What decides which code a preset of a reward model runs through."""
    loss = tuple(x for x in vars(config.loss).values() if isinstance(x, str))
    head = (config.head.members > 1, config.head.classes, bool(config.data.objectives))
    return (loss, head, config.adapter.kind, config.data.step_mark)


JUDGED_ROWS = {
    "pairs": lambda i: {"chosen": f"It is {i}.", "rejected": "No " * (1 + i % 3), "strength": "better"},
    "rankings": lambda i: {"completions": [f"It is {i}.", "No", "Well"], "ranks": [0, 2, 1]},
    "unpaired": lambda i: {"completion": f"It is {i}." if i % 2 else "No", "label": bool(i % 2)},
    "scores": lambda i: {"completion": f"It is {i}.", "score": float(i % 5)},
    "steps": lambda i: {"completions": ["One", "Two"], "labels": [True, bool(i % 2)]},
}
REWARD_RUNS = list({reward_composition(CONFIGS[preset]): preset for preset in REWARD}.values())
"""One for each way in which they are composed."""


@pytest.mark.slow
@pytest.mark.usefixtures("few_devices")
@pytest.mark.parametrize("preset", REWARD_RUNS, ids=ids)
def test_preset_trains_a_reward_model_for_three_steps_on_a_tiny_model(preset, tiny_model, tmp_path, monkeypatch):
    from jaxpost import assemble

    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    config = CONFIGS[preset]
    rows = [{"prompt": f"What is {i}?", **JUDGED_ROWS[config.data_kind](i)} for i in range(40)]
    for row in rows if config.data.objectives else ():
        row["score"] = dict.fromkeys(config.data.objectives, row["score"])
    config = check(apply_flags(config, tiny_preference(config, tiny_model, tmp_path, rows)))
    result = assemble.train(config)
    assert (result.step, result.stopped) == (3, None)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["grad_norm"] > 0 for record in records if record["kind"] == "train")
    last = [record for record in records if record["kind"] == "eval"][-1]
    names = ("accuracy", "mean_absolute_error", "objective/helpfulness/mean_absolute_error")
    assert any(f"pairs/{name}" in last for name in names)
    assert ("pairs/first_error/f1" in last) == (config.data_kind == "steps")


def preference_composition(config: PreferenceConfig) -> tuple:
    """What decides which code a preset of preference optimisation runs through; numbers are traced."""
    losses = tuple(tuple(x for x in vars(loss).values() if isinstance(x, str)) for loss in config.losses)
    return (losses, config.reference.kind, config.adapter.kind, config.special_tokens)


PREFERENCE_RUNS = list({preference_composition(CONFIGS[preset]): preset for preset in PREFERENCE}.values())
"""One for each way in which they are composed."""


@pytest.mark.slow
@pytest.mark.usefixtures("few_devices")
@pytest.mark.parametrize("preset", PREFERENCE_RUNS, ids=ids)
def test_preset_learns_preferences_for_three_steps_on_a_tiny_model(preset, tiny_model, tmp_path, monkeypatch):
    from jaxpost import assemble

    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    config = check(apply_flags(CONFIGS[preset], tiny_preference(CONFIGS[preset], tiny_model, tmp_path)))
    result = assemble.train(config)
    assert (result.step, result.stopped) == (3, None)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 3
    assert all(record["grad_norm"] > 0 for record in steps)
    for loss in config.losses:
        assert loss.kind in steps[0]
    assert ("kl" in steps[0]) == (config.reference.kind != "none")
    compares = data_kind(config.losses) == "pairs" and any(loss.kind != "nll" for loss in config.losses)
    assert ("rewards/accuracy" in steps[0]) == compares
    assert steps[0]["tokens/chosen"] > 0
    assert steps[0]["tokens/rejected"] > 0


def tiny_online(config: RLConfig, model: Path, folder: Path) -> list[str]:
    """Flags that make a preset small: a random model, local files with the preset's columns, short answers.

    The reward is the share of Latin letters, of which a random model's answers have more or less.
    """
    rollout, learner, columns = config.rollout, config.learner, getattr(config.advantage, "columns", ())
    parts = [{"kind": "script", "name": "math"}, *({"kind": "script", "name": n} for n in columns if n != "math")]
    flags = [
        *("--model.path", str(model), "--model.revision", "null", "--model.tokenizer", "null"),
        *("--model.chat_template", "null", "--model.compute_dtype", "float32", "--model.param_dtype", "float32"),
        *("--prompts.template", "{prompt}", "--prompts.system_prompt", "null", "--mesh", "{data: -1, fsdp: 1}"),
        *("--rollout.prompts", "4", "--rollout.samples", str(min(rollout.samples, 4)), "--rollout.max_tokens", "8"),
        *("--rollout.rows", "16", "--reward", json.dumps({"parts": parts, "workers": 1}), "--evals", "[]"),
        *("--learner.epochs", str(min(learner.epochs, 2)), "--learner.minibatches", str(min(learner.minibatches, 2))),
        *("--optim.schedule.warmup", "0", "--train.steps", "2", "--train.save_every", "0", "--train.eval_every", "0"),
        *("--run.dir", str(folder / "run"), "--run.loggers", "[]", "--run.export", "false"),
    ]
    if isinstance(config.prompts, FilePrompts):
        for i, source in enumerate(config.prompts.sources):
            data = folder / f"problems{i}.jsonl"
            rows = [{theirs: _value(ours, theirs, n) for ours, theirs in source.columns.items()} for n in range(8)]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            key = f"--prompts.sources.{i}"
            flags += [f"{key}.path", str(data), f"{key}.limit", "null", f"{key}.skip", "0"]
        flags += ["--prompts.max_tokens", "null"]
    return flags


def _value(ours: str, theirs: str, n: int):
    text = f"What is {n} + {n}?"
    if ours != "prompt":
        return f"It is \\boxed{{{2 * n}}}."
    return [{"role": "user", "content": text}] if theirs == "messages" else text


ALWAYS = ("demo", "tulu3_rlvr")
"""Group advantages, and a critic; other compositions, and most presets of other methods, run with the slow tests."""
ONLINE_RUNS = [
    pytest.param(preset, id=ids(preset), marks=() if preset.stem in ALWAYS else pytest.mark.slow)
    for preset in dict.fromkeys(
        [*(p for p in CONFIGS if p.stem in ALWAYS and p.parent.name != "sft"), *ONLINE.values()]
    )
]


@pytest.mark.usefixtures("few_devices")
@pytest.mark.parametrize("preset", ONLINE_RUNS)
def test_preset_learns_online_for_two_steps_on_a_tiny_model(preset, tiny_model, tmp_path, monkeypatch):
    from jaxpost import assemble

    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    config = check(apply_flags(CONFIGS[preset], tiny_online(CONFIGS[preset], tiny_model, tmp_path)))
    result = assemble.train(config)
    assert (result.step, result.stopped) == (2, None)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 2
    assert all(record["grad_norm"] > 0 for record in steps)
    assert ("kl" in steps[0]) == (bool(config.kl.coef) or config.loss.kind == "preference")
    assert ("value_error" in steps[0]) == (config.advantage.kind == "gae")


@pytest.mark.parametrize("preset", [p for p, c in CONFIGS.items() if isinstance(c, RLConfig)], ids=ids)
def test_a_presets_rewards_can_be_made_and_refills_go_by_one_of_them(preset):
    from jaxpost.assemble.rewards import make_reward
    from jaxpost.rewards.combine import leaves
    from jaxpost.rewards.contract import name_of

    config = CONFIGS[preset]
    for section in (e.reward for e in config.evals if e.reward):
        make_reward(section)
    names = [name_of(leaf) for leaf in leaves(make_reward(config.reward))]
    assert config.rollout.refill_by in (None, *names)
    assert set(getattr(config.advantage, "columns", ())) <= set(names)
    for part in config.reward.parts:
        if part.kind == "overlong":
            assert part.max_tokens == config.rollout.max_tokens, "it punishes what comes before the limit"


def test_runs_of_two_presets_do_not_share_a_folder():
    names = [config.run.name for config in CONFIGS.values()]
    assert len(set(names)) == len(names)


def test_the_page_of_papers_is_made_from_the_headers():
    assert (ROOT / "configs" / "PAPERS.md").read_text(encoding="utf-8") == papers.render(), "run `make papers`"


HEADER = "# Does a thing.\n" + "".join(f"# {field}: text\n" for field in papers.FIELDS)

HEADERS = {
    "no header": ("method: sft\n", "has no header"),
    "field missing": (HEADER.replace("# time: text\n", ""), "the header lacks time"),
    "unknown field": (HEADER + "# speed: 3\n", "is none of source, command"),
    "empty field": (HEADER.replace("# time: text", "# time:"), "is none of"),
    "out of order": (
        "# T\n# command: c\n# source: s\n" + "".join(HEADER.splitlines(True)[3:]),
        "order is source, command",
    ),
}


@pytest.mark.parametrize(("text", "message"), HEADERS.values(), ids=HEADERS)
def test_headers_that_lack_something_are_turned_down(text, message, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(papers.HeaderError, match=message):
        papers.read_header(tmp_path / "p.yaml")


def test_headers_go_on_over_lines(tmp_path):
    (tmp_path / "p.yaml").write_text(HEADER + "#   and more\nmethod: sft\n")
    assert papers.read_header(tmp_path / "p.yaml")["note"] == "text and more"


def tiny_search(config: SearchConfig, model: Path, folder: Path) -> list[str]:
    """Flags that make a search small: a random model, two prompts, few tokens."""
    flags = [*("--model.path", str(model), "--prompts.template", "{prompt}", "--count", "2", "--engine", "{rows: 8}")]
    if isinstance(config.prompts, FilePrompts):
        data = folder / "problems.jsonl"
        theirs = config.prompts.sources[0].columns
        rows = [{theirs[ours]: f"{n} + {n}" for ours in theirs} for n in range(2)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags += ["--prompts.sources.0.path", str(data)]
    for key, value in flatten(config.search).items():
        name = key.rpartition(".")[2]
        if name.endswith("tokens") or name == "max_thinking":
            flags += [f"--search.{key}", str(min(int(value), 6))]
        if name in ("simulations", "width", "max_steps", "max_states"):
            flags += [f"--search.{key}", str(min(int(value), 4))]
    return [*flags, "--budget", "1500", "--run.dir", str(folder / "run")]


SEARCHES = {preset: config for preset, config in CONFIGS.items() if isinstance(config, SearchConfig)}
SEARCH_RUNS = [
    pytest.param(preset, id=ids(preset), marks=() if preset.stem == "deepconf" else pytest.mark.slow)
    for preset in SEARCHES
]


@pytest.mark.usefixtures("few_devices")
@pytest.mark.parametrize("preset", SEARCH_RUNS)
def test_preset_searches_two_prompts_on_a_tiny_model(preset, tiny_model, tmp_path, monkeypatch):
    from jaxpost.assemble.search import search

    monkeypatch.setenv("JAXPOST_CACHE", str(tmp_path / "cache"))
    config = check(apply_flags(CONFIGS[preset], tiny_search(CONFIGS[preset], tiny_model, tmp_path)))
    result = search(config)
    assert len(result.rows) == 2
    for row in result.rows:
        assert 0 < row["generated"] + row["verified"] <= 1500
        # A random model's answers need not end: then there is a sentence.
        assert row["answer"] is not None or row["error"]
        assert "Error" not in row.get("error", "")


def test_every_method_of_search_has_a_preset():
    from typing import get_args

    kinds = {tag_of(section)[1] for section in get_args(SearchMethodSection)}
    assert {config.search.kind for config in SEARCHES.values()} == kinds
