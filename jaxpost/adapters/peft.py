"""PEFT adapter folders in and out: adapter_config.json and adapter_model.safetensors, never pickle.

PEFT names a factor base_model.model.<module>.lora_A.weight [r, in] and ...lora_B.weight [out, r], one pair for
each layer; ours are stacked and transposed. Layers of one stack may differ in rank (`rank_pattern`): the smaller
ones are filled up with zeros, which get zero gradients and so stay zero.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxpost.adapters.bind import LowRank
from jaxpost.adapters.lora import linear_kernels
from jaxpost.disk import read_json
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import keys_of
from jaxpost.models.table import flatten, nest, parameter_table
from jaxpost.types import Params
from jaxpost.weights.files import replaced_folder
from jaxpost.weights.heads import NAMES as HEAD_NAMES

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ABOUT = "score_head.json"
PREFIX = "base_model.model."

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
# Fields that say where an adapter comes from, or how it is trained or chosen, not what it computes.
_NEUTRAL = {
    "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
# Names of the head that PEFT saves whole beside a classifier's adapter; that of the supported families is `score`.
_HEADS = {"score", "classifier"}
# Initialisations that leave the base model as it was; others (PiSSA, OLoRA, LoftQ ...) change its weights.
_PLAIN_INITS = (True, False, None, "gaussian")


class _Slot(NamedTuple):
    """One layer's adapter: our kernel, its repeat (None: not stacked) and PEFT's module name."""

    path: tuple[str, ...]
    repeat: int | None
    module: str


def _slots(config: ModelConfig) -> Iterator[_Slot]:
    keys = keys_of(config)
    for path, spec in linear_kernels(parameter_table(config)).items():
        name = keys[path[-2], "kernel"].template.removesuffix(".weight")
        if path[0] != "stacks":
            yield _Slot(path, None, name)
            continue
        for repeat in range(spec.shape[0]):
            layer = config.layer_index(int(path[1]), repeat, int(path[2]))
            yield _Slot(path, repeat, name.format(layer=layer))


def _read_settings(folder: Path, *, trunk: bool = False) -> dict[str, Any]:
    """adapter_config.json, refused if it asks for what we do not compute."""
    settings = read_json(folder / CONFIG)
    where = f"{folder / CONFIG}: "
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{where}peft_type is {settings.get('peft_type')!r}; only LORA is supported")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ValueError(
            f"{where}init_lora_weights is {settings['init_lora_weights']!r}, which changes the base model's weights; "
            "convert the adapter with PEFT's path_initial_model_for_weight_conversion first"
        )
    neutral = {"bias": "none"}
    odd = {
        name: value
        for name, value in settings.items()
        if value and name not in _READ | _NEUTRAL and value != neutral.get(name)
    }
    if trunk and set(odd.get("modules_to_save", ())) <= _HEADS:
        odd.pop("modules_to_save", None)
    if odd:
        name, value = next(iter(odd.items()))
        raise ValueError(f"{where}{name} = {value!r} is not supported (only plain LoRA on linear layers)")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float) or isinstance(settings[name], bool):
            raise ValueError(f"{where}{name} is missing or no number")
    return settings


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, float | int] | None, module: str, default: float | int) -> float | int:
    """PEFT's rule: the first pattern that matches the end of a module's name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / TENSORS
    if not file.is_file():
        if (folder / PICKLE).is_file():
            raise FileNotFoundError(
                f"{folder / PICKLE} is a pickle, which can run code and is never read; save the adapter again with "
                f"PEFT's save_pretrained(..., safe_serialization=True), which writes {TENSORS}"
            )
        raise FileNotFoundError(f"{folder} holds no {TENSORS}; an adapter folder needs it beside {CONFIG}")
    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tensors.get_tensor(name).astype(np.float32) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as err:
        raise ValueError(f"{file} is not a readable safetensors file ({err}); download or save it again") from err


