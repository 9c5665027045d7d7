"""Trained models with what they stand on, and the upstreams of a config.

Each entry of `config.frozen` is `dict(path=FOLDER)`, a run folder or a released
part, whose own stored config gives its architecture. Where the path is empty,
`untrained` is the config of a model with fresh weights, for smoke runs and for
describing a config whose upstream is not trained yet.

An upstream model brings what its own task needs, its upstream models and its
tables: they lie in its variables under "frozen", where there are any.

A model that consists of adapters (tasks.base.AdaptedTask) comes as the plain
model that it stands for, so that it serves wherever one does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from unclip_jax import model_folder, tensor_files
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.data import tokenizers
from unclip_jax.tasks import base as tasks_base
from unclip_jax.utils import errors

PyTree = Any


class Loaded(NamedTuple):
  """A trained model. The first two are all that most callers need."""

  task: tasks_base.Task
  variables: PyTree  # {"params": moving average, **model_state}
  frozen: dict[str, PyTree]  # upstream variables and tables
  config: ml_collections.ConfigDict
  assets_dir: str | None
  fingerprint: str  # "" of shapes


def load_model(
  path: str,
  *,
  given: Mapping[str, Loaded] | None = None,
  abstract: bool = False,
  lazy: bool = False,
) -> Loaded:
  """Loads a run folder or one part of a released model.

  Args:
    given: models already in memory that serve as upstream models of their
      names; the others are read from where the config says.
    abstract: give shapes in place of arrays; no weights are read.
    lazy: leave the variables in the file (`tensor_files.loaded` reads them),
      those of upstream models excepted.

  Raises:
    UserError: no such folder, or an upstream model with other weights than
      those that this model was trained with.
  """
  stored = model_folder.load_model(path, abstract=abstract, lazy=lazy)
  config = at_home(stored.config, path)
  models = load(config.get("frozen", {}), given=given, abstract=abstract)
  loaded = Loaded(
    _build(config, models),
    stored.variables,
    {**frozen_of(models), **stored.tables},
    config,
    assets_dir(stored.assets_dir, models),
    stored.fingerprint,
  )
  return _plain(loaded, models)


def at_home(
  config: ml_collections.ConfigDict, path: str
) -> ml_collections.ConfigDict:
  """The config of a folder, with the paths that it takes from there."""
  config = config.copy_and_resolve_references()
  with config.unlocked():
    for spec in config.get("frozen", {}).values():
      # The parts of a released model lie beside each other.
      if (spec.get("path") or "").startswith(".."):
        spec.path = os.path.abspath(os.path.join(path, spec.path))
  return config


def load(
  config_frozen: Mapping[str, ml_collections.ConfigDict],
  *,
  given: Mapping[str, Loaded] | None = None,
  abstract: bool = False,
) -> dict[str, Loaded]:
  """Loads every entry of `config.frozen`; arguments as in `load_model`.

  Raises:
    UserError: a folder is missing, or holds other weights than the run that
      is being loaded was trained with.
  """
  models = {}
  for name, spec in config_frozen.items():
    path = spec.get("path")
    if abstract and "untrained" in spec and not os.path.isdir(path or ""):
      path = None  # to know its shapes it need not be there
    if name in (given or {}):
      models[name] = given[name]
      path = "the given model"
    elif path:
      models[name] = load_model(path, given=given, abstract=abstract)
    else:
      models[name] = _fresh(spec.untrained, abstract)
    if path and not abstract:
      check_fingerprint(name, spec, models[name].fingerprint, path)
  return models


def frozen_of(models: Mapping[str, Loaded]) -> dict[str, PyTree]:
  """What a task gets as `frozen` of its upstream models."""
  return {
    name: {**m.variables, **({"frozen": m.frozen} if m.frozen else {})}
    for name, m in models.items()
  }


def check_fingerprint(
  name: str,
  spec: Mapping[str, Any],
  found: str,
  where: str,
  *,
  model: str = "this model",
) -> None:
  """Raises UserError if a model was trained with another upstream model.

  Args:
    name: of the upstream model in the config.
    spec: that entry of the model's config.
    found: fingerprint of the upstream model at hand, which `where` holds.
    model: what the message calls the model.
  """
  expected = spec.get("fingerprint")
  if expected and expected != found:
    raise errors.UserError(
      f"{model} was trained with the {name} {expected}, but '{where}' holds "
      f"the {name} {found}: give the folder of {expected}, or train again"
    )


def _build(
  config: ml_collections.ConfigDict, models: Mapping[str, Loaded]
) -> tasks_base.Task:
  return tasks_base.build(config, {k: m.task for k, m in models.items()})


def assets_dir(own: str, models: Mapping[str, Loaded]) -> str | None:
  """A model's folder of assets; of one without a tokenizer its upstream's."""
  files = os.listdir(own) if os.path.isdir(own) else []
  if tokenizers.FILES & {*files}:
    return own
  return next((m.assets_dir for m in models.values() if m.assets_dir), None)


def _plain(loaded: Loaded, models: Mapping[str, Loaded]) -> Loaded:
  """The model that adapters stand for; any other as it is."""
  if not isinstance(loaded.task, tasks_base.AdaptedTask):
    return loaded
  base = models["base"]
  config = base.config.copy_and_resolve_references()
  with config.unlocked():
    config.data = loaded.config.data  # what it was trained on last
  if not loaded.fingerprint:
    return base._replace(config=config)
  adapters = tensor_files.loaded(loaded.variables)
  variables = loaded.task.merge(adapters, loaded.frozen)
  return base._replace(
    variables=variables,
    config=config,
    fingerprint=model_folder.fingerprint(variables),
  )


def _fresh(config: ml_collections.ConfigDict, abstract: bool) -> Loaded:
  """The model of a config with fresh weights, or only with their shapes."""
  models = load(config.get("frozen", {}), abstract=abstract)
  task = _build(config, models)
  frozen = frozen_of(models)
  data = data_pipeline.DataPipeline.from_config(config.data, seed=config.seed)
  spec = data.batch_spec(config.eval_batch_size)
  tables = jax.eval_shape(
    lambda frozen, batch: task.prepare(frozen, [batch]), frozen, spec
  )
  init = jax.jit(task.init)
  rng = jax.random.key(config.seed)
  if abstract:
    variables = jax.eval_shape(init, rng, spec, {**frozen, **tables})
    fingerprint = ""
  else:
    if tables:
      batches = data.eval_batches(
        "train", config.eval_batch_size, config.prepare_examples
      )
      tables = task.prepare(frozen, batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spec)
    variables = init(rng, zeros, {**frozen, **tables})
    fingerprint = model_folder.fingerprint(variables)
  loaded = Loaded(
    task, variables, {**frozen, **tables}, config, None, fingerprint
  )
  return _plain(loaded, models)
