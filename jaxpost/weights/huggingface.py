"""Hugging Face model folders in and out: weights straight into shardings, and back a layer tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

from jaxpost.disk import read_json
from jaxpost.models.config import ModelConfig
from jaxpost.models.families import FAMILIES, config_from_hf, config_to_hf
from jaxpost.models.families.common import Key
from jaxpost.models.table import flatten, nest, parameter_table
from jaxpost.types import Model, Params, ParamSpec
from jaxpost.weights.files import Checkpoint, TensorInfo, replaced_folder, write_checkpoint

# Buffers that old exporters wrote; they hold no parameter.
_BUFFERS = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# What stands on top of a model: its own head, or a classifier's.
_HEADS = ("lm_head.weight", "score.weight", "score.bias")
# Parts of multimodal checkpoints beside the language model.
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Source(NamedTuple):
    """Where one parameter comes from: a tensor for each repeat of its stack, or one tensor."""

    spec: ParamSpec
    names: tuple[str, ...]
    transpose: bool
    stacked: bool


def read_config(folder: Path | str) -> ModelConfig:
    """The architecture of a model folder.

    Raises FileNotFoundError without config.json; ValueError for an unknown family or a field that we do not
    compute, naming it.
    """
    path = Path(folder) / "config.json"
    try:
        return config_from_hf(read_json(path))
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err


def sources(config: ModelConfig, table: tuple[ParamSpec, ...]) -> Iterator[Source]:
    """Names of the checkpoint tensors that make up each row of a parameter table."""
    keys: Mapping[tuple[str, str], Key] = FAMILIES[config.family].KEYS
    for spec in table:
        key = keys[spec.path[-2], spec.path[-1]]
        if spec.path[0] == "stacks":
            stack, block = int(spec.path[1]), int(spec.path[2])
            layers = [config.layer_index(stack, repeat, block) for repeat in range(spec.shape[0])]
            yield Source(spec, tuple(key.template.format(layer=i) for i in layers), key.transpose, True)
        else:
            yield Source(spec, (key.template,), key.transpose, False)


def load(
    folder: Path | str,
    model: Model | ModelConfig,
    *,
    dtype: Any = None,
    shardings: Params | None = None,
    trunk: bool = False,
) -> Params:
    """Parameters of a model folder, each shard read from the files straight to its device.

    Host memory stays near one shard: a process reads only what its devices hold, one shard at a time.

    Args:
        folder: Hugging Face folder with safetensors, one file or several.
        model: the model, or its configuration, that the weights are for.
        dtype: of the result; None keeps the file's.
        shardings: nested dicts like the parameters', of Shardings; None puts all on the first device.
        trunk: leave unread what the folder has on top of the model: a language model's head or a classifier's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another architecture; a tensor missing, unknown, or of another shape or dtype (named).
    """
    folder = Path(folder)
    config, table = (model.config, model.table) if isinstance(model, Model) else (model, parameter_table(model))
    stored = read_config(folder)
    if stored.family != config.family:
        raise ValueError(f"{folder} holds a {stored.family} model, but a {config.family} model is wanted")
    files = Checkpoint(folder)
    wanted = list(sources(config, table))
    names = _match_names(files, wanted, config, ignored=_HEADS if trunk else ())
    flat = {} if shardings is None else flatten(shardings)
    default = SingleDeviceSharding(jax.local_devices()[0])
    loaded = {}
    for source in wanted:
        stored_dtype = _check(files, source, names)
        sharding = default if shardings is None else flat[source.spec.path]
        target = stored_dtype if dtype is None else np.dtype(dtype)
        loaded[source.spec.path] = _place(source, sharding, target, partial(_read, files, source, names, target))
    return nest(loaded)


def _match_names(
    files: Checkpoint, wanted: list[Source], config: ModelConfig, *, ignored: tuple[str, ...]
) -> dict[str, str]:
    """{our name of a tensor: its name in the files}. Raises ValueError for missing and unknown tensors."""
    expected = [name for source in wanted for name in source.names]
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in files.names), "model.")
    outer = prefix.replace("model.", "", 1) if prefix.startswith("language_model.") else ""
    names = {n: prefix + n.removeprefix("model.") if n.startswith("model.") else outer + n for n in expected}
    missing = [n for n in names.values() if n not in files.names]
    if missing:
        raise ValueError(f"{files.folder} lacks the tensor {missing[0]}{_more(missing)} of a {config.family} model")
    extra = sorted(
        name
        for name in files.names - set(names.values())
        if not name.endswith((*_BUFFERS, *ignored)) and not (prefix != "model." and name.startswith(_OTHER_PARTS))
    )
    head = next((n for n in extra if n.endswith("lm_head.weight")), None)
    if config.tie_embeddings and head is not None:
        embed = names["model.embed_tokens.weight"]
        if not _equal(files, head, embed):
            raise ValueError(
                f"{files.file_of(head)}: {head} differs from {embed}, although config.json ties them; "
                "set tie_word_embeddings to false"
            )
        extra.remove(head)
    if extra:
        raise ValueError(
            f"{files.file_of(extra[0])} holds the tensor {extra[0]}{_more(extra)}, unknown to a {config.family} model "
            f"with {config.num_layers} layers"
        )
    return names


def _equal(files: Checkpoint, a: str, b: str, rows: int = 4096) -> bool:
    """Whether two matrices are the same, compared some rows at a time."""
    if files.info(a) != files.info(b)._replace(name=a):
        return False
    end = files.info(a).shape[0]
    parts = (slice(i, min(i + rows, end)) for i in range(0, end, rows))
    return all(np.array_equal(files.read(a, (part,)), files.read(b, (part,))) for part in parts)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check(files: Checkpoint, source: Source, names: dict[str, str]) -> np.dtype:
    """The stored dtype of a parameter. Raises ValueError where shapes or dtypes do not fit."""
    shape = source.spec.shape[1:] if source.stacked else source.spec.shape
    shape = shape[::-1] if source.transpose else shape
    infos = [files.info(names[n]) for n in source.names]
    for info in infos:
        where = f"{files.file_of(info.name)}: {info.name}"
        if info.shape != shape:
            raise ValueError(f"{where} has shape {info.shape}, but this model needs {shape}")
        if info.dtype != infos[0].dtype:
            raise ValueError(f"{where} is {info.dtype}, but {infos[0].name} is {infos[0].dtype}; save them alike")
    return infos[0].dtype


def _read(
    files: Checkpoint, source: Source, names: dict[str, str], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """One shard of a parameter: for a stack, only the slices of this shard's layers are read."""
    bounds = [s.indices(n) for s, n in zip(index, source.spec.shape, strict=True)]
    inner = tuple(slice(start, stop) for start, stop, _ in (bounds[1:] if source.stacked else bounds))
    repeats = range(*bounds[0]) if source.stacked else range(1)
    shard = np.empty(tuple(stop - start for start, stop, _ in bounds), dtype)
    for out, repeat in zip(shard if source.stacked else [shard], repeats, strict=True):
        part = files.read(names[source.names[repeat]], inner[::-1] if source.transpose else inner)
        out[...] = part.T if source.transpose else part
    return shard


