"""Presets and flags: what is read, and what a mistake is told. PyYAML's own loader is the oracle for values."""

import dataclasses
from typing import Literal, get_args, get_origin

import pytest
import yaml

from jaxpost import config as c
from jaxpost.config_check import check
from jaxpost.config_flags import apply_flags, flags_help
from jaxpost.config_io import ConfigError, diff, dump, fingerprint, flatten, hints, load, loads, to_dict

PRESET = """\
method: sft
model: {path: m, compute_dtype: bfloat16}
data:
  train:
    - {path: a.jsonl, columns: {prompt: question}, weight: 2}
    - {path: b.parquet, limit: 10}
  seq_len: 128
optim:
  kind: lion
  lr: 1e-6
  clip_norm: null
  schedule: {kind: wsd, warmup: 10}
adapter: {kind: lora, targets: [q_proj, v_proj]}
train:
  steps: 100
  samples: {prompts: ["What is 1: 2?", "no"]}
"""


def read(text: str) -> c.SFTConfig:
    return loads(text, source="p.yaml")


def test_values_are_those_that_yaml_reads_and_all_else_is_default():
    config, plain = read(PRESET), yaml.safe_load(PRESET)
    plain["optim"]["lr"] = 1e-6  # PyYAML reads 1e-6 as text

    def assert_holds(section, expected):
        for name, value in expected.items():
            found = getattr(section, name)
            if isinstance(value, dict) and dataclasses.is_dataclass(found):
                assert_holds(found, value)
            elif isinstance(value, list) and dataclasses.is_dataclass(found[0]):
                assert len(found) == len(value)
                for item, wanted in zip(found, value, strict=True):
                    assert_holds(item, wanted)
            else:
                assert (list(found) if isinstance(found, tuple) else found) == value

    assert_holds(config, plain)
    assert isinstance(config.optim, c.LionSection)
    assert isinstance(config.adapter, c.LoRASection)
    assert config.optim.b2 == c.LionSection().b2
    assert config.mesh == c.MeshSection()
    assert isinstance(config.data.train[0].weight, float)


def test_dump_holds_every_key_and_reads_back_equal():
    config = read(PRESET)
    assert read(dump(config)) == config
    assert yaml.safe_load(dump(config)) == to_dict(config)
    assert set(yaml.safe_load(dump(config))["optim"]) == {f.name for f in dataclasses.fields(c.LionSection)}


@pytest.mark.parametrize("lr", [1e-6, 2.5e-5, 1.0, 1e20, 3])
def test_numbers_survive_the_round_trip(lr):
    config = dataclasses.replace(c.SFTConfig(), optim=c.AdamWSection(lr=float(lr)))
    assert read(dump(config)).optim.lr == lr


