"""Reward models in transformers' layouts: `...ForSequenceClassification` and `...ForTokenClassification` folders.

Both keep the model below the head under its usual names and the head as `score.weight` [K, D] (`score.bias` [K] of a
token classifier); they have no `lm_head`. A sequence classifier's scores are read after a row's last token that is no
padding, a token classifier's after every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpost.disk import read_json
from jaxpost.models.heads import head_table
from jaxpost.types import Params, ParamSpec
from jaxpost.weights.files import Checkpoint
from jaxpost.weights.huggingface import Source

NAMES = {"kernel": "score.weight", "bias": "score.bias"}
_SEQUENCE, _TOKEN = "ForSequenceClassification", "ForTokenClassification"
# Text models whose classes are named after more than their family, or that have no class for tokens.
_CLASSES = {"gemma3": {_SEQUENCE: "Gemma3Text" + _SEQUENCE, _TOKEN: "Gemma3Text" + _SEQUENCE}}


class StoredHead(NamedTuple):
    """The head of a model folder."""

    params: Params
    """{"kernel": float32 [D, K], "bias": float32 [K] where there is one}."""
    labels: tuple[str, ...]
    """A name for each output."""
    tokens: bool
    """A token classifier: scores are meant to be read at several tokens."""

    @property
    def outputs(self) -> int:
        return self.params["kernel"].shape[1]


def has_head(folder: Path | str) -> bool:
    """Whether a model folder says that it is a sequence or token classifier."""
    return _kind(read_json(Path(folder) / "config.json")) is not None


def _kind(hf: Mapping[str, Any]) -> str | None:
    names = hf.get("architectures") or [""]
    return next((kind for kind in (_SEQUENCE, _TOKEN) if str(names[0]).endswith(kind)), None)


def read_head(folder: Path | str) -> StoredHead:
    """The head of a model folder in either layout.

    Raises:
      ValueError: the folder holds another kind of model, no head, or one that is not a single linear layer.
    """
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    kind = _kind(hf)
    if kind is None:
        what = (hf.get("architectures") or ["no architecture"])[0]
        raise ValueError(
            f"{folder} is no reward model: its config.json names {what}, not a {_SEQUENCE} or {_TOKEN} class; "
            "train one with `method: reward`, or give a model folder that has a head (score.weight)"
        )
    files = Checkpoint(folder)
    names = {leaf: name for leaf, name in NAMES.items() if name in files.names}
    if "kernel" not in names:
        near = sorted(n for n in files.names if n.startswith(("score", "classifier", "v_head", "value_head")))
        more = f" (it has {', '.join(near[:3])})" if near else ""
        raise ValueError(f"{folder} has no tensor score.weight{more}; only a head that is one linear layer is read")
    whole = {leaf: files.read(name, (slice(None),) * len(files.info(name).shape)) for leaf, name in names.items()}
    params = {leaf: np.asarray(x, np.float32) for leaf, x in whole.items()}
    params["kernel"] = np.ascontiguousarray(params["kernel"].T)
    count = params["kernel"].shape[1]
    given = hf.get("id2label") or {}
    labels = tuple(str(given.get(str(i), f"LABEL_{i}")) for i in range(count))
    return StoredHead(params, labels, kind == _TOKEN)


def head_config(hf: Mapping[str, Any], labels: Sequence[str], *, tokens: bool) -> dict[str, Any]:
    """What config.json says beside the language model's own fields.

    >>> head_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["reward"], tokens=False)
    {'architectures': ['LlamaForSequenceClassification'], 'id2label': {'0': 'reward'}, 'label2id': {'reward': 0}}
    """
    kind = _TOKEN if tokens else _SEQUENCE
    family = str(hf["model_type"]).removesuffix("_text")
    name = _CLASSES.get(family, {}).get(kind) or str(hf["architectures"][0]).replace("ForCausalLM", kind)
    return {
        "architectures": [name],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def head_sources(head: Params) -> list[Source]:
    """A head's tensors for `huggingface.save`, each under the path ("head", leaf)."""
    width, outputs = head["kernel"].shape
    rows = {row.path[0]: row for row in head_table(width, outputs, bias="bias" in head)}
    return [
        Source(ParamSpec(("head", leaf), row.shape, row.axes, row.init), (NAMES[leaf],), leaf == "kernel", False)
        for leaf, row in rows.items()
    ]
