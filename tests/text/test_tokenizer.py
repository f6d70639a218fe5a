"""The tokenizer: ids and masks against transformers' own, prompts that are prefixes, folders, special ids."""

import json
import re

import numpy as np
import pytest
from toy_text import CHATML, LLAMA2, OWN, fast_tokenizer, save_tokenizer

from jaxpost.text.chat import builtin
from jaxpost.text.tokenizer import Tokenizer, load_tokenizer

TURNS = [
    {"role": "user", "content": "What is the quick brown fox?"},
    {"role": "assistant", "content": "  It is lazy.\n\nHello! Grüße 狐"},
    {"role": "user", "content": "two three"},
    {"role": "assistant", "content": "four"},
]


def pieces_of(tokenizer, turns):
    rendered = tokenizer.render_spans(turns)
    out, at = [], 0
    for start, end in rendered.spans:
        out += [rendered.text[at:start], rendered.text[start:end]]
        at = end
    return [*out, rendered.text[at:]]


@pytest.mark.parametrize("own", ["chatml", "chatml_system", "qwen3", "llama3", "gemma"])
def test_ids_and_mask_equal_those_of_transformers(own):
    special, template = OWN[own]
    tokenizer = Tokenizer(fast_tokenizer(special, template))
    hf = tokenizer.hf
    expected = hf.apply_chat_template(
        TURNS,
        chat_template=tokenizer.chat.text,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **dict(tokenizer.chat.variables),
    )
    (ids, owner) = tokenizer.encode_pieces([pieces_of(tokenizer, TURNS)])[0]
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(owner % 2, expected["assistant_masks"])


@pytest.mark.parametrize("own", ["chatml", "qwen3", "llama3", "gemma"])
def test_a_prompt_has_the_tokens_that_the_model_is_given(own):
    special, template = OWN[own]
    tokenizer = Tokenizer(fast_tokenizer(special, template))
    # Text that would join a token across the edge: the prompt ends in a line end, the answer begins with one.
    turns = [TURNS[0], {"role": "assistant", "content": "\n\nyes"}]
    prompt = tokenizer.encode(tokenizer.render(turns[:1], add_generation_prompt=True))
    ids, owner = tokenizer.encode_pieces([pieces_of(tokenizer, turns)])[0]
    np.testing.assert_array_equal(ids[: len(prompt)], prompt)
    assert owner[len(prompt) - 1] == 0
    assert owner[len(prompt)] == 1


def test_a_token_that_crosses_an_edge_is_cut_there():
    tokenizer = Tokenizer(fast_tokenizer("chatml", CHATML))
    whole = tokenizer.encode("quick brown")
    assert len(tokenizer.encode("qui")) + len(tokenizer.encode("ck brown")) > len(whole)  # so it would cross
    ids, owner = tokenizer.encode_pieces([["qui", "ck brown"]])[0]
    assert ids.tolist() == tokenizer.encode("qui") + tokenizer.encode("ck brown")
    assert tokenizer.decode(ids[owner == 1]) == "ck brown"


def test_a_space_before_a_word_belongs_to_the_word():
    tokenizer = Tokenizer(fast_tokenizer("chatml", CHATML))
    ids, owner = tokenizer.encode_pieces([["the", " fox", "", " jumps"]])[0]
    assert ids.tolist() == tokenizer.encode("the fox jumps")
    assert tokenizer.decode(ids[owner == 3]) == " jumps"


def test_pieces_of_a_tokenizer_that_writes_spaces_before_texts():
    tokenizer = Tokenizer(fast_tokenizer("llama2", LLAMA2, metaspace=True))
    turns = [{"role": "user", "content": "What is it"}, {"role": "assistant", "content": "fox"}]
    ids, owner = tokenizer.encode_pieces([pieces_of(tokenizer, turns)])[0]
    assert ids.tolist() == tokenizer.hf(tokenizer.render(turns), add_special_tokens=False)["input_ids"]
    assert tokenizer.hf.convert_ids_to_tokens(ids[owner == 1].tolist())[-1] == "</s>"
    assert tokenizer.decode(ids[owner == 1]).strip() == "fox"


def test_empty_pieces():
    tokenizer = Tokenizer(fast_tokenizer("chatml", CHATML))
    ids, owner = tokenizer.encode_pieces([["", ""]])[0]
    assert len(ids) == len(owner) == 0


def test_special_ids(tmp_path):
    folder = save_tokenizer(tmp_path / "t", "gemma")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    tokenizer = load_tokenizer(folder)
    ids = {token: tokenizer.hf.convert_tokens_to_ids(token) for token in ("<bos>", "<eos>", "<end_of_turn>")}
    assert tokenizer.bos_id == ids["<bos>"]
    assert tokenizer.eos_id == ids["<eos>"]
    assert tokenizer.end_of_turn_id == ids["<end_of_turn>"]
    assert set(tokenizer.eos_ids) == {ids["<eos>"], ids["<end_of_turn>"], 3, 5}
    assert tokenizer.pad_id == ids["<eos>"]  # there is none of its own
    assert tokenizer.vocab_size == len(tokenizer.hf)
    assert tokenizer.encode("Hi", add_bos=True)[0] == ids["<bos>"]
    assert tokenizer.holds_special("a <eos> b")
    assert not tokenizer.holds_special("a <e o s> b")


def test_the_fingerprint_follows_vocabulary_and_template(tmp_path):
    first = load_tokenizer(save_tokenizer(tmp_path / "a"))
    again = load_tokenizer(save_tokenizer(tmp_path / "b"))
    assert first.fingerprint == again.fingerprint
    others = [
        load_tokenizer(save_tokenizer(tmp_path / "c", "chatml_system")),
        load_tokenizer(tmp_path / "a", chat_template="qwen3"),
        Tokenizer(fast_tokenizer("llama3", OWN["llama3"][1])),
    ]
    assert len({t.fingerprint for t in (first, *others)}) == 4


def test_a_template_file_of_the_user(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(builtin("chatml").replace("<|im_start|>assistant", "<|im_start|>bot"))
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "t"), chat_template=str(path))
    assert "<|im_start|>bot\n" in tokenizer.render(TURNS)


def test_folders_without_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer \(no tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", '{"version": "1.', "[]", "{}"])
def test_damaged_tokenizer_files_name_the_folder(tmp_path, name, content):
    folder = save_tokenizer(tmp_path / "t")
    (folder / name).write_text(content)
    if (name, content) == ("tokenizer_config.json", "{}"):  # nothing that must be there
        assert load_tokenizer(folder).vocab_size
        return
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}: the tokenizer cannot be read \(.+\); download"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", " is not valid JSON"),
        ("[]", " must hold a JSON object"),
        ('{"eos_token_id": "</s>"}', ": eos_token_id is '</s>'"),
        ('{"eos_token_id": [1, null]}', r": eos_token_id is \[1, None\]"),
    ],
)
def test_damaged_generation_settings_are_named(tmp_path, content, words):
    folder = save_tokenizer(tmp_path / "t")
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"generation_config\.json{words}"):
        load_tokenizer(folder)


def test_a_tokenizer_file_cannot_name_code(tmp_path):
    folder = save_tokenizer(tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    assert load_tokenizer(folder).render(TURNS) == load_tokenizer(save_tokenizer(tmp_path / "u")).render(TURNS)
