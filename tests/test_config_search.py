"""The sections of `method: search`: every key is a parameter of the function that its kind names, with its default."""

import dataclasses
import inspect
import typing

import pytest

from jaxpost.assemble.search_methods import METHODS, VALUES, make_method
from jaxpost.config_check_search import check_search
from jaxpost.config_flags import apply_flags
from jaxpost.config_io import ConfigError, dump, hints, loads, tag_of
from jaxpost.config_search import SearchConfig
from jaxpost.config_search_trees import MeasuringSection, SearchMethodSection
from jaxpost.search.difficulty import Measuring

KINDS = {tag_of(section)[1]: section for section in typing.get_args(SearchMethodSection)}
NESTED = {"allocate": {"greedy", "beam", "tree", "measuring"}, "metacognition": {"cheap", "dear"}}


def test_every_method_has_a_kind():
    assert set(METHODS) == set(KINDS.values())
    wanted = (
        "greedy sample token_beam best_of_n self_consistency step_beam dvts rebase tree_of_thoughts mcts token_mcts"
    )
    assert set(KINDS) == set(f"{wanted} rap rstar refine debate budget_forcing oreo allocate metacognition".split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_has_the_functions_parameters_with_its_defaults(kind):
    section = KINDS[kind]
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(METHODS[section]).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    ours = {field.name: field.default for field in dataclasses.fields(section) if field.name != "kind"}
    nested = NESTED.get(kind, set())
    assert set(ours) - nested == set(theirs) - nested
    for name, value in ours.items():
        if name not in nested and value is not None:
            assert VALUES.get(name, {value: value})[value] == theirs[name], name


def test_measuring_has_the_functions_fields():
    ours = {field.name: field for field in dataclasses.fields(MeasuringSection)}
    theirs = {field.name: field for field in dataclasses.fields(Measuring)}
    assert set(theirs) - set(ours) == {"past"}
    for name, field in ours.items():
        if name not in ("weights", "sampling") and field.default is not None:
            assert field.default == theirs[name].default, name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_chosen_by_a_flag_and_makes_a_method(kind):
    config = apply_flags(
        SearchConfig(), ["--search.kind", kind, "--prompts.path", "a.txt", "--sampling.temperature", "0.5"]
    )
    assert config.search.kind == kind
    assert loads(dump(config)) == config
    check_search(config)
    make_method(config.search)


BAD = {
    "unknown key": ("search: {kind: best_of_n, m: 3}", "search.m: unknown key; known: "),
    "near key": ("search: {kind: step_beam, widht: 3}", "did you mean width?"),
    "unknown method": ("search: {kind: best_off_n}", "did you mean best_of_n?"),
    "unknown verifier": ("verifier: {parts: [{kind: modle}]}", "did you mean model?"),
    "no model": ("verifier: {parts: [{kind: model}]}", "verifier.parts.0 names no reward model"),
    "no rule": ("verifier: {parts: [{kind: rule}]}", "reward.parts is empty"),
    "names": ("verifier: {parts: [{kind: logic}, {kind: logic}]}", "each needs a name of its own"),
    "gate": ("verifier: {combine: gate, parts: [{kind: logic}]}", "one behind it"),
    "weight": ("verifier: {parts: [{kind: logic, weight: 2}]}", "weights belong to verifier.combine mean"),
    "all alike": ("{sampling: {temperature: 0}, search: {kind: best_of_n}}", "all are alike"),
    "separator": ("search: {kind: step_beam, separator: ''}", "separator is empty"),
    "endless": ("prompts: {kind: arithmetic}", "say how many prompts with --count"),
    "no file": ("budget: 5", "say --prompts FILE"),
    "budget": ("budget: 0", "budget is 0; it must be at least 1"),
    "template": ("prompts: {kind: plain, path: a, template: x}", "it must hold {prompt}"),
    "few shot": ("thoughts: {kind: few_shot}", "needs worked examples"),
    "name": ("run: {name: a/b}", "without slashes"),
    "judge": ("verifier: {parts: [{kind: judge, mode: rubric}]}", "a rubric needs some"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_is_a_sentence(text, said):
    body = text[1:-1] if text.startswith("{") else text
    with pytest.raises(ConfigError) as caught:
        check_search(loads("{method: search, " + body + "}"))
    assert said in str(caught.value)


def test_parameters_that_contradict_each_other_are_told_by_the_method():
    config = apply_flags(SearchConfig(), ["--search.kind", "self_consistency", "--search.keep", "2"])
    with pytest.raises(ValueError, match="search: keep is 2"):
        make_method(config.search)


def test_every_section_says_what_it_is():
    for section in KINDS.values():
        assert section.__doc__
        assert not section.__doc__.startswith(section.__name__ + "(")
        assert hints(section)


@pytest.mark.parametrize("kind", KINDS)
def test_a_methods_defaults_pass_its_check_and_what_it_cannot_follow_does_not(kind):
    prompts = "prompts: {kind: arithmetic}\ncount: 1\nmethod: search\n"
    check_search(loads(f"{prompts}search: {{kind: {kind}}}"))
    whole = [f.name for f in dataclasses.fields(KINDS[kind]) if f.type == "int" and f.name not in ("seed", "moves")]
    for name in whole:
        with pytest.raises(ConfigError, match=f"search.{name} is -1; it must be at least"):
            check_search(loads(f"{prompts}search: {{kind: {kind}, {name}: -1}}"))
