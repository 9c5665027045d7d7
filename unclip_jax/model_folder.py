"""Trained models on disk: model folders, and runs read as such.

MODEL/config.json        the config of the run that trained it
MODEL/model.safetensors  parameters and tables by their flat names
                         (`utils.trees`), with a fingerprint
MODEL/...                the tokenizer's files and the like
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from unclip_jax import checkpoints, run_folder, tensor_files
from unclip_jax.utils import trees
from unclip_jax.utils.errors import UserError

PyTree = Any
PathLike = str | os.PathLike[str]

_WEIGHTS = "model.safetensors"
_BEST = "best.step"  # a leaf: best.Record


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """What `load_model` finds.

  Attributes:
    config: that of the run that trained it.
    variables: {"params": ..., "batch_stats"...: ...}, nested dicts of numpy
      arrays (or of shapes).
    tables: name -> array or dict of arrays.
    assets_dir: the folder that holds the tokenizer and other files.
    fingerprint: see `fingerprint`.
  """

  config: ml_collections.ConfigDict
  variables: dict[str, PyTree]
  tables: dict[str, PyTree]
  assets_dir: str
  fingerprint: str


def fingerprint(variables: Mapping[str, PyTree]) -> str:
  """16 hex digits of SHA-256 over names, shapes, dtypes and bytes of params.

  A run and the model folder saved from it have the same one.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(trees.flatten(variables["params"]).items()):
    _add_to_fingerprint(digest, name, np.asarray(leaf))
  return digest.hexdigest()[:16]


def _add_to_fingerprint(digest: Any, name: str, array: np.ndarray) -> None:
  digest.update(f"{name} {list(array.shape)} {array.dtype}\n".encode())
  digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def save_model(
  directory: PathLike,
  config: ml_collections.ConfigDict,
  variables: Mapping[str, PyTree],
  tables: Mapping[str, PyTree],
  assets: Mapping[str, PathLike],
) -> None:
  """Writes a model folder: config.json, model.safetensors, asset files.

  Args:
    directory: is made where needed; files of the same names are replaced.
    config: that of the run.
    variables: {"params": ..., and other collections}.
    tables: arrays or dicts of arrays, by name.
    assets: file name in the folder -> the file to copy.

  Raises:
    UserError: an asset is missing.
  """
  folder = pathlib.Path(directory)
  for name, path in assets.items():
    if not os.path.isfile(path):
      raise UserError(f"there is no file {path} for the asset {name!r}")
  folder.mkdir(parents=True, exist_ok=True)
  flat = trees.flatten({**variables, "tables": dict(tables)})
  save_arrays(folder, {n: tensor_files.lazy(v) for n, v in flat.items()})
  run_folder.save_config(folder, config)
  for name, path in assets.items():
    if (folder / name).resolve() != pathlib.Path(path).resolve():
      shutil.copyfile(path, folder / name)


def save_arrays(
  folder: pathlib.Path, arrays: Mapping[str, tensor_files.LazyArray]
) -> str:
  """Writes model.safetensors, one array in memory at a time.

  Args:
    arrays: by their flat names, "params..." and "tables...".

  Returns:
    The fingerprint of the parameters.
  """
  digest = hashlib.sha256()

  def add(name: str, array: np.ndarray) -> None:
    if name.startswith("params."):
      _add_to_fingerprint(digest, name.removeprefix("params."), array)

  blank = {"fingerprint": "0" * 16}  # known when all has been written
  with tensor_files.SafetensorsWriter(
    folder / _WEIGHTS, arrays, blank
  ) as writer:
    writer.write_all(add)
    found = digest.hexdigest()[:16]
    writer.metadata["fingerprint"] = found
  return found


class OpenModel(NamedTuple):
  """What `open_model` finds."""

  config: ml_collections.ConfigDict
  arrays: dict[str, tensor_files.LazyArray]  # by their flat names
  assets_dir: str
  fingerprint: str | None  # as stored; a run stores none


def open_model(path: PathLike) -> OpenModel:
  """Opens a model folder, or the best or newest step of a run's workdir.

  The best is taken where the run has kept one (best.py), and of a run the
  averaged parameters where there are any. A model folder's arrays are loaded
  one by one, a run's all at the first.

  Raises:
    UserError: the folder holds neither, or what it holds is damaged.
  """
  folder = pathlib.Path(path)
  if (folder / _WEIGHTS).is_file():
    arrays, metadata = tensor_files.read_safetensors(folder / _WEIGHTS)
    stored, assets_dir = metadata.get("fingerprint"), folder
  elif (folder / "checkpoints").is_dir():
    arrays = _open_run(folder / "checkpoints")
    stored, assets_dir = None, folder / "assets"
  else:
    raise UserError(
      f"there is no model in {path}: looked for {_WEIGHTS} (a model folder) and"
      " checkpoints/ (a run)"
    )
  if not any(name.startswith("params.") for name in arrays):
    raise UserError(f"the model in {path} has no parameters")
  return OpenModel(
    run_folder.load_config(folder), arrays, str(assets_dir), stored
  )


