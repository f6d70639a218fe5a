"""A `model` section -> functions, shapes, shardings and, when asked for, weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpost import sharding
from jaxpost.config import MeshSection, ModelSection
from jaxpost.models.config import ModelConfig
from jaxpost.models.table import abstract_params, axes_tree
from jaxpost.models.transformer import build_model
from jaxpost.text.tokenizer import Tokenizer, load_tokenizer
from jaxpost.types import Model, Params
from jaxpost.weights import huggingface
from jaxpost.weights.resolve import resolve_model, resolve_tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model whose weights are read only when they are needed: a resumed run never reads them."""

    section: ModelSection
    folder: Path
    model: Model
    mesh: Mesh
    trunk: bool = False
    """Without what stands on top of the model: `model` has no language model's head, for a head of another kind."""

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @cached_property
    def tokenizer_folder(self) -> Path:
        return self.folder if self.section.tokenizer is None else resolve_tokenizer(self.section.tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer_folder, chat_template=self.section.chat_template)

    @property
    def dtype(self) -> Any:
        return DTYPES[self.section.param_dtype]

    @cached_property
    def abstract(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return abstract_params(self.model.table, self.dtype)

    @cached_property
    def shardings(self) -> Params:
        return sharding.param_shardings(axes_tree(self.model.table), self.mesh, self.abstract)

    def load(self) -> Params:
        """Reads the weights straight into their shardings."""
        return huggingface.load(self.folder, self.model, dtype=self.dtype, shardings=self.shardings, trunk=self.trunk)


def sampling_mesh(config: ModelConfig) -> Mesh:
    """All devices, for decoding: as many as divide its heads split each layer, so that a token's passes read each
    weight once between them; rows are dealt to what is left."""
    count = jax.device_count()
    tensor = math.gcd(count, config.heads, config.kv_heads, config.mlp_width)
    return sharding.make_mesh({"tensor": tensor, "data": count // tensor})


def load_model(
    section: ModelSection, mesh: Mesh | Callable[[ModelConfig], Mesh] | None = None, *, trunk: bool = False
) -> Pretrained:
    """Finds a model and builds its functions; the weights wait for `load()`.

    Args:
      section: what and how; see `config.ModelSection`.
      mesh: where it will live, or a function of the model's shapes that says so; None: all devices, weights split
        over all of them.
      trunk: leave out the language model's head; `unembed` is not to be used then.

    Raises:
      FileNotFoundError: nothing is found under the path (says what would help).
      ValueError: an architecture or option that is not supported, or a mesh that does not fit.
    """
    folder = Path(resolve_model(section.path, revision=section.revision))
    config = huggingface.read_config(folder)
    if trunk:  # a tied head has no parameters of its own
        config = replace(config, tie_embeddings=True)
    mesh = sharding.make_mesh(MeshSection()) if mesh is None else mesh if isinstance(mesh, Mesh) else mesh(config)
    return Pretrained(section, folder, _build(section, config, mesh), mesh, trunk)


def on_mesh(pretrained: Pretrained, mesh: Mesh) -> Pretrained:
    """The same model's functions for another mesh; weights are still to be moved (`sharding.reshard`)."""
    return replace(pretrained, model=_build(pretrained.section, pretrained.config, mesh), mesh=mesh)


def _build(section: ModelSection, config: ModelConfig, mesh: Mesh) -> Model:
    return build_model(
        config,
        sharding.make_constrain(mesh),
        attention=section.attention,
        remat=section.remat,
        compute_dtype=DTYPES[section.compute_dtype],
        mesh=mesh,
    )
