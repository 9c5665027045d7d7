"""The frozen upstream models that a config names (`config.frozen`).

Each entry is `dict(path=FOLDER)`, a run folder or a released part, whose own
stored config gives its architecture. Where the path is empty, `untrained` is
the config of a model with fresh weights, for smoke runs and for describing a
config whose upstream is not trained yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from unclip_jax import checkpoints
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.tasks import base as tasks_base
from unclip_jax.utils import errors

PyTree = Any


class Upstream(NamedTuple):
  """One upstream model."""

  task: tasks_base.Task
  variables: PyTree
  fingerprint: str  # "" of shapes
  assets_dir: str | None


def load(
  frozen: Mapping[str, ml_collections.ConfigDict],
  *,
  beside: str = "",
  abstract: bool = False,
) -> dict[str, Upstream]:
  """Loads every entry of `config.frozen`.

  Args:
    beside: folder that paths starting with ".." are relative to (a released
      model's parts lie beside each other).
    abstract: give shapes in place of arrays; no weights are read.

  Raises:
    UserError: a folder is missing, or holds other weights than the run that
      is being loaded was trained with.
  """
  return {
    name: _load_one(name, frozen[name], beside, abstract) for name in frozen
  }


def _load_one(
  name: str, spec: ml_collections.ConfigDict, beside: str, abstract: bool
) -> Upstream:
  path = spec.get("path")
  if not path:
    return _fresh(spec.untrained, abstract)
  if path.startswith(".."):
    path = os.path.normpath(os.path.join(beside, path))
  loaded = checkpoints.load_model(path, abstract=abstract)
  if not abstract:
    check_fingerprint(name, spec, loaded.fingerprint, path)
  return Upstream(
    tasks_base.build(loaded.config),
    loaded.variables,
    loaded.fingerprint,
    loaded.assets_dir,
  )


def check_fingerprint(
  name: str, spec: Mapping[str, Any], found: str, where: str
) -> None:
  """Raises UserError if a model was trained with another upstream model."""
  expected = spec.get("fingerprint")
  if expected and expected != found:
    raise errors.UserError(
      f"this model was trained with the {name} {expected}, but '{where}' holds "
      f"the {name} {found}: give the folder of {expected}, or train again"
    )


def _fresh(config: ml_collections.ConfigDict, abstract: bool) -> Upstream:
  """The model of a config with fresh weights, or only with their shapes."""
  task = tasks_base.build(config)
  data = data_pipeline.DataPipeline.from_config(config.data, seed=config.seed)
  spec = data.batch_spec(1)
  init = jax.jit(lambda rng, batch: task.init(rng, batch, {}))
  rng = jax.random.key(config.seed)
  if abstract:
    return Upstream(task, jax.eval_shape(init, rng, spec), "", None)
  variables = init(
    rng, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
  )
  return Upstream(task, variables, checkpoints.fingerprint(variables), None)