def _place(source: Source, sharding: Sharding, dtype: np.dtype, read: Any) -> jax.Array:
    """Global array from `read(index)`; unlike jax.make_array_from_callback only one shard is on the host at a time."""
    shape = source.spec.shape
    by_index: dict[tuple, list[jax.Device]] = {}
    indices: dict[tuple, tuple[slice, ...]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = tuple(index) if index is not None else (slice(None),) * len(shape)
        key = tuple(s.indices(n) for s, n in zip(index, shape, strict=True))
        by_index.setdefault(key, []).append(device)
        indices[key] = index
    on_device = []
    for key, devices in by_index.items():
        shard = read(indices[key])
        arrays = [jax.device_put(shard, device) for device in devices]
        on_device += jax.block_until_ready(arrays)
        del shard
    return jax.make_array_from_single_device_arrays(shape, sharding, on_device, dtype=dtype)


def save(
    folder: Path | str,
    config: ModelConfig,
    params: Params,
    *,
    tokenizer_from: Path | str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Any = None,
    overwrite: bool = False,
    head: tuple[Params, Sequence[Source], Mapping[str, Any]] | None = None,
) -> Path:
    """Write a folder that transformers loads: safetensors, config.json, tokenizer and generation settings.

    The folder appears at once when all is written. One layer's tensor is gathered at a time. With several
    processes all call this together and the first one writes.

    Args:
        folder: where to; must not exist unless `overwrite`.
        config: the architecture.
        params: plain arrays (adapters merged), sharded in any way.
        tokenizer_from: model folder whose tokenizer, chat template, special token ids and generation settings
            are copied.
        max_shard_bytes: largest file.
        dtype: of the files; None keeps the parameters'.
        overwrite: replace an existing folder.
        head: what stands on the model in place of a language model's head: its parameters, its tensors under the path
            ("head", leaf), and fields of config.json (`weights.heads`).

    Raises:
        FileExistsError: the folder exists.
        ValueError: the parameters do not fit `config`, or its family cannot express `config`.
    """
    folder = Path(folder)
    hf = config_to_hf(config)
    flat = flatten(params)
    rows = _export_rows(config, flat, dtype)
    if head is not None:
        flat |= {("head", leaf): x for leaf, x in head[0].items()}
        hf |= dict(head[2])
        rows += _head_rows(head[1], rows[0][0].dtype)
    hf["dtype"] = str(rows[0][0].dtype)
    writes = jax.process_index() == 0
    by_name = {info.name: (source, layer) for info, source, layer in rows}

    def fetch(info: TensorInfo) -> np.ndarray:
        source, layer = by_name[info.name]
        array = _gather(flat[source.spec.path], layer)
        return np.ascontiguousarray(array.T if source.transpose else array).astype(info.dtype, copy=False)

    infos = [info for info, _, _ in rows]
    if not writes:
        write_checkpoint(folder, infos, fetch, max_shard_bytes=max_shard_bytes, write=False)
    else:
        with replaced_folder(folder, overwrite=overwrite) as new:
            write_checkpoint(new, infos, fetch, max_shard_bytes=max_shard_bytes)
            copied = copy_tokenizer(Path(tokenizer_from), new) if tokenizer_from is not None else {}
            hf |= copied if head is None else {**copied, **head[2]}
            (new / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jaxpost saved {folder}")
    return folder


def _export_rows(config: ModelConfig, flat: dict, dtype: Any) -> list[tuple[TensorInfo, Source, int | None]]:
    """(tensor to write, its parameter, its repeat), ordered as the layers run."""
    table = parameter_table(config)
    wanted, given = {spec.path for spec in table}, set(flat)
    if wanted != given:
        path = sorted(wanted ^ given)[0]
        problem = "lack" if path in wanted else "have the unknown"
        raise ValueError(f"the parameters {problem} {'/'.join(path)}; pass a plain tree of this model's arrays")
    rows: list[tuple[int, TensorInfo, Source, int | None]] = []
    for source in sources(config, table):
        leaf, spec = flat[source.spec.path], source.spec
        where = "/".join(spec.path)
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(f"{where} is a {type(leaf).__name__}, not an array; merge adapters first")
        if leaf.shape != spec.shape:
            raise ValueError(f"{where} has shape {leaf.shape}, but the configuration says {spec.shape}")
        shape = spec.shape[1:] if source.stacked else spec.shape
        target = np.dtype(leaf.dtype if dtype is None else dtype)
        for repeat, name in enumerate(source.names):
            info = TensorInfo(name, shape[::-1] if source.transpose else shape, target)
            rows.append((_order(config, spec, repeat), info, source, repeat if source.stacked else None))
    rows.sort(key=lambda row: row[0])
    return [row[1:] for row in rows]


def _head_rows(sources: Sequence[Source], dtype: Any) -> list[tuple[TensorInfo, Source, int | None]]:
    """`_export_rows` of a head."""
    shapes = [source.spec.shape[::-1] if source.transpose else source.spec.shape for source in sources]
    infos = [TensorInfo(source.names[0], shape, dtype) for source, shape in zip(sources, shapes, strict=True)]
    return [(info, source, None) for info, source in zip(infos, sources, strict=True)]


def _order(config: ModelConfig, spec: ParamSpec, repeat: int) -> int:
    """Embedding first, then layer by layer, then the final norm and the head."""
    if spec.path[0] == "stacks":
        return config.layer_index(int(spec.path[1]), repeat, int(spec.path[2]))
    return -1 if spec.path[0] == "embed" else config.num_layers


@jax.jit
def _take(stacked: jax.Array, repeat: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, repeat, keepdims=False)


def _gather(leaf: jax.Array | np.ndarray, repeat: int | None) -> np.ndarray:
    """One layer's tensor on the host (with several processes: on every host, since all must take part)."""
    if isinstance(leaf, np.ndarray):
        return leaf if repeat is None else leaf[repeat]
    part = leaf if repeat is None else _take(leaf, np.int32(repeat))
    if part.is_fully_addressable:
        return np.asarray(part)
    return np.asarray(multihost_utils.process_allgather(part, tiled=True))


def copy_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Copy tokenizer, chat template and generation settings; returns the special token ids of `source`'s config.json.

    Raises FileNotFoundError where `source` holds no tokenizer.
    """
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(f"{source} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (source / "config.json").is_file():
        return {}
    hf = read_json(source / "config.json")
    return {k: hf[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in hf}
