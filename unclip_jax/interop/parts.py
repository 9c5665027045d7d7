"""A part of a model made of foreign weights, and how its folder is written.

The folder is that of any released part (model_folder.py): `inference.load`
reads it, and `config.frozen.NAME.path` takes it. Its config names the task and
the model and nothing else: there was no run, so there are no data, optimizer or
evaluators in it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from unclip_jax import model_folder, run_folder
from unclip_jax.tensor_files import LazyArray
from unclip_jax.utils import files


class Part(NamedTuple):
  """What a reader of foreign weights gives.

  Attributes:
    config: see `make_config`.
    arrays: by their flat names, "params..." and "tables...".
    assets: file name -> content, such as the tokenizer's.
  """

  config: ml_collections.ConfigDict
  arrays: dict[str, LazyArray]
  assets: dict[str, bytes]


def make_config(
  name: str,
  *,
  task_name: str,
  model_name: str,
  model: Mapping[str, Any],
  task: Mapping[str, Any] | None = None,
  frozen: Mapping[str, Any] | None = None,
) -> ml_collections.ConfigDict:
  """The least config that `inference.load` reads.

  Args:
    name: of the part, "clip".
    task_name, model_name: module paths that hold a `Task` and a `Model`.
    model, task: their fields.
    frozen: upstream part -> dict(path=...).
  """
  return ml_collections.ConfigDict(
    {
      "name": name,
      "seed": 0,
      "task_name": task_name,
      "task": dict(task or {}),
      "model_name": model_name,
      "model": dict(model),
      "frozen": dict(frozen or {}),
    }
  )


def write(folder: str, part: Part) -> str:
  """Writes a part's folder, one array in memory at a time.

  Returns:
    The fingerprint of its parameters.
  """
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  for name, content in part.assets.items():
    files.write_atomically(path / name, content)
  fingerprint = model_folder.save_arrays(path, part.arrays)
  # Last: a folder without it is no part.
  run_folder.save_config(path, part.config)
  return fingerprint
