"""Model folders with random weights, trained on nothing."""

from __future__ import annotations

import os
from typing import Any

import ml_collections

from tests import random_variables
from unclip_jax import model_folder, trainer
from unclip_jax.utils import trees


def save(
  folder: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> dict[str, Any]:
  """Writes a model of a config; {flat name: array} of what it holds."""
  run = trainer.setup(config)
  tables = trainer._table_shapes(run)
  shapes = trainer.state_shapes(run, {**run.frozen, **tables})
  variables = {"params": random_variables.like_tree(shapes.params)}
  tables = random_variables.like_tree(tables)
  assets = run.data.assets()
  model_folder.save_model(folder, run.config, variables, tables, assets)
  return trees.flatten({**variables, "tables": tables})
