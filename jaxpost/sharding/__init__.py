"""Where arrays live: the device mesh, one table of logical axes, and shardings made from both.

Every parameter and activation names its dimensions by meaning ("embed", "mlp", "batch" ...). `RULES` says
which mesh axes split each meaning; nothing else in the project names a mesh axis for a model's arrays.
A dimension whose rule is None, or whose mesh axes have size 1, is replicated.
"""

from jaxpost.sharding.batch import batch_sharding, check_batch, local_rows, row_shards, spread, to_global
from jaxpost.sharding.mesh import AXES, initialize_distributed, make_mesh, mesh_sizes, slice_sizes
from jaxpost.sharding.placement import (
    REPLICABLE,
    RULES,
    Rules,
    make_constrain,
    param_shardings,
    pinned,
    replicated,
    spec,
    state_shardings,
)
from jaxpost.sharding.reshard import remesh, reshard

__all__ = [
    "AXES",
    "REPLICABLE",
    "RULES",
    "Rules",
    "batch_sharding",
    "check_batch",
    "initialize_distributed",
    "local_rows",
    "make_constrain",
    "make_mesh",
    "mesh_sizes",
    "param_shardings",
    "pinned",
    "remesh",
    "replicated",
    "reshard",
    "row_shards",
    "slice_sizes",
    "spec",
    "spread",
    "state_shardings",
    "to_global",
]
