"""Masks against Python's own re and json: every text they allow is right, and every right text is allowed."""

import itertools
import json
import re

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Fast
from toy_text import CHATML, LLAMA2, fast_tokenizer
from transformers import PreTrainedTokenizerFast

from jaxpost.generate.grammar import Constraint, compile
from jaxpost.generate.matcher import all_but, has, masks, only, tokens_of
from jaxpost.generate.schema import finite
from jaxpost.text.tokenizer import Tokenizer, load_tokenizer

ROWS = 390  # a model with more rows than the tokenizer has tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(fast_tokenizer("chatml", CHATML))


def write(tokenizer, constraint, seed, *, most=150, vocab_size=ROWS):
    """A random text through the masks; None where it is still going on after `most` tokens."""
    rng = np.random.default_rng(seed)
    matcher, out = compile(constraint, tokenizer, vocab_size=vocab_size).start(), []
    for _ in range(most):
        allowed = tokens_of(matcher.mask())
        token = int(rng.choice(allowed))
        if rng.random() < 0.2 and set(allowed) & set(tokenizer.eos_ids):
            token = tokenizer.eos_ids[0]
        assert matcher.advance(token)
        if token in tokenizer.eos_ids:
            assert matcher.finished
            assert not matcher.advance(token)
            return tokenizer.decode(out, skip_special_tokens=False)
        out.append(token)
    return None


def language(tokenizer, constraint, *, vocab_size=ROWS) -> set[str]:
    """Every text of a finite language, by trying every token that is allowed."""
    out: set[str] = set()

    def walk(matcher, tokens):
        for token in tokens_of(matcher.mask()):
            if token in tokenizer.eos_ids:
                out.add(tokenizer.decode(tokens, skip_special_tokens=False))
                continue
            ahead = matcher.fork()
            assert ahead.advance(token)
            walk(ahead, [*tokens, token])

    walk(compile(constraint, tokenizer, vocab_size=vocab_size).start(), [])
    return out