def load_model(
  path: PathLike, *, abstract: bool = False, lazy: bool = False
) -> LoadedModel:
  """Loads a model folder, or the best or newest step of a run's workdir.

  Args:
    abstract: give `jax.ShapeDtypeStruct`s in place of arrays, and "" as the
      fingerprint; no weights are read.
    lazy: variables of a model folder are `LazyArray`s, whose bytes nobody has
      compared with the fingerprint.

  Raises:
    UserError: as `open_model`, or the parameters are not those that were saved.
  """
  config, arrays, assets_dir, stored = open_model(path)
  flat: dict[str, Any] = arrays
  if abstract:
    flat = {
      n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in arrays.items()
    }
    stored = ""
  elif stored is None or not lazy:
    flat, stored = _load_all(arrays, stored, str(path))
  variables = trees.unflatten(flat)
  tables = tensor_files.loaded(variables.pop("tables", {}))
  return LoadedModel(config, variables, tables, assets_dir, stored)


def load_variables(
  model: LoadedModel | Any, where: str, convert: Callable[[np.ndarray], Any]
) -> dict[str, PyTree]:
  """The variables of a model that was loaded with `lazy`, one by one.

  Args:
    model: has `variables` and the `fingerprint` that they must have.
    where: what a message calls its folder.
    convert: what is kept of each array.

  Raises:
    UserError: the parameters are not those that were saved.
  """
  flat, _ = _load_all(
    trees.flatten(model.variables), model.fingerprint, where, convert
  )
  return trees.unflatten(flat)


def _load_all(
  arrays: Mapping[str, Any],
  stored: str | None,
  where: str,
  convert: Callable[[np.ndarray], Any] = lambda array: array,
) -> tuple[dict[str, Any], str]:
  """Loads arrays that may be lazy, and compares their fingerprint."""
  digest = hashlib.sha256()
  flat = {}
  for name in sorted(arrays):
    array = tensor_files.loaded(arrays[name])
    if name.startswith("params."):
      _add_to_fingerprint(digest, name.removeprefix("params."), array)
    flat[name] = convert(array)
  found = digest.hexdigest()[:16]
  if stored not in (None, found):
    raise UserError(
      f"{pathlib.Path(where) / _WEIGHTS} is damaged: its parameters have the"
      f" fingerprint {found}, but were saved with {stored}"
    )
  return flat, found


def _open_run(directory: pathlib.Path) -> dict[str, tensor_files.LazyArray]:
  """The variables and tables of one step, by the names of a model."""
  read = functools.cache(functools.partial(_read_run, directory))
  return {
    name: tensor_files.LazyArray(
      zeros.shape, zeros.dtype, functools.partial(lambda n: read()[n], name)
    )
    for name, zeros in _read_run(directory, shapes_only=True).items()
  }


def _read_run(
  directory: pathlib.Path, *, shapes_only: bool = False
) -> dict[str, np.ndarray]:
  ema, plain = "state.ema_params.", "state.params."
  others = {"state.model_state.": "", "tables.": "tables."}

  def select(names: Iterable[str]) -> list[str]:
    names = list(names)
    params = ema if any(n.startswith(ema) for n in names) else plain
    return [n for n in names if n.startswith((params, *others))]

  checkpointer = checkpoints.Checkpointer(directory)
  _, flat = checkpointer.restore_flat(
    _best_step(checkpointer), select, shapes_only=shapes_only
  )
  prefixes = {ema: "params.", plain: "params.", **others}
  return {
    new + name.removeprefix(old): leaf
    for name, leaf in flat.items()
    for old, new in prefixes.items()
    if name.startswith(old)
  }


def _best_step(checkpointer: checkpoints.Checkpointer) -> int | None:
  """The step that the newest one names as the best; None: it names none."""
  names = rf"^{re.escape(_BEST)}$"
  if not checkpointer.steps() or not any(
    checkpointer.restore_flat(names=names, shapes_only=True)[1]
  ):
    return None
  _, flat = checkpointer.restore_flat(names=names)
  return int(flat[_BEST]) or None if _BEST in flat else None
