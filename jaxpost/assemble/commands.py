"""What the other commands do: answer prompts, convert models, look at data and at the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxpost import sharding
from jaxpost.adapters import peft
from jaxpost.adapters.bind import bind, merge
from jaxpost.assemble.answer_data import shares_prompts
from jaxpost.assemble.inspect_rl import inspect_rl
from jaxpost.assemble.model import DTYPES, Pretrained, load_model, sampling_mesh
from jaxpost.config import ModelSection
from jaxpost.config_check_preference import data_kind
from jaxpost.config_io import Config, ConfigError
from jaxpost.config_preference import PreferenceConfig
from jaxpost.config_reward import RewardConfig
from jaxpost.config_rl import RLConfig
from jaxpost.config_search import SearchConfig
from jaxpost.data import inspect as data_inspect
from jaxpost.data.inspect_answers import inspect_answers
from jaxpost.train.folder import environment as run_environment
from jaxpost.types import Params
from jaxpost.weights import gguf, huggingface
from jaxpost.weights.resolve import cache_folder


def load_bound(path: str) -> tuple[Pretrained, Params]:
    """`bind_section` of a model by its path alone."""
    return bind_section(ModelSection(path=path))


def bind_section(section: ModelSection) -> tuple[Pretrained, Params]:
    """A model and its weights; of a PEFT adapter folder, the base it names with the adapter bound around it.

    Raises:
      FileNotFoundError, ValueError: as `load_model` and `adapters.peft.load`.
    """
    path = section.path
    adapter = Path(path).expanduser() / peft.CONFIG
    base = huggingface.read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else path
    if not base or not isinstance(base, str):
        raise ValueError(f"{adapter} names no base model (base_model_name_or_path)")
    pretrained = load_model(replace(section, path=base), sampling_mesh)
    params = pretrained.load()
    if adapter.is_file():
        placed = jax.device_put(peft.load(adapter.parent, pretrained.config), sharding.replicated(pretrained.mesh))
        params = bind(params, *placed)
    return pretrained, params


def convert(source: str, out: Path, *, dtype: str = "float32") -> str:
    """Writes a Hugging Face folder from a GGUF file, a model folder, a hub id or a PEFT folder (merged).

    Returns:
      A line that says what was written.

    Raises:
      FileExistsError: `out` exists. FileNotFoundError, ValueError: a source that cannot be read.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: give a folder that does not")
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        gguf.convert(path, out, dtype=DTYPES[dtype])
    else:
        pretrained, params = load_bound(source)
        huggingface.save(
            out, pretrained.config, merge(params), tokenizer_from=pretrained.tokenizer_folder, dtype=DTYPES[dtype]
        )
    size = sum(f.stat().st_size for f in out.iterdir())
    return f"wrote {out} ({size / 1e6:.0f} MB, {dtype})"


def inspect(config: Config, *, rows: int = 3, color: bool = False) -> str:
    """What a configuration would train on: rows as the model reads them, lengths, counts, rewards of the references."""
    if isinstance(config, SearchConfig):
        raise ConfigError("a preset of method search has no training data to look at: `jaxpost search PRESET` runs it")
    pretrained = load_model(config.model)
    tokenizer = pretrained.tokenizer
    if isinstance(config, RLConfig):
        return inspect_rl(config, tokenizer, room=pretrained.config.max_positions, rows=rows, color=color)
    common: dict[str, Any] = {
        "cache_dir": cache_folder() / "tokens",
        "batch_size": config.train.batch_size,
        "rows": rows,
        "color": color,
    }
    if isinstance(config, (PreferenceConfig, RewardConfig)):
        kind = config.data_kind if isinstance(config, RewardConfig) else data_kind(config.losses)
        share = shares_prompts(config.share_prompts, config.model)
        return inspect_answers(config.data, tokenizer, kind=kind, share_prompts=share, **common)
    return data_inspect.inspect(config.data, tokenizer, **common)


def environment() -> dict[str, Any]:
    """Versions, devices and caches."""
    return run_environment(("jaxpost", "env")) | {"cache": str(cache_folder())}
