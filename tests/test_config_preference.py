"""`method: preference`: what its configuration can and cannot say."""

import dataclasses
import typing

import pytest

from jaxpost.assemble.preference_losses import reads_mismatched, reads_reference
from jaxpost.config_check_preference import check_preference, data_kind, needs_mismatched, needs_reference
from jaxpost.config_check_rl import check_config
from jaxpost.config_flags import apply_flags, flags_help
from jaxpost.config_io import ConfigError, diff, dump, loads
from jaxpost.config_preference import PreferenceConfig, RefreshedReference
from jaxpost.config_preference_losses import PreferenceLossSection

GOOD = ["--data.train.0.path", "a.jsonl"]
KINDS = typing.get_args(PreferenceLossSection)


def test_a_preset_is_read_written_and_compared():
    text = "{method: preference, losses: [{kind: dpo, beta: 1e-2}, {kind: nll, weight: 0.2}], reference: {kind: live}}"
    config = loads(text)
    assert isinstance(config, PreferenceConfig)
    assert [loss.kind for loss in config.losses] == ["dpo", "nll"]
    assert loads(dump(config)) == config
    changes = {change.key: (change.old, change.new) for change in diff(PreferenceConfig(), config)}
    assert changes["losses.0.beta"] == ("0.1", "0.01")
    assert changes["reference.kind"] == ("cached", "live")


def test_flags_change_losses_and_the_reference():
    config = apply_flags(PreferenceConfig(), [*GOOD, "--losses.0.kind", "ipo", "--reference.kind", "refreshed"])
    assert config.losses[0].kind == "ipo"
    assert config.reference == RefreshedReference()
    assert check_config(config) is config
    assert "--losses.0.beta" in flags_help(config, "jaxpost train p.yaml", "")


CHECKS = {
    "no loss": (["--losses", "[]"], "losses is empty; say which"),
    "twice": (["--losses", "[{kind: dpo}, {kind: dpo}]"], "losses holds dpo 2 times"),
    "pairs and single answers": (["--losses", "[{kind: dpo}, {kind: kto}]"], "mixes kto, which judges single answers"),
    "reference needed": (["--reference.kind", "none"], "compare with a reference, but reference.kind is none"),
    "reference unread": (["--losses", "[{kind: simpo}]"], "losses (simpo) read no reference; set reference.kind none"),
    "xpo": (["--losses", "[{kind: dpo}, {kind: xpo}]"], "xpo explores with answers that the reference draws"),
    "beta": (["--losses", "[{kind: dpo, beta: 0}]"], "losses.0.beta is 0; it must be above 0"),
    "gamma": (["--losses", "[{kind: simpo, gamma: -1}]"], "losses.0.gamma is -1"),
    "smoothing": (["--losses", "[{kind: robust, label_smoothing: 0.5}]"], "below 0.5"),
    "exo": (["--losses", "[{kind: exo, label_smoothing: 0}]"], "at which exo's divergence is infinite"),
    "alpha unread": (
        ["--losses", "[{kind: dpo, alpha: 0.3}]"],
        "losses.0.alpha is read with losses.0.divergence alpha",
    ),
    "weights unread": (
        ["--losses", "[{kind: bco, least_prompt_weight: 0.1}]"],
        "losses.0.least_prompt_weight is read with losses.0.prompt_weights density_ratio",
    ),
    "objectives": (["--data.objectives", "[a, b]"], "data.objectives is for reward models of several scores"),
    "ld_alpha": (["--losses", "[{kind: ld_dpo, ld_alpha: 2}]"], "losses.0.ld_alpha is 2; it must be from 0 to 1"),
    "every": (["--reference", "{kind: refreshed, every: 0}"], "reference.every is 0; it must be at least 1"),
    "mix": (["--reference", "{kind: refreshed, mix: 0}"], "reference.mix is 0"),
    "mixed adapters": (
        ["--reference", "{kind: refreshed, mix: 0.5}", "--adapter.kind", "lora"],
        "would mix the factors of adapters and not their products",
    ),
    "mask": (["--data.mask", "all"], "data.mask is all; only answers are judged"),
    "shared sections": (["--optim.lr", "0"], "optim.lr is 0; it must be above 0"),
    "rows": (["--train.batch_size", "6", "--train.microbatches", "4"], "not a multiple of train.microbatches 4"),
}


@pytest.mark.parametrize(("args", "message"), CHECKS.values(), ids=CHECKS)
def test_values_that_cannot_be_are_turned_down(args, message):
    with pytest.raises(ConfigError) as error:
        check_preference(apply_flags(PreferenceConfig(), GOOD + args))
    assert message in str(error.value)


@pytest.mark.parametrize("section", KINDS, ids=lambda section: section().kind)
def test_the_check_knows_what_each_loss_reads(section):
    losses = (section(),)
    assert needs_reference(losses) == reads_reference(losses)
    assert needs_mismatched(losses) == reads_mismatched(losses)
    assert data_kind(losses) in ("pairs", "unpaired")
    numbers = [field.name for field in dataclasses.fields(section) if field.type == "float"]
    assert "weight" in numbers
