r"""`config.init_from`: a fresh run that starts with arrays of a trained model.

Which ones is said by a regex over their names in model.safetensors:
"params.conv_in.kernel", "tables.embedding_space.mean". What is selected must
fit; what the new run has and the model has not stays fresh. A network that got
more inputs may start as the model too, with zeros for their weights (`grown`).

  unclip train --config F --workdir W --config.init_from.path=runs/decoder \
    --config.init_from.names='^(?!params.conv_in.kernel)'
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging

from unclip_jax import model_folder, upstream
from unclip_jax.utils import errors, trees

PyTree = Any

_MOST_LISTED = 8


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """The fields of `config.init_from`.

  Attributes:
    path: a run folder (the averaged parameters of its newest step) or one part
      of a released model; "" = from scratch.
    names: regex; arrays in whose names it is found (`re.search`) are taken.
    grown: (regex, axis, parts): arrays in whose names it is found may be
      shorter along that axis than their places. The axis consists of so many
      equal parts, whose first entries they are, and the others are 0.
  """

  path: str = ""
  names: str = ".*"
  grown: Sequence[tuple[str, int, int]] = ()

  def load(
    self,
    frozen: Mapping[str, ml_collections.ConfigDict],
    places: Mapping[str, PyTree],
  ) -> dict[str, jax.Array]:
    """The selected arrays by flat name, each where and as the run has it.

    Args:
      frozen: the run's `config.frozen`, with fingerprints.
      places: shapes, dtypes and shardings of the run's variables, and of its
        "tables".

    Raises:
      UserError: there is no such model, it was trained with other upstream
        models, or what is selected does not fit.
    """
    if not self.path:
      return {}
    model = model_folder.load_model(self.path)
    for name, spec in model.config.get("frozen", {}).items():
      if name in frozen:
        upstream.check_fingerprint(
          name,
          spec,
          frozen[name].fingerprint,
          frozen[name].get("path") or f"config.frozen.{name}",
          model=f"the model in config.init_from.path '{self.path}'",
        )
    arrays = trees.flatten({**model.variables, "tables": model.tables})
    wanted = trees.flatten(places)
    arrays = {
      name: self._grow(name, x, wanted[name].shape) if name in wanted else x
      for name, x in arrays.items()
    }
    selected = self._select(arrays, wanted)
    fresh = [name for name in wanted if name not in selected]
    logging.info(
      "starting with %d arrays of %s (%s); %d stay fresh%s",
      len(selected),
      self.path,
      model.fingerprint,
      len(fresh),
      f": {_listed(fresh)}" if fresh else "",
    )
    return {name: _place(arrays[name], wanted[name]) for name in selected}

  def _grow(
    self, name: str, array: np.ndarray, shape: tuple[int, ...]
  ) -> np.ndarray:
    """The array, with zeros where `grown` says that there may be any."""
    for regex, axis, parts in self.grown:
      if not re.search(regex, name) or not -1 < axis < array.ndim == len(shape):
        continue
      old, new = array.shape[axis], shape[axis]
      if old < new and old % parts == 0 and new % parts == 0:
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        split = array.reshape(*before, parts, old // parts, *after)
        room = [(0, 0)] * split.ndim
        room[axis + 1] = (0, (new - old) // parts)
        array = np.pad(split, room).reshape(*before, new, *after)
    return array

  def _select(
    self,
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
  ) -> list[str]:
    """The names that the regex finds, all of which must fit."""
    try:
      selected = [name for name in arrays if re.search(self.names, name)]
    except re.error as e:
      raise errors.UserError(
        f"config.init_from.names '{self.names}' is not a regular expression: "
        f"{e}"
      ) from e
    if not selected:
      raise errors.UserError(
        f"config.init_from.names '{self.names}' is in no name of "
        f"'{self.path}': {_listed(list(arrays))}"
      )
    wrong = {
      name: f"{name} {list(arrays[name].shape)} for "
      + (f"{list(wanted[name].shape)}" if name in wanted else "nothing")
      for name in selected
      if name not in wanted or arrays[name].shape != wanted[name].shape
    }
    if wrong:
      some = [re.escape(name) for name in list(wrong)[:_MOST_LISTED]]
      raise errors.UserError(
        f"{len(wrong)} arrays of config.init_from.path '{self.path}' do not "
        f"fit this model: {_listed(list(wrong.values()))}; leave them out by "
        f"config.init_from.names, such as '^(?!({'|'.join(some)})$)'"
      )
    return selected


def _place(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
  array = array.astype(like.dtype, copy=False)
  # Each process puts only what its own devices hold.
  return jax.make_array_from_callback(
    array.shape, like.sharding, lambda index: array[index]
  )


def _listed(names: list[str]) -> str:
  more = len(names) - _MOST_LISTED
  tail = f" and {more} more" if more > 0 else ""
  return ", ".join(names[:_MOST_LISTED]) + tail