def load(folder: Path | str, config: ModelConfig, *, trunk: bool = False) -> tuple[Params, Params]:
    """An adapter folder as (overlay, scales), float32, for `bind(base, overlay, scales)`.

    With `trunk`, a classifier's head beside the adapter is left to `load_head`.

    Layers that the adapter leaves alone get factors of zero, which stay zero in training. `lora_dropout` is not
    applied here: it concerns PEFT's own training.

    Raises:
      FileNotFoundError: a file is missing, or the weights are a pickle.
      ValueError: an option that plain LoRA does not have (names the key), a tensor that this model has no place for,
        or of another shape.
    """
    folder = Path(folder)
    settings, tensors = _read_settings(folder, trunk=trunk), _read_tensors(folder)
    if trunk:
        tensors = {name: x for name, x in tensors.items() if name.removeprefix(PREFIX) not in HEAD_NAMES.values()}
    specs = linear_kernels(parameter_table(config))
    found: dict[tuple[str, ...], dict[int | None, tuple[np.ndarray, np.ndarray, float]]] = {}
    for slot in _slots(config):
        names = [f"{PREFIX}{slot.module}.lora_{x}.weight" for x in "AB"]
        present = [name in tensors for name in names]
        if not any(present):
            continue
        if not all(present):
            raise ValueError(f"{folder / TENSORS} lacks {names[present.index(False)]}, the other factor is there")
        a, b = (tensors.pop(name).T for name in names)
        rank = int(_by_pattern(settings.get("rank_pattern"), slot.module, settings["r"]))
        inputs, outputs = specs[slot.path].shape[-2:]
        for name, factor, shape in ((names[0], a, (inputs, rank)), (names[1], b, (rank, outputs))):
            if factor.shape != shape:
                raise ValueError(
                    f"{folder / TENSORS}: {name} has shape {factor.T.shape}, but the model and {CONFIG} "
                    f"(rank {rank}) need {shape[::-1]}"
                )
        found.setdefault(slot.path, {})[slot.repeat] = (a, b, _scale(settings, slot.module, rank))
    if tensors:
        name = sorted(tensors)[0]
        raise ValueError(f"{folder / TENSORS} holds {name} ({len(tensors)} such), unknown to a {config.family} model")
    if not found:
        raise ValueError(f"{folder / TENSORS} holds no adapter")
    overlay = {path: _stack(specs[path].shape, layers) for path, layers in found.items()}
    scales = {path: _stack_scales(specs[path].shape, layers) for path, layers in found.items()}
    return nest(overlay), nest(scales)


def load_head(folder: Path | str) -> Params | None:
    """The head that PEFT saved beside a classifier's adapter, {"kernel": [D, K], "bias": [K]}; None: there is none."""
    tensors = _read_tensors(Path(folder))
    found = {leaf: tensors[PREFIX + name] for leaf, name in HEAD_NAMES.items() if PREFIX + name in tensors}
    return found | {"kernel": np.ascontiguousarray(found["kernel"].T)} if "kernel" in found else None


def _stack(shape: tuple[int, ...], layers: Mapping[int | None, tuple[np.ndarray, np.ndarray, float]]) -> LowRank:
    rank = max(a.shape[1] for a, _, _ in layers.values())
    a_all = np.zeros((*shape[:-1], rank), np.float32)
    b_all = np.zeros((*shape[:-2], rank, shape[-1]), np.float32)
    for repeat, (a, b, _) in layers.items():
        at = () if repeat is None else (repeat,)
        a_all[at][:, : a.shape[1]] = a
        b_all[at][: b.shape[0]] = b
    return LowRank(jnp.asarray(a_all), jnp.asarray(b_all))


def _stack_scales(shape: tuple[int, ...], layers: Mapping[int | None, tuple[Any, Any, float]]) -> jax.Array:
    if None in layers:
        return jnp.asarray(layers[None][2], jnp.float32)
    # A layer without adapter has factors of zero; any finite scale does.
    return jnp.asarray([layers[i][2] if i in layers else 1.0 for i in range(shape[0])], jnp.float32)