REGEXES = [
    r"[a-c]+@(?:x|yz)\.com",
    r"^\d{1,3}(?:\.\d{1,3}){3}$",
    r"(?:The|the) (?:quick|lazy) \w{0,5}[.!]?",
    r"(?i)yes|no",
    r"[^a-z]{0,4}é*",
    r"(?s).{0,6}",
    r".{2,5}",
    "a\nb|a/b",
    r"\s?\S\s?",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_random_texts_match_the_regex(tokenizer, regex):
    texts = [write(tokenizer, Constraint(regex=regex), seed) for seed in range(30)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 20
    for text in ended:
        assert re.fullmatch(regex, text), text


SCHEMAS = [
    (
        {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        lambda v: set(v) == {"name", "age"} and len(v["name"]) <= 5 and type(v["age"]) is int and v["age"] >= 0,
    ),
    (
        {"type": "array", "items": {"enum": ["a", 1, None, {"k": [True]}]}, "minItems": 1, "maxItems": 3},
        lambda v: 1 <= len(v) <= 3 and all(item in ("a", 1, None, {"k": [True]}) for item in v),
    ),
    (
        {"anyOf": [{"type": "boolean"}, {"type": "number", "maximum": 10, "minimum": -10}]},
        lambda v: isinstance(v, bool) or -10 <= v <= 10,
    ),
    (
        {
            "$defs": {"tree": {"type": "object", "properties": {"t": {"$ref": "#/$defs/tree"}}}},
            "allOf": [{"$ref": "#/$defs/tree"}],
            "additionalProperties": False,
        },
        lambda v: isinstance(v, dict),
    ),
    ({"type": "string", "pattern": "^[a-f]{2,3}$"}, lambda v: re.fullmatch("[a-f]{2,3}", v)),
    ({"const": 'quoted "\\ text\n'}, lambda v: v == 'quoted "\\ text\n'),
    ({}, lambda v: True),
]


@pytest.mark.parametrize(("schema", "right"), SCHEMAS)
def test_random_texts_are_json_of_the_schema(tokenizer, schema, right):
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        Draft202012Validator = None
    texts = [write(tokenizer, Constraint(json=schema), seed) for seed in range(25)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 5
    for text in ended:
        value = json.loads(text)
        assert right(value), text
        if Draft202012Validator is not None:
            Draft202012Validator(schema).validate(value)
        assert not re.search(r"\s{21}", text)


def test_every_choice_can_be_written_and_nothing_else(tokenizer):
    texts = [
        "a",
        "ab",
        "The quick fox",
        "\n",
        "é",
        "\x00x",
        '"q"',
        "\\d",
        "a/b",
        "<|im_end|>",
        "\u2028",
        "😀",
        " ",
        ".",
    ]
    assert language(tokenizer, Constraint(choice=texts)) == set(texts)


@pytest.mark.parametrize("regex", ["(?:a|b){1,3}c?", "a?b?c?", "(?:ab|abc)(?:c|)", "(?:a|cc){2}"])
def test_a_small_language_is_enumerated_exactly(tokenizer, regex):
    texts = ("".join(letters) for n in range(6) for letters in itertools.product("abc", repeat=n))
    assert language(tokenizer, Constraint(regex=regex)) == {text for text in texts if re.fullmatch(regex, text)}


def test_end_tokens_are_allowed_exactly_where_the_text_may_stop(tokenizer):
    regex = r"a(?:bc?)*|The( quick)?"
    rng = np.random.default_rng(0)
    for _ in range(30):
        matcher, tokens = compile(Constraint(regex=regex), tokenizer).start(), []
        for _ in range(12):
            stops = [has(matcher.mask(), end) for end in tokenizer.eos_ids]
            assert set(stops) == {re.fullmatch(regex, tokenizer.decode(tokens)) is not None}
            going = [t for t in tokens_of(matcher.mask()) if t not in tokenizer.eos_ids]
            assert matcher.finished == (not going)
            if not going:
                break
            tokens.append(int(rng.choice(going)))
            assert matcher.advance(tokens[-1])


def test_special_tokens_and_rows_without_a_token_are_never_text(tokenizer):
    matcher = compile(Constraint(regex="(?s).*"), tokenizer, vocab_size=ROWS).start()
    special = set(tokenizer.hf.all_special_ids) - set(tokenizer.eos_ids)
    allowed = set(tokens_of(matcher.mask()))
    assert special
    assert not allowed & special
    assert max(allowed) < tokenizer.vocab_size < ROWS
    assert set(tokenizer.eos_ids) < allowed


def test_end_tokens_may_be_given_and_are_then_no_text(tokenizer):
    [a] = tokenizer.encode("a")
    matcher = compile(Constraint(regex="[ab]{0,2}"), tokenizer, end_ids=[a]).start()
    assert [tokenizer.decode([t]) for t in tokens_of(matcher.mask())] == ["a", "b"]
    assert matcher.advance(a)
    assert matcher.finished
    assert not has(compile(Constraint(regex="[ab]{1,2}"), tokenizer, end_ids=[a]).start().mask(), a)


def test_a_model_may_have_fewer_rows_than_the_tokenizer_has_tokens(tokenizer):
    matcher = compile(Constraint(regex="(?s).*"), tokenizer, vocab_size=300, end_ids=[0]).start()
    whole = compile(Constraint(regex="(?s).*"), tokenizer, end_ids=[0]).start()
    assert len(matcher.mask()) == 10
    assert tokens_of(matcher.mask()) == [t for t in tokens_of(whole.mask()) if t < 300]


def test_forced_tokens_are_the_only_ones(tokenizer):
    matcher = compile(Constraint(json={"const": {"The quick": 1}}), tokenizer).start()
    rng = np.random.default_rng(1)
    seen = 0
    while not has(matcher.mask(), tokenizer.eos_ids[0]):
        ahead = matcher.fork()
        for token in matcher.forced():
            assert tokens_of(ahead.mask()) == [token]
            ahead.advance(token)
            seen += 1
        matcher.advance(int(rng.choice(tokens_of(matcher.mask()))))
    assert seen > 0
    assert matcher.forced() == list(tokenizer.eos_ids)
    choice = compile(Constraint(choice=["The quick", "No"]), tokenizer).start()
    assert choice.forced() == []
    choice.advance(tokenizer.encode("N")[0])
    assert choice.forced() == [*tokenizer.encode("o"), *tokenizer.eos_ids]


def test_forks_go_their_own_way(tokenizer):
    a, b = tokenizer.encode("ab")
    first = compile(Constraint(regex="(?:ab)+"), tokenizer).start()
    assert first.advance(a)
    before = first.mask().copy()
    second = first.fork()
    assert second.advance(b)
    assert second.advance(a)
    np.testing.assert_array_equal(first.mask(), before)
    assert first.advance(b)
    assert has(first.mask(), tokenizer.eos_ids[0])
    assert not has(second.mask(), tokenizer.eos_ids[0])


def test_a_refused_token_changes_nothing(tokenizer):
    a, b = tokenizer.encode("ab")
    matcher = compile(Constraint(regex="aab"), tokenizer).start()
    for wrong in (b, tokenizer.eos_ids[0], -1, 10**6):
        assert not matcher.advance(wrong)
    assert [matcher.advance(token) for token in (a, a, b)] == [True, True, True]
    assert matcher.problem is None


def test_a_batch_of_masks_is_the_masks_of_its_rows(tokenizer):
    json_, yes = Constraint(json={"type": "array"}), Constraint(choice=["yes"])
    rows = [compile(c, tokenizer, vocab_size=ROWS).start() for c in (json_, yes, json_)]
    rows[2].advance(tokenizer.encode("[")[0])
    got = masks([rows[0], None, rows[1], rows[2], rows[0]], ROWS)
    assert got.dtype == np.uint32
    assert got.shape == (5, -(-ROWS // 32))
    alone = [compile(c, tokenizer, vocab_size=ROWS).start() for c in (json_, yes, json_)]
    alone[2].advance(tokenizer.encode("[")[0])
    np.testing.assert_array_equal(got[[0, 2, 3, 4]], [alone[i].mask() for i in (0, 1, 2, 0)])
    assert tokens_of(got[1]) == list(range(ROWS))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 70])
def test_bits_of_a_mask(size):
    some = sorted({0, size // 2, size - 1})
    assert tokens_of(only(size, some)) == some
    assert tokens_of(all_but(size, some)) == [t for t in range(size) if t not in some]
    assert [t for t in range(-3, size + 40) if has(only(size, some), t)] == some


def test_a_grammar_is_compiled_once(tokenizer):
    one, other = ({"type": "object", "required": ["b", "a"]} for _ in range(2))
    assert compile(Constraint(json=one), tokenizer) is compile(Constraint(json=other), tokenizer)
    assert compile(Constraint(choice=["x"]), tokenizer) is not compile(Constraint(regex="x"), tokenizer)


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


ENDLESS = {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "exactly one.*none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one.*regex, choice"),
        ({"regex": "a["}, "regex 'a\\['.*unclosed character class"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": r"[^\s\S]"}, "regex .* is unsatisfiable"),
        ({"regex": r"a[^\s\S]"}, "regex .* is unsatisfiable"),
        ({"regex": "\ud800"}, "surrogate"),
        ({"choice": []}, "at least one"),
        ({"choice": "yes"}, "a list"),
        ({"choice": ["a", ""]}, "choice 1"),
        ({"json": '{"type":'}, "not JSON"),
        ({"json": "[1]"}, "is an object"),
        ({"json": "[" * 100_000}, "nested too deeply"),
        ({"json": nested(5000)}, "nested too deeply|recursion limit"),
        ({"json": nested(300)}, "the JSON schema .* cannot be used: recursion limit"),
        ({"json": {"x-guidance": {"y": 1}}}, "the JSON schema .* cannot be used"),
        ({"json": {"type": "foo"}}, "Invalid type: foo"),
        ({"json": "false"}, "is an object"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsatisfiable"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum .5. is greater"),
        ({"json": {"anyOf": [{"type": "integer", "minimum": -(2**63), "maximum": -(2**63)}]}}, "is below -2.62"),
        ({"json": {"not": {"type": "string"}}}, "Unimplemented keys.*not"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": ENDLESS}, "no text ends"),
    ],
)
def test_a_bad_grammar_is_named(tokenizer, given, told):
    with pytest.raises(ValueError, match=told):
        compile(Constraint(**given), tokenizer)


@pytest.mark.parametrize(
    ("schema", "ends"),
    [
        (True, True),
        (ENDLESS, False),
        (ENDLESS | {"type": ["object", "null"]}, True),
        ({"anyOf": [ENDLESS | {"properties": {"a": {"$ref": "#/anyOf/0"}}}, {"type": "null"}]}, True),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "array", "prefixItems": [True], "items": {"$ref": "#"}, "minItems": 1}, True),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, False),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"allOf": [{"$ref": "#/$defs/c"}]}, "c": {"type": "null"}}}, True),
        ({"type": "object", "required": ["x"], "additionalProperties": {"$ref": "#"}}, False),
    ],
)
def test_whether_a_schema_describes_a_text_that_ends(schema, ends):
    assert finite(schema) is ends


