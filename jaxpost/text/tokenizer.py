"""A tokenizer with its training template: text to tokens and back, conversations to tokens with spans.

A thin layer over transformers' fast tokenizers. Nothing is executed from a tokenizer's folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost.disk import read_json
from jaxpost.text.chat import PROBES, ChatTemplate, Rendered, TemplateError, check_prefixes, choose_template
from jaxpost.text.messages import DataError, Message, parse_message


class Pieces(NamedTuple):
    """Tokens of a text made of pieces: ids int32 [n], and `owner[t]`, the piece that token t begins in."""

    ids: np.ndarray
    owner: np.ndarray


class Tokenizer:
    """Tokens, special ids and the chat template of one model.

    Attributes:
      bos_id, eos_id: ids, or None where the tokenizer has none.
      pad_id: the id that fills rows; it is always masked, so any id serves where there is no padding token.
      end_of_turn_id: the token that ends an assistant turn, or None without a chat template.
      eos_ids: every id that ends a generation.
      special_ids: ids of all special tokens.
      fingerprint: changes with the vocabulary, the template and the special tokens.
    """

    def __init__(self, hf: Any, *, chat_template: str | None = None, extra_eos_ids: Sequence[int] = ()):
        import tokenizers

        self.hf = hf
        self.chat_request = chat_template
        state = json.loads(hf.backend_tokenizer.to_str())
        # Templates write special tokens themselves; offsets must not be trimmed to tell where a piece begins.
        state.update(post_processor=None, truncation=None, padding=None)
        self._fast = tokenizers.Tokenizer.from_str(json.dumps(state))
        self.bos_id, self.eos_id = hf.bos_token_id, hf.eos_token_id
        self.vocab_size = len(hf)
        self.adds_bos = self.bos_id is not None and hf("a")["input_ids"][:1] == [self.bos_id]
        first = self._fast.encode("a").tokens
        self._adds_space = bool(first) and first[0].startswith("▁")
        self._chat: ChatTemplate | None = None
        self._problem = TemplateError("the tokenizer has no chat template")
        special = {key: str(value) for key, value in hf.special_tokens_map.items() if isinstance(value, str)}
        own = hf.chat_template
        if isinstance(own, Mapping):
            own = own.get("default")
        self.end_of_turn_id: int | None = None
        try:
            chat = choose_template(own, special, chat_template)
            check_prefixes(chat)
            self._chat, self.end_of_turn_id = chat, self._end_of_turn(chat)
        except TemplateError as error:
            self._problem = error  # plain text needs no template, so this waits for the first conversation
            if chat_template is not None:
                raise
        eos = (self.eos_id, self.end_of_turn_id, *extra_eos_ids)
        self.eos_ids = tuple(sorted({i for i in eos if i is not None}))
        added = {i: str(t.content) for i, t in hf.added_tokens_decoder.items() if t.special}
        self.special_ids = tuple(sorted(added))
        tokens = sorted(set(added.values()), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self.pad_id = next((i for i in (hf.pad_token_id, self.eos_id) if i is not None), 0)
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
        digest.update(repr((self._chat, self.bos_id, self.eos_ids, self.adds_bos)).encode())
        self.fingerprint = digest.hexdigest()

    @property
    def chat(self) -> ChatTemplate:
        """The training template. Raises: TemplateError that says why there is none."""
        if self._chat is None:
            raise self._problem
        return self._chat

    def _end_of_turn(self, chat: ChatTemplate) -> int:
        rendered = chat.render(PROBES[1])
        start, end = rendered.spans[-1]
        last = self._fast.encode(rendered.text[start:end]).ids[-1]
        if last != self.eos_id and last not in self.hf.added_tokens_decoder:
            raise TemplateError(
                f"the chat template {chat.name} trains no end-of-turn token: a turn ends in "
                f"{rendered.text[start:end][-12:]!r}, whose last token {self.hf.convert_ids_to_tokens(last)!r} is not "
                "special; put the end-of-turn token inside {% generation %}, or choose the template of this tokenizer"
            )
        return last

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written in the text are recognised; none is added but `add_bos`."""
        try:
            ids = self._fast.encode(text).ids
        except TypeError:
            raise DataError("the text holds half a surrogate pair, which UTF-8 cannot write") from None
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def holds_special(self, text: str) -> bool:
        """Whether a text has special tokens written out in it."""
        return self._special is not None and self._special.search(text) is not None

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files (with its own chat template) into a folder."""
        self.hf.save_pretrained(str(folder))

    def encode_pieces(self, batch: Sequence[Sequence[str]]) -> list[Pieces]:
        """Tokens of texts given in pieces, such that a prefix of pieces has the tokens it has alone.

        Where a token of the whole text would cross from one piece into the next, the pieces are encoded one by
        one: so a prompt's tokens are those that the model is given when it writes the rest.
        """
        out = []
        for pieces, whole in zip(batch, self._fast.encode_batch(["".join(p) for p in batch]), strict=True):
            bounds = np.cumsum([len(piece) for piece in pieces])
            offsets = np.asarray(whole.offsets, np.int64).reshape(-1, 2)
            owner = np.minimum(np.searchsorted(bounds, offsets[:, 0], side="right"), len(pieces) - 1)
            if np.any(offsets[:, 1] > bounds[owner]) and not self._adds_space:
                parts = [part.ids for part in self._fast.encode_batch(list(pieces))]
                owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
                out.append(Pieces(np.concatenate(parts).astype(np.int32), owner))
            else:
                out.append(Pieces(np.asarray(whole.ids, np.int32), owner))
        return out

    def render(
        self,
        messages: Sequence[Message | Mapping],
        tools: Sequence[Mapping] | None = None,
        *,
        add_generation_prompt: bool = False,
        system: str | None = None,
    ) -> str:
        """A conversation's text; with `add_generation_prompt` it ends where the assistant begins to write.

        Args:
          system: goes before a conversation that has no system turn. None: as the template does it; "": no system
            turn, not even the template's own.
        """
        return self.render_spans(messages, tools, add_generation_prompt=add_generation_prompt, system=system).text

    def render_spans(
        self,
        messages: Sequence[Message | Mapping],
        tools: Sequence[Mapping] | None = None,
        *,
        add_generation_prompt: bool = False,
        system: str | None = None,
    ) -> Rendered:
        """A conversation's text and the spans that the assistant writes; arguments as `render`."""
        parsed = [m if isinstance(m, Message) else parse_message(m) for m in messages]
        chat = self.chat
        if system and not (parsed and parsed[0].role == "system"):
            parsed = [Message(role="system", content=system), *parsed]
        if system == "":
            kept = tuple((name, value) for name, value in chat.variables if name != "default_system")
            chat = dataclasses.replace(chat, variables=kept)
        return chat.render(parsed, tools, add_generation_prompt=add_generation_prompt)


def load_tokenizer(folder: str | Path, *, chat_template: str | None = None) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder and finds its training template.

    Args:
      folder: a folder with tokenizer.json and tokenizer_config.json.
      chat_template: a built-in template's name or a .jinja file, in place of the recognised one.
    Raises: FileNotFoundError, TemplateError (at once where a template was asked for, else at first use).
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer folder {folder}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(f"{folder} holds no tokenizer (no tokenizer.json, tokenizer.model or vocab.json)")
    try:
        hf = _read(folder)
    except Exception as error:  # the libraries below raise many kinds, bare Exception among them
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{folder}: the tokenizer cannot be read ({why}); download or export its tokenizer files again"
        ) from error
    if not isinstance(hf, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer in {folder} has no fast version (tokenizer.json), which is needed here")
    return Tokenizer(hf, chat_template=chat_template, extra_eos_ids=_generation_eos(folder))


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except ValueError:
        if not (folder / "tokenizer.json").is_file():
            raise
        # The folder names a class of its own, in code that is never run; tokenizer.json says all without it.
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _generation_eos(folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    if not path.is_file():
        return ()
    eos = read_json(path).get("eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{path}: eos_token_id is {eos!r:.80}; it must be a token's number, a list of them, or null")
    return ids
