"""Which foreign tensor holds which of our parameters, said once for both ways.

A weight format is a list of `Pair`s. torch keeps a Dense kernel as [out, in]
and a convolution's as [out, in, H, W]; ours are [in, out] and [H, W, in, out].
Every tensor of the source must be used and every parameter filled: what is
left over, missing or of another shape is listed, and nothing is written.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import einops
import numpy as np

from unclip_jax import tensor_files
from unclip_jax.tensor_files import LazyArray
from unclip_jax.utils import errors

Arrays = Sequence[np.ndarray]

_NUM_NAMES = 8  # of a kind that a message lists


class Pair(NamedTuple):
  """One foreign tensor and those of our arrays that it holds.

  Attributes:
    theirs: the tensor's name.
    ours: flat names of our arrays, "params.block_0.attn.query.kernel".
    to_ours: the tensor -> our arrays.
    to_theirs: our arrays -> the tensor; the exact inverse.
  """

  theirs: str
  ours: tuple[str, ...]
  to_ours: Callable[[np.ndarray], Arrays]
  to_theirs: Callable[[Arrays], np.ndarray]


def same(theirs: str, ours: str) -> Pair:
  """The tensor as it is."""
  return Pair(theirs, (ours,), lambda x: (x,), lambda xs: xs[0])


def rearranged(theirs: str, ours: str, pattern: str, **sizes: int) -> Pair:
  """The tensor rearranged by an einops pattern, theirs on the left."""
  left, right = pattern.split("->")
  inverse = f"{right} -> {left}"
  return Pair(
    theirs,
    (ours,),
    lambda x: (einops.rearrange(x, pattern, **sizes),),
    lambda xs: einops.rearrange(xs[0], inverse, **sizes),
  )


def dense(theirs: str, ours: str, *, bias: bool = True) -> list[Pair]:
  """torch's Linear and our Dense."""
  return [
    rearranged(f"{theirs}.weight", f"{ours}.kernel", "o i -> i o"),
    *([same(f"{theirs}.bias", f"{ours}.bias")] if bias else []),
  ]


def conv(theirs: str, ours: str, *, bias: bool = True) -> list[Pair]:
  """torch's Conv2d and our Conv."""
  return [
    rearranged(f"{theirs}.weight", f"{ours}.kernel", "o i h w -> h w i o"),
    *([same(f"{theirs}.bias", f"{ours}.bias")] if bias else []),
  ]


def norm(theirs: str, ours: str) -> list[Pair]:
  """torch's LayerNorm or GroupNorm and ours."""
  return [
    same(f"{theirs}.weight", f"{ours}.scale"),
    same(f"{theirs}.bias", f"{ours}.bias"),
  ]


def fused_dense(
  theirs: tuple[str, str],
  ours: Sequence[str],
  *,
  num_heads: int | None = None,
  pattern: str = "o i",
) -> list[Pair]:
  """Several of our Dense layers in one of torch's, such as a qkv projection.

  Args:
    theirs: names of the weight and of the bias.
    ours: the layers, in the order of their rows.
    num_heads: None: all rows of one layer, then all of the next; N: the layers
      take turns, one head's rows each.
    pattern: einops pattern of the weight, "o i" or "o i 1" (a Conv1d).
  """
  turns = num_heads or 1
  parts = len(ours)

  def split(x: np.ndarray) -> Arrays:
    layers = einops.rearrange(x, "(n p k) ... -> p (n k) ...", p=parts, n=turns)
    return list(layers)

  def join(xs: Arrays) -> np.ndarray:
    return einops.rearrange(np.stack(xs), "p (n k) ... -> (n p k) ...", n=turns)

  def split_weight(x: np.ndarray) -> Arrays:
    return [x.T for x in split(einops.rearrange(x, f"{pattern} -> o i"))]

  def join_weight(xs: Arrays) -> np.ndarray:
    return einops.rearrange(join([x.T for x in xs]), f"o i -> {pattern}")

  weight, bias = theirs
  return [
    Pair(weight, tuple(f"{x}.kernel" for x in ours), split_weight, join_weight),
    Pair(bias, tuple(f"{x}.bias" for x in ours), split, join),
  ]


