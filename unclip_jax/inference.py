"""The Colab door: a run folder or a model folder -> a task and its variables.

prior = inference.load("runs/quickstart/prior")
out = prior.task.sample(prior.variables, prior.frozen, batch, rng)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from unclip_jax import model_folder, tensor_files, upstream

Loaded = upstream.Loaded


def load(
  path: str,
  *,
  upstream_models: Mapping[str, Loaded] | None = None,
  weights_dtype: str | None = None,
  compute_dtype: str | None = None,
  lazy: bool = False,
) -> Loaded:
  """Loads a run folder or one part of a released model.

  A run of adapters comes as the plain model that it stands for;
  `model_folder.load_model` gives the adapters alone.

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
  model = upstream.load_model(path, given=upstream_models, lazy=True)
  if compute_dtype is not None:
    network = model.task.model.clone(dtype=compute_dtype)
    model = model._replace(task=dataclasses.replace(model.task, model=network))

  def cast(x: Any) -> Any:
    return x if weights_dtype is None else tensor_files.cast(x, weights_dtype)

  if lazy:
    return model._replace(variables=cast(model.variables))
  # Onto the device once, and not at every call; leaf by leaf, so that no second
  # copy of all is in memory.
  variables = model_folder.load_variables(
    model, path, lambda x: jax.device_put(cast(x))
  )
  return model._replace(variables=variables)