MISTAKES = {
    "unknown key": ("train: {batchsize: 4}", "p.yaml:2: train.batchsize: unknown key; did you mean batch_size?"),
    "unknown section": ("modle: {path: m}", "p.yaml:2: modle: unknown key; did you mean model?"),
    "no near name": ("run: {zzz: 1}", "p.yaml:2: run.zzz: unknown key; known: dir, name, seed,"),
    "key of another kind": (
        "loss:\n  kind: dft\n  label_smoothing: 0.1",
        "p.yaml:4: loss.label_smoothing: unknown key; it belongs to kind: cross_entropy, not dft",
    ),
    "unknown kind": ("optim: {kind: adam}", "p.yaml:2: optim.kind: 'adam': did you mean adamw?"),
    "unknown choice": (
        "run:\n  loggers: [wand]",
        "p.yaml:3: run.loggers.0: 'wand' is none of tensorboard, wandb, trackio",
    ),
    "deep in a list": (
        "data:\n  train:\n    - {pth: x}",
        "p.yaml:4: data.train.0.pth: unknown key; did you mean path?",
    ),
    "key missing": ("data: {train: [{split: x}]}", "p.yaml:2: data.train.0: lacks the key path, text"),
    "float for int": ("train: {steps: 1.5}", "p.yaml:2: train.steps: needs a whole number or null, not '1.5'"),
    "bool for int": ("train: {steps: true}", "p.yaml:2: train.steps: needs a whole number or null, not 'true'"),
    "int for bool": ("run: {export: 1}", "p.yaml:2: run.export: needs true or false, not '1'"),
    "quoted number": ("optim: {lr: '1e-6'}", "p.yaml:2: optim.lr: needs a number, not '1e-6'"),
    "not a number": ("optim: {lr: nan}", "p.yaml:2: optim.lr: needs a number, not 'nan'"),
    "word that is a bool": ("run: {name: no}", "p.yaml:2: run.name: needs text, not 'no'; put it in quotes"),
    "word that is a number": ("run: {name: 12}", "p.yaml:2: run.name: needs text, not '12'; put it in quotes"),
    "word for a list": ("adapter: {trainable: x}", "p.yaml:2: adapter.trainable: needs a list:"),
    "list for a word": ("model: {path: [x]}", "p.yaml:2: model.path: needs text, not a list or a section"),
    "word for a section": ("train: 3", "p.yaml:2: train: is a section: give it keys (steps, epochs,"),
    "word for a mapping": ("data: {train: [{path: x, columns: y}]}", "data.train.0.columns: needs a mapping"),
    "empty section": ("train:", "p.yaml:2: train: has no value; give a section or leave the key out"),
    "null": ("train: {batch_size: null}", "p.yaml:2: train.batch_size: has no value; give a whole number"),
    "given twice": ("run: {seed: 1, seed: 2}", "p.yaml:2: run.seed: is given twice"),
    "broken YAML": ("train: {steps: 1", "p.yaml:2: not valid YAML"),
    "tab": ("train:\n\tsteps: 1", "p.yaml:3: not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_its_line_and_what_to_do(text, message):
    with pytest.raises(ConfigError) as error:
        read("method: sft\n" + text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_must_name_its_method():
    for text, message in {
        "run: {name: a}": "names no method",
        "method: sfd": "'sfd' is none of sft",
        "3": "mapping",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read(text)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "gsm8k.yaml").write_text("method: sft")
    with pytest.raises(ConfigError, match=r"gsmk\.yaml: no such file; did you mean .*gsm8k\.yaml\?"):
        load(tmp_path / "gsmk.yaml")
    with pytest.raises(ConfigError, match="no folder"):
        load(tmp_path / "none" / "gsm8k.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "bytes.yaml")


def another(value, hint):
    """A value of the type `hint` that is not `value`."""
    kind = next(member for member in get_args(hint) if member is not type(None)) if value is None else type(value)
    choices = get_args(hint)
    if get_origin(hint) is Literal:
        return next(word for word in choices if word != value)
    if kind is tuple:
        return () if value else (choices[0]("x") if choices[0] is str else get_args(choices[0])[0],)
    return {bool: lambda: not value, dict: lambda: {"x": "y"}, str: lambda: f"{value}x"}.get(
        kind, lambda: kind(7) if value is None else value + 1
    )()


def one_change_each(section):
    """Every section that differs from this one in a single value; its tag is left alone."""
    for name, hint in hints(type(section)).items():
        value = getattr(section, name)
        if name in ("kind", "method") and len(get_args(hint)) == 1:
            continue
        if dataclasses.is_dataclass(value):
            others = one_change_each(value)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            others = (
                (*value[:i], new, *value[i + 1 :]) for i in range(len(value)) for new in one_change_each(value[i])
            )
        elif dataclasses.is_dataclass(get_args(hint)[0] if get_args(hint) else None):
            others = ((get_args(hint)[0](path="x"),),)
        else:
            others = (another(value, hint),)
        for other in others:
            yield dataclasses.replace(section, **{name: other})


def test_diff_and_fingerprint_see_every_key():
    config = read(PRESET)
    assert diff(config, read(PRESET)) == ()
    assert fingerprint(config) == fingerprint(read(PRESET))
    changed = list(one_change_each(config))
    assert len({fingerprint(other) for other in changed} | {fingerprint(config)}) == len(changed) + 1
    seen = {change.key for other in changed for change in diff(config, other)}
    tags = {"method", "loss.kind", "adapter.kind", "optim.kind"}
    assert seen >= set(flatten(config)) - tags


def test_diff_shows_keys_that_one_side_lacks():
    changes = {change.key: (change.old, change.new) for change in diff(c.SFTConfig(), read(PRESET))}
    assert changes["optim.kind"] == ("adamw", "lion")
    assert changes["optim.eps"] == ("1e-08", "(none)")
    assert changes["adapter.rank"] == ("(none)", "16")
    assert changes["data.train.1.path"] == ("(none)", "b.parquet")


# --- flags ---


def flagged(*args: str) -> c.SFTConfig:
    return apply_flags(read(PRESET), args)


def test_flags_change_what_they_name_and_nothing_else():
    config = flagged(
        "--optim.lr", "2e-6", "--data.train.0.path=f.jsonl", "--train.batch-size", "16", "--run.export", "no"
    )
    assert {change.key: change.new for change in diff(read(PRESET), config)} == {
        "optim.lr": "2e-06",
        "data.train.0.path": "f.jsonl",
        "train.batch_size": "16",
        "run.export": "false",
    }


def test_a_kind_flag_keeps_what_was_set_and_both_kinds_know():
    config = flagged("--optim.weight_decay", "0.1", "--optim.kind", "adamw", "--optim.eps", "1e-6")
    old = read(PRESET).optim
    assert config.optim == c.AdamWSection(
        lr=old.lr, clip_norm=None, schedule=old.schedule, weight_decay=0.1, eps=1e-6, b2=c.AdamWSection().b2
    )
    assert flagged("--adapter.kind", "full").adapter == c.FullSection()


def test_text_is_taken_as_it_stands():
    prompts = ("What is 1: 2?", "no", "{x}", "12")
    assert flagged("--train.samples.prompts", *prompts).train.samples.prompts == prompts
    assert flagged("--run.name", "12").run.name == "12"


def test_lists_and_sections_in_yaml_replace_the_whole():
    config = flagged("--data.train", "[{path: x.jsonl}]", "--adapter", "{kind: full, trainable: ['*norm*']}")
    assert config.data.train == (c.SourceSection(path="x.jsonl"),)
    assert config.adapter == c.FullSection(trainable=("*norm*",))
    assert flagged("--data.train", "[]").data.train == ()
    assert flagged("--optim", "{lr: 3e-6}").optim == c.LionSection(lr=3e-6)


def test_a_number_after_the_last_adds_an_item():
    sources = flagged("--data.train.2.path", "x.jsonl", "--data.train.2.columns.prompt", "q").data.train
    assert sources[2] == c.SourceSection(path="x.jsonl", columns={"prompt": "q"})
    assert sources[:2] == read(PRESET).data.train


def test_switches_and_null():
    assert flagged("--run.allow_changed_config").run.allow_changed_config is True
    assert flagged("--data.packing", "False").data.packing is False
    for word in ("null", "None"):
        assert flagged("--train.steps", word).train.steps is None
    assert flagged("--mesh.fsdp", "-1").mesh.fsdp == -1
    assert flagged("--run.loggers", "wandb", "tensorboard").run.loggers == ("wandb", "tensorboard")


FLAG_MISTAKES = {
    "unknown": (["--optim.lrr", "1"], "--optim.lrr: unknown flag; did you mean lr?"),
    "unknown section": (["--optm.lr", "1"], "--optm.lr: unknown flag; did you mean optim?"),
    "of another kind": (["--optim.eps", "1"], "--optim.eps: unknown flag; it belongs to kind: adamw, not lion"),
    "unknown kind": (["--optim.kind", "adam"], "--optim.kind: 'adam': did you mean adamw?"),
    "wrong type": (["--optim.lr", "fast"], "--optim.lr: needs a number, not 'fast'"),
    "two words for one": (["--optim.lr", "1", "2"], "--optim.lr: needs a number, not '1 2'"),
    "no value": (["--optim.lr"], "--optim.lr is followed by no value"),
    "no flag": (["x"], "'x' stands where a flag such as --optim.lr was expected"),
    "too deep": (["--optim.lr.x", "1"], "--optim.lr.x: unknown flag; --optim.lr has no parts"),
    "far item": (["--data.train.3.path", "x"], "the list holds 2, so 3 must be a number up to 2"),
    "no number": (["--data.train.x.path", "x"], "so x must be a number up to 2"),
    "item lacks its key": (["--data.train.2.split", "x"], "--data.train.2.path is missing"),
    "file for a list": (["--data.train", "x.jsonl"], "takes a YAML list of sections; one is set by --data.train.0.KEY"),
    "word for a section": (["--adapter", "lora"], "--adapter: is a section: give it keys"),
}


@pytest.mark.parametrize(("args", "message"), FLAG_MISTAKES.values(), ids=FLAG_MISTAKES)
def test_a_wrong_flag_is_named(args, message):
    with pytest.raises(ConfigError) as error:
        flagged(*args)
    assert message in str(error.value)


def test_help_shows_every_flag_with_its_meaning_and_value():
    text = flags_help(read(PRESET), "jaxpost train p.yaml", "about")
    for key in flatten(read(PRESET)):
        assert f"--{key}" in text, key
    assert "--data.eval.0.path" in text
    assert "Scale by alpha / sqrt(r)" in text
    assert "(default: 1e-06)" in text


# --- checks ---

GOOD = ["--data.train", "[{path: a.jsonl}]"]

CHECKS = {
    "no data": (["--data.train", "[]"], "data.train names no file"),
    "weight": (["--data.train.0.weight", "0"], "data.train.0.weight is 0; it must be above 0"),
    "batch": (["--train.batch_size", "6", "--train.microbatches", "4"], "take 1, 2, 3 or 6"),
    "mesh rows": (["--mesh.fsdp", "3"], "train.batch_size 8 cannot be split over mesh.data x mesh.fsdp = 3 devices"),
    "mesh zero": (["--mesh.tensor", "0"], "mesh.tensor is 0; give a number of devices, or -1"),
    "mesh open": (["--mesh.data", "-1"], "mesh.data and mesh.fsdp are all -1"),
    "lr": (["--optim.lr", "0"], "optim.lr is 0; it must be above 0"),
    "b1": (["--optim.b1", "1"], "optim.b1 is 1; it must be at least 0 and below 1"),
    "ema": (["--optim.ema_decay", "1.5"], "optim.ema_decay is 1.5"),
    "schedule": (["--optim.schedule.final", "2"], "optim.schedule.final is 2; it is a fraction"),
    "wsd": (
        ["--optim.schedule", "{kind: wsd, warmup: 0.5, decay: 0.6}"],
        "optim.schedule.warmup and optim.schedule.decay together exceed all steps",
    ),
    "short run": (
        ["--train.steps", "5", "--optim.schedule.warmup", "10"],
        "optim.schedule.warmup (and decay) take 10 steps, but train.steps is 5",
    ),
    "nothing trained": (["--adapter.trainable", "[]"], "adapter.trainable is empty"),
    "rank": (["--adapter", "{kind: lora, rank: 0}"], "adapter.rank is 0; it must be at least 1"),
    "smoothing": (["--loss.label_smoothing", "1"], "loss.label_smoothing is 1"),
    "steps": (["--train.steps", "0"], "train.steps is 0; it must be at least 1"),
    "evaluations": (["--train.eval_every", "5"], "train.eval_every asks for evaluations, but"),
    "run name": (["--run.name", "a/b"], "run.name is 'a/b'; it names a folder"),
    "run folder": (["--run.dir", "runs/{nam}"], "{name} is the only thing in braces"),
    "run folder brace": (["--run.dir", "runs/{"], "{name} is the only thing in braces"),
    "run folder bucket": (["--run.dir", "gs://bucket/{name}"], "mount the bucket and give that folder"),
    "seed": (["--run.seed", "-1"], "run.seed is -1"),
}


def test_a_good_configuration_passes_unchanged():
    config = apply_flags(c.SFTConfig(), GOOD)
    assert check(config) is config


@pytest.mark.parametrize(("args", "message"), CHECKS.values(), ids=CHECKS)
def test_values_that_cannot_be_are_turned_down(args, message):
    with pytest.raises(ConfigError) as error:
        check(apply_flags(c.SFTConfig(), GOOD + args))
    assert message in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        check(apply_flags(c.SFTConfig(), [*GOOD, "--optim.lr", "0", "--train.steps", "0", "--run.name", ""]))
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("method", ["sft", "preference", "reward", "rl"])
def test_a_section_said_in_part_keeps_the_methods_own_defaults(method):
    whole = loads(f"method: {method}")
    part = loads(f"method: {method}\nrun: {{export: false}}\noptim: {{kind: adamw, weight_decay: 0.5}}")
    assert part.run == dataclasses.replace(whole.run, export=False)
    assert part.run.name == method
    assert part.optim == dataclasses.replace(whole.optim, weight_decay=0.5)


def test_a_section_of_another_kind_has_its_own_defaults():
    assert loads("method: preference").optim.lr == 5e-7
    assert loads("method: preference\noptim: {kind: lion}").optim == c.LionSection()