def to_ours(
  pairs: Iterable[Pair],
  tensors: Mapping[str, LazyArray],
  shapes: Mapping[str, tuple[int, ...]],
  *,
  where: str,
  ignored: str = r"(?!)",
) -> dict[str, LazyArray]:
  """Our arrays, made of foreign ones when they are loaded.

  Args:
    shapes: flat name -> shape of all that our model has.
    where: what a message calls the source.
    ignored: regex; tensors whose whole name it matches hold no weights.

  Raises:
    UserError: tensors that nothing takes, parameters that nothing fills, or
      shapes that do not fit.
  """
  found, problems = {}, []
  unused = {x for x in tensors if not re.fullmatch(ignored, x)}
  for pair in pairs:
    if pair.theirs not in tensors:
      problems.append(f"{pair.theirs} is missing")
      continue
    unused.discard(pair.theirs)
    tensor = tensors[pair.theirs]
    try:
      made = pair.to_ours(np.broadcast_to(np.zeros((), bool), tensor.shape))
      made_shapes = [x.shape for x in made]
    except (einops.EinopsError, ValueError):
      made_shapes = [None] * len(pair.ours)
    if any(s != shapes.get(n) for n, s in zip(pair.ours, made_shapes)):
      problems.append(f"{pair.theirs} has another shape, {list(tensor.shape)}")
    for i, name in enumerate(pair.ours):
      found[name] = LazyArray(
        shapes.get(name, ()),
        tensor.dtype,
        functools.partial(_load_ours, pair, tensor, i),
      )
  problems += [f"{name} is left over" for name in sorted(unused)]
  unfilled = sorted(set(shapes) - set(found))
  problems += [f"nothing fills our {x}" for x in unfilled if not problems]
  if problems:
    listed = "; ".join(problems[:_NUM_NAMES])
    more = len(problems) - _NUM_NAMES
    raise errors.UserError(
      f"{where} does not hold the expected model: {listed}"
      + (f"; and {more} more" if more > 0 else "")
      + ". Is it a folder of this kind of model, and whole?"
    )
  return found


def _load_ours(pair: Pair, tensor: LazyArray, i: int) -> np.ndarray:
  return pair.to_ours(tensor.load())[i]


def to_theirs(
  pairs: Iterable[Pair], arrays: Mapping[str, LazyArray], *, where: str
) -> dict[str, LazyArray]:
  """The foreign tensors, made of our arrays when they are loaded.

  Raises:
    UserError: our model lacks one of them, or has one that the format lacks.
  """
  pairs = list(pairs)
  named = {name for pair in pairs for name in pair.ours}
  missing, unknown = named - set(arrays), set(arrays) - named
  if missing or unknown:
    text = [f"{name} is missing" for name in sorted(missing)]
    text += [f"{name} has no place there" for name in sorted(unknown)]
    raise errors.UserError(
      f"{where} cannot be written in this format:"
      f" {'; '.join(text[:_NUM_NAMES])}"
    )
  tensors = {}
  for pair in pairs:
    parts = [arrays[name] for name in pair.ours]
    blanks = [np.broadcast_to(np.zeros((), bool), x.shape) for x in parts]
    tensors[pair.theirs] = LazyArray(
      pair.to_theirs(blanks).shape,
      parts[0].dtype,
      functools.partial(_load_theirs, pair, parts),
    )
  return tensors


def _load_theirs(pair: Pair, parts: Sequence[LazyArray]) -> np.ndarray:
  return pair.to_theirs([part.load() for part in parts])


def find_tensors(folder: str, stems: Sequence[str]) -> dict[str, LazyArray]:
  """The tensors of a folder's weights: STEM.safetensors, else .bin, else .pt.

  Args:
    stems: file names without their ending, the first that is there counts;
      "model" and the like may also be in parts with an index
      (STEM.safetensors.index.json).

  Raises:
    UserError: there are none, or they are damaged.
  """
  for ending in ("safetensors", "bin", "pt"):
    for stem in stems:
      path = os.path.join(folder, f"{stem}.{ending}")
      if os.path.isfile(path):
        return read(path)
      if os.path.isfile(f"{path}.index.json"):
        return _read_parts(f"{path}.index.json")
  raise errors.UserError(
    f"there are no weights in {folder}: looked for "
    + " and ".join(f"{stem}.safetensors" for stem in stems)
    + ", and the same with .bin and .pt"
  )


def read(path: str) -> dict[str, LazyArray]:
  """The tensors of one file, by its ending."""
  if path.endswith(".safetensors"):
    return tensor_files.read_safetensors(path)[0]
  return tensor_files.read_torch(path)


def _read_parts(index: str) -> dict[str, LazyArray]:
  folder = os.path.dirname(index)
  places = read_json(index).get("weight_map")
  files = {str(x) for x in places.values()} if isinstance(places, dict) else ()
  if not files or any(os.path.basename(name) != name for name in files):
    raise errors.UserError(f"{index} is damaged: it names no files beside it")
  tensors: dict[str, LazyArray] = {}
  for name in sorted(files):
    tensors |= read(os.path.join(folder, name))
  return tensors


def read_json(path: str) -> dict[str, Any]:
  """A JSON file that holds fields by name.

  Raises:
    UserError: there is none, or it holds something else.
  """
  try:
    with open(path, encoding="utf-8") as f:
      fields = json.load(f)
  except OSError as e:
    raise errors.UserError(f"there is no {path}: is the folder whole?") from e
  except (ValueError, RecursionError) as e:
    raise errors.UserError(f"{path} is damaged: {e}") from e
  if not isinstance(fields, dict):
    raise errors.UserError(f"{path} is damaged: it holds no fields")
  return fields
