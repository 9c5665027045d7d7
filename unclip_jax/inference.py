"""The Colab door: a run folder or a model folder -> a task and its variables.

prior = inference.load("runs/quickstart/prior")
out = prior.task.sample(prior.variables, prior.frozen, batch, rng)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections

from unclip_jax import checkpoints, upstream
from unclip_jax.tasks import base as tasks_base

PyTree = Any


class Loaded(NamedTuple):
  """A trained model. The first two are all that most callers need."""

  task: tasks_base.Task
  variables: PyTree  # {"params": moving average, **model_state}
  frozen: dict[str, PyTree]  # upstream variables and tables
  config: ml_collections.ConfigDict
  assets_dir: str | None
  fingerprint: str


def load(
  path: str,
  *,
  upstream_models: Mapping[str, Loaded] | None = None,
  weights_dtype: str | None = None,
  compute_dtype: str | None = None,
  lazy: bool = False,
) -> Loaded:
  """Loads a run folder or one part of a released model.

  Args:
    upstream_models: models already in memory that serve as this one's
      upstream; the others are read from where its config says.
    weights_dtype: "float32" or "bfloat16", of the variables; None: as they are
      stored.
    compute_dtype: the same, of the network's work; None: its config's.
    lazy: leave the variables in the file (`tensor_files.loaded` reads them).

  Raises:
    UserError: no such folder, or an upstream model with other weights than
      those that this model was trained with.
  """
  loaded = checkpoints.load_model(path, weights_dtype=weights_dtype, lazy=lazy)
  config = loaded.config.copy_and_resolve_references()
  if compute_dtype is not None:
    with config.unlocked():
      config.model.dtype = compute_dtype
  variables = loaded.variables
  if not lazy:
    variables = jax.device_put(variables)  # once, and not at every call
  wanted = config.get("frozen", {})
  given = {k: v for k, v in (upstream_models or {}).items() if k in wanted}
  models: dict[str, Any] = {}
  for name in wanted:
    if name in given:
      upstream.check_fingerprint(
        name, wanted[name], given[name].fingerprint, "the given model"
      )
      models[name] = given[name]
    else:
      models.update(upstream.load({name: wanted[name]}, beside=path))
  task = tasks_base.build(
    config, {name: model.task for name, model in models.items()}
  )
  frozen = {name: model.variables for name, model in models.items()}
  return Loaded(
    task,
    variables,
    {**frozen, **loaded.tables},
    loaded.config,
    loaded.assets_dir,
    loaded.fingerprint,
  )