def test_bytes_written_as_tokens_of_their_own():
    """Llama 2's kind: letters it has not are written byte by byte."""
    texts = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "a",
        "b",
        "e",
        "h",
        "T",
        "▁a",
        "Th",
        "ab",
    ]
    merges = [("▁", "a"), ("T", "h"), ("a", "b")]
    core = Fast(models.BPE({t: i for i, t in enumerate(texts)}, merges, unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, **named))
    assert language(tokenizer, Constraint(choice=["The", "é", "b a"]), vocab_size=None) == {"The", "é", "b a"}


def test_spaces_written_as_letters_and_tokenizers_whose_bytes_are_unknown():
    llama = Tokenizer(fast_tokenizer("llama2", LLAMA2, metaspace=True))
    assert language(llama, Constraint(choice=["The quick fox", "four"]), vocab_size=None) == {"The quick fox", "four"}
    plain = Fast(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    unknown = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<e>"))
    with pytest.raises(ValueError, match="cannot use this tokenizer"):
        compile(Constraint(regex="a"), unknown)
    with pytest.raises(ValueError, match="needs end tokens within"):
        compile(Constraint(regex="a"), llama, end_ids=[])


def test_a_text_that_the_tokens_cannot_spell_is_unsatisfiable_or_a_problem():
    llama = Tokenizer(fast_tokenizer("llama2", LLAMA2, metaspace=True))
    with pytest.raises(ValueError, match="unsatisfiable"):
        compile(Constraint(choice=["ж"]), llama)
    matcher = compile(Constraint(choice=["aж"]), llama).start()
    assert matcher.advance(*llama.hf.convert_tokens_to_ids(["a"]))
    assert tokens_of(matcher.mask()) == list(llama.eos_ids)
    assert matcher.finished
    assert matcher.problem


def test_a_folder_of_bytes(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    assert language(tokenizer, Constraint(choice=["one", "öne"]), vocab_size=264) == {"one", "öne"}
