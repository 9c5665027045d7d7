"""The Colab door: a run folder or a model folder -> a task and its variables.

prior = inference.load("runs/quickstart/prior")
out = prior.task.sample(prior.variables, prior.frozen, batch, rng)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
  path: str, *, upstream_models: Mapping[str, Loaded] | None = None
) -> Loaded:
  """Loads a run folder or one part of a released model.

  Args:
    upstream_models: models already in memory that serve as this one's
      upstream; the others are read from where its config says.

  Raises:
    UserError: no such folder, or an upstream model with other weights than
      those that this model was trained with.
  """
  loaded = checkpoints.load_model(path)
  wanted = loaded.config.get("frozen", {})
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
    loaded.config, {name: model.task for name, model in models.items()}
  )
  frozen = {name: model.variables for name, model in models.items()}
  return Loaded(
    task,
    loaded.variables,
    {**frozen, **loaded.tables},
    loaded.config,
    loaded.assets_dir,
    loaded.fingerprint,
  )