def save(
    folder: Path | str,
    config: ModelConfig,
    overlay: Params,
    scales: Params,
    *,
    base_model: str,
    rslora: bool = False,
    overwrite: bool = False,
    head: Params | None = None,
    tokens: bool = False,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write an adapter folder that PEFT loads; it appears at once when all is written.

    Factors keep their dtype. Ranks and alphas that differ between layers go to `rank_pattern` and
    `alpha_pattern`. With several processes all call this together and the first one writes.

    Args:
      overlay: nested dict of `LowRank` only.
      scales: the overlay's scales.
      base_model: `base_model_name_or_path` of the config.
      rslora: write scale = alpha / sqrt(r) instead of alpha / r.
      head: of a classifier, saved whole beside the adapter; with `tokens`, of one that scores every token.
      about: what is known of the head, for `head_about`.

    Raises:
      FileExistsError: the folder exists and `overwrite` is false.
      ValueError: the overlay holds something else than low-rank factors of linear layers.
    """
    folder = Path(folder)
    host = jax.tree.map(_to_host, (overlay, scales))
    flat, factors = flatten(host[0]), flatten(host[1])
    tensors, ranks, alphas, whole = {}, {}, {}, Counter()
    slots = list(_slots(config))
    known = {slot.path for slot in slots}
    for path, leaf in flat.items():
        if path not in known or not isinstance(leaf, LowRank):
            raise ValueError(f"{'/'.join(path)} is no low-rank update of a linear layer; PEFT's LoRA cannot hold it")
    for slot in slots:
        whole[_short(slot.module)] += 1
        if slot.path not in flat:
            continue
        a, b, scale = _layer(slot, flat, factors)
        used = np.flatnonzero(a.any(axis=0) | b.any(axis=1))
        if not used.size:
            continue
        rank = int(used[-1]) + 1
        ranks[slot.module] = rank
        alphas[slot.module] = float(f"{scale * (rank**0.5 if rslora else rank):.6g}")
        tensors[f"{PREFIX}{slot.module}.lora_A.weight"] = np.ascontiguousarray(a[:, :rank].T)
        tensors[f"{PREFIX}{slot.module}.lora_B.weight"] = np.ascontiguousarray(b[:rank].T)
    if not ranks:
        raise ValueError("the adapter is zero everywhere: there is nothing to save")
    settings = _settings(ranks, alphas, whole) | {"base_model_name_or_path": base_model, "use_rslora": rslora}
    if head is not None:
        settings |= {"task_type": "TOKEN_CLS" if tokens else "SEQ_CLS", "modules_to_save": sorted(_HEADS)}
        tensors |= {PREFIX + HEAD_NAMES[leaf]: np.ascontiguousarray(_to_host(x).T) for leaf, x in head.items()}
    _write(folder, tensors, {CONFIG: settings, ABOUT: about}, overwrite=overwrite)
    return folder


def _write(folder: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any], *, overwrite: bool) -> None:
    """The folder at once, by the first process; all wait for it. JSON files without content are left out."""
    if jax.process_index() == 0:
        with replaced_folder(folder, overwrite=overwrite) as new:
            save_file(dict(tensors), new / TENSORS, metadata={"format": "pt"})
            for name, content in about.items():
                if content is not None:
                    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
                    (new / name).write_text(text, encoding="utf-8")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxpost saved {folder}")


def _layer(slot: _Slot, overlay: Mapping[Any, Any], scales: Mapping[Any, Any]) -> tuple[np.ndarray, np.ndarray, float]:
    """Factors and scale of one layer."""
    at = () if slot.repeat is None else (slot.repeat,)
    leaf = overlay[slot.path]
    return leaf.a[at], leaf.b[at], float(scales[slot.path][at])


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _short(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def _settings(ranks: Mapping[str, int], alphas: Mapping[str, float], whole: Mapping[str, int]) -> dict[str, Any]:
    """adapter_config.json: the commonest rank and alpha, patterns for the rest, short names where all layers agree."""
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    adapted = Counter(_short(module) for module in ranks)
    targets = {_short(m) if adapted[_short(m)] == whole[_short(m)] else m for m in ranks}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": sorted(targets),
        "rank_pattern": {re.escape(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(m): x for m, x in alphas.items() if x != alpha},
    }
