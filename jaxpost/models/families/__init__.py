"""Model families: how each one's config.json and weight names map to ours. See docs/adding-a-family.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from jaxpost.models.config import ModelConfig
from jaxpost.models.families import gemma3, llama, mistral, qwen2, qwen3
from jaxpost.models.families.common import Key, Keys, group_layers, layer_blocks

FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
    "mistral": mistral,
}
"""transformers' `model_type` (and our `ModelConfig.family`) -> module with config_from_hf, config_to_hf, KEYS."""

__all__ = ["FAMILIES", "Key", "Keys", "config_from_hf", "config_to_hf", "keys_of"]


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json's content.

    Raises ValueError for an unknown `model_type`, a quantised checkpoint, or a field that we do not compute.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not supported; supported families: {', '.join(FAMILIES)}")
    if hf.get("quantization_config"):
        raise ValueError("the checkpoint is quantised (quantization_config); take the unquantised one")
    return FAMILIES[kind].config_from_hf(hf)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json's content for a model.

    Raises ValueError where the family's format cannot express the model, naming the fields that would be lost.
    """
    hf = FAMILIES[config.family].config_to_hf(config)
    # How layers are split into stacks is ours alone, so compare after splitting them the one way.
    ours = replace(config, stacks=group_layers(layer_blocks(config)))
    if not ours.attention_scale:
        ours = replace(ours, attention_scale=ours.head_dim**-0.5)
    back = config_from_hf(hf)
    if not back.attention_scale:
        back = replace(back, attention_scale=back.head_dim**-0.5)
    lost = [f.name for f in fields(ModelConfig) if getattr(ours, f.name) != getattr(back, f.name)]
    if lost:
        raise ValueError(f"a {config.family} checkpoint cannot express this model's {', '.join(lost)}")
    return hf


def keys_of(config: ModelConfig) -> Keys:
    """The weight names of a model's family."""
    return FAMILIES[config.family].KEYS
