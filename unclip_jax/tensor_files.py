"""Named arrays in files, read and written one at a time.

A `LazyArray` says what an array looks like and loads it when asked, so that a
model is read, changed and written with one array in memory. safetensors is the
one format that is written; torch's own files are only read, and only what is
nothing but tensors in them (`weights_only`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from unclip_jax.utils.errors import UserError

# safetensors' names of the types that models are made of.
_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """An array that is not in memory yet; a leaf of trees."""

  shape: tuple[int, ...]
  dtype: np.dtype
  load: Callable[[], np.ndarray]

  def astype(self, dtype: np.dtype) -> LazyArray:
    """The same, as another type once it is loaded."""
    return LazyArray(self.shape, dtype, lambda: self.load().astype(dtype))


def loaded(tree: Any) -> Any:
  """A tree whose lazy arrays are in memory."""
  return jax.tree.map(
    lambda x: x.load() if isinstance(x, LazyArray) else x, tree
  )


def cast(tree: Any, dtype: str) -> Any:
  """A tree whose floating-point arrays, lazy or not, are of another type."""
  new = jnp.dtype(dtype)
  return jax.tree.map(
    lambda x: x.astype(new) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    tree,
  )


def lazy(array: Any) -> LazyArray:
  """An array that is in memory, on any device, or is lazy already."""
  if isinstance(array, LazyArray):
    return array
  return LazyArray(
    tuple(np.shape(array)), np.dtype(array.dtype), lambda: np.asarray(array)
  )


def read_safetensors(
  path: str | os.PathLike[str],
) -> tuple[dict[str, LazyArray], dict[str, str]]:
  """The arrays of a safetensors file, and the text that goes with them.

  Raises:
    UserError: there is no such file, or it is not whole or not safetensors.
  """
  _check_is_file(path)
  try:
    # The library checks the header; what it maps into memory is not used.
    with safetensors.safe_open(path, framework="numpy"):
      pass
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(f"{path} is damaged, or no safetensors file: {e}") from e
  with open(path, "rb") as f:
    (size,) = struct.unpack("<Q", f.read(8))
    header = json.loads(f.read(size))
  metadata = header.pop("__metadata__", {})
  arrays = {}
  for name, entry in header.items():
    if entry["dtype"] not in _DTYPES:
      raise UserError(
        f"{path} holds {name} in the unknown type {entry['dtype']}"
      )
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    offset = 8 + size + entry["data_offsets"][0]
    arrays[name] = LazyArray(
      shape, dtype, _Reader(str(path), offset, shape, dtype)
    )
  return arrays, metadata


class _Reader(NamedTuple):
  """Reads one array out of a file.

  Not by mapping it: what is mapped counts as memory in use.
  """

  path: str
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def __call__(self) -> np.ndarray:
    array = np.empty(self.shape, self.dtype)
    try:
      with open(self.path, "rb") as f:
        f.seek(self.offset)
        read = f.readinto(array.reshape(-1).view(np.uint8).data)
    except OSError as e:
      raise UserError(f"{self.path} cannot be read: {e.strerror}") from e
    if read != array.nbytes:
      raise UserError(f"{self.path} was cut short while it was open")
    return array


def read_torch(path: str | os.PathLike[str]) -> dict[str, LazyArray]:
  """The tensors of a file that torch saved: .bin, .pt, .ckpt.

  Runs nothing that is in the file. A checkpoint that keeps its weights under
  "state_dict" is taken for those.

  Raises:
    UserError: there is no such file, it holds anything but tensors, it is not
      whole, or torch is not installed.
  """
  _check_is_file(path)
  try:
    import torch
  except ImportError as e:
    raise UserError(
      f"{path} is torch's own format: pip install torch (for the CPU will do), "
      "or give the .safetensors file"
    ) from e
  options = dict(map_location="cpu", weights_only=True)
  try:
    found = torch.load(path, mmap=zipfile.is_zipfile(path), **options)
  except pickle.UnpicklingError as e:
    raise UserError(
      f"{path} is damaged, or holds more than tensors and was not run: get a "
      ".safetensors file"
    ) from e
  except Exception as e:  # whatever a damaged file makes of the unpickler
    first = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise UserError(f"{path} is damaged, or not torch's: {first}") from e
  if isinstance(found, Mapping) and isinstance(
    found.get("state_dict"), Mapping
  ):
    found = found["state_dict"]
  if isinstance(found, (tuple, list)):
    found = {str(i): tensor for i, tensor in enumerate(found)}
  if not isinstance(found, Mapping) or not all(
    isinstance(tensor, torch.Tensor) for tensor in found.values()
  ):
    raise UserError(f"{path} holds no dictionary of tensors: is it a model?")
  return {name: _lazy_tensor(x.detach()) for name, x in found.items()}


def _lazy_tensor(tensor: Any) -> LazyArray:
  import torch

  is_bfloat16 = tensor.dtype == torch.bfloat16
  like = torch.empty(0, dtype=torch.int16 if is_bfloat16 else tensor.dtype)
  dtype = np.dtype(ml_dtypes.bfloat16) if is_bfloat16 else like.numpy().dtype

  def load() -> np.ndarray:
    plain = tensor.view(torch.int16) if is_bfloat16 else tensor
    return plain.numpy().view(dtype)

  return LazyArray(tuple(tensor.shape), dtype, load)


def _check_is_file(path: str | os.PathLike[str]) -> None:
  if not os.path.isfile(path):
    raise UserError(f"there is no file {path}")


class SafetensorsWriter:
  """Writes a safetensors file array by array, in the order of their names.

  The file gets its name when it is whole. Values of `metadata` may be changed
  until then, to others of the same length.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    arrays: Mapping[str, LazyArray],
    metadata: Mapping[str, str],
  ):
    self.metadata = dict(metadata)
    self._path = pathlib.Path(path)
    self._temporary = self._path.with_name(f".{self._path.name}.tmp")
    self._arrays = arrays
    self._offset = 0
    self._entries: dict[str, Any] = {}
    for name in sorted(arrays):
      array = arrays[name]
      size = int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize
      self._entries[name] = {
        "dtype": _NAMES[array.dtype],
        "shape": list(array.shape),
        "data_offsets": [self._offset, self._offset + size],
      }
      self._offset += size

  def __enter__(self) -> SafetensorsWriter:
    self._file = open(self._temporary, "wb")
    self._file.write(self._header())
    return self

  def write_all(self, on_array: Callable[[str, np.ndarray], None]) -> None:
    """Loads and writes every array; `on_array` is shown each one.

    Raises:
      ValueError: an array has another shape or dtype than it said.
    """
    for name in sorted(self._arrays):
      spec = self._arrays[name]
      array = spec.load()
      if array.shape != spec.shape or array.dtype != spec.dtype:
        raise ValueError(
          f"{name} is {array.dtype}{list(array.shape)}, but was announced as"
          f" {spec.dtype}{list(spec.shape)}"
        )
      array = np.ascontiguousarray(array).reshape(spec.shape)
      on_array(name, array)
      self._file.write(array.reshape(-1).view(np.uint8).data)

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    del error, traceback
    if kind is None:
      self._file.seek(0)
      self._file.write(self._header())
    self._file.close()
    if kind is None:
      os.replace(self._temporary, self._path)
    else:
      self._temporary.unlink()

  def _header(self) -> bytes:
    fields = {"__metadata__": self.metadata, **self._entries}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
  path: str | os.PathLike[str],
  arrays: Mapping[str, LazyArray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file, one array in memory at a time."""
  with SafetensorsWriter(path, arrays, metadata or {}) as writer:
    writer.write_all(lambda name, array: None)
