"""The tokenizer inside a GGUF file, rebuilt as the tokenizer.json and tokenizer_config.json that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words, runs of digits by `digits`, punctuation and space, then bytes as printable characters."""
    pattern = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_TAIL}"
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokeniser that GGUF calls `name` (tokenizer.ggml.pre)."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "llama-bpe":
        return _split(r"\p{N}{1,3}")
    if name == "qwen2":
        return _split(r"\p{N}")
    raise ValueError(f"the pre-tokeniser {name!r} is not known (only gpt-2, smollm, llama-bpe, qwen2)")


def build_tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE from GGUF metadata: vocabulary, merges, pre-tokeniser, control tokens.

    Raises ValueError for a SentencePiece tokenizer or an unknown pre-tokeniser.
    """
    kind = meta.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"the tokenizer model {kind!r} is not read, only byte-level BPE ('gpt2')")
    pre = meta.get("tokenizer.ggml.pre", "gpt-2")
    tokens = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    # Unused entries only pad the vocabulary to a round size; their text must not become a token.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(t, special=kind == _CONTROL, normalized=False) for t, kind in added])
    if meta.get("tokenizer.ggml.add_bos_token", False):
        bos = meta["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
        )
    return tokenizer


def write_tokenizer(meta: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json; returns bos, eos and pad token ids as config.json names them."""
    tokenizer = build_tokenizer(meta)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {
        role: meta[f"tokenizer.ggml.{name}_token_id"]
        for role, name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items()
        if f"tokenizer.ggml.{name}_token_id" in meta
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta.get(f"{meta['general.architecture']}.context_length"),
        **{f"{role}_token": tokens[i] for role, i in ids.items()},
    }
    if "tokenizer.chat_template" in meta:
        settings["chat_template"] = meta["tokenizer.chat_template"]
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return {f"{role}_token_id": int(ids[role]) for role in ("bos", "eos", "pad") if role in ids}
