"""The tensors of a TorchScript archive, without running it.

`torch.jit.load` compiles the code of an archive, and a model may run some of it
while it is loaded. None of that is needed: an archive is a zip file in which
data.pkl, a pickle of the tree of modules, tells of each tensor its dtype, shape
and strides, and which data/N holds its bytes. That pickle is read here by an
unpickler that knows tensors and empty modules and nothing else, and torch is
not needed at all.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from unclip_jax.tensor_files import LazyArray
from unclip_jax.utils.errors import UserError

_DTYPES = {
  "DoubleStorage": np.dtype("<f8"),
  "FloatStorage": np.dtype("<f4"),
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
  "ShortStorage": np.dtype("<i2"),
  "CharStorage": np.dtype("i1"),
  "ByteStorage": np.dtype("u1"),
  "BoolStorage": np.dtype(np.bool_),
}


def is_archive(path: str) -> bool:
  """Whether a file is a TorchScript archive, by what torch goes by."""
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (OSError, zipfile.BadZipFile):
    return False
  return any(name.endswith("/constants.pkl") for name in names)


def read(path: str) -> dict[str, LazyArray]:
  """The parameters and buffers of an archive, by torch's names.

  Raises:
    UserError: it is damaged, or no archive of a model.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      infos = {info.filename: info for info in archive.infolist()}
      (pickled,) = (n for n in infos if n.endswith("/data.pkl"))
      folder = os.path.dirname(pickled)
      byteorder = f"{folder}/byteorder"
      if byteorder in infos and archive.read(byteorder) != b"little":
        raise ValueError("its bytes are big-endian")
      with archive.open(pickled) as file:
        root = _Unpickler(file, path, folder, infos).load()
    return _flatten(root, "")
  # Whatever a damaged pickle makes of the unpickler.
  except Exception as e:
    raise UserError(
      f"{path} is damaged, or no TorchScript archive of a model: {e}"
    ) from e


class _Module:
  """A module of any class; its attributes are its tensors and submodules."""


class _Storage(NamedTuple):
  """A file of the archive that holds numbers."""

  path: str
  name: str
  dtype: np.dtype
  size: int


def _tensor(
  storage: _Storage,
  offset: int,
  shape: tuple[int, ...],
  strides: tuple[int, ...],
  *others: Any,
) -> LazyArray:
  """What stands for torch._utils._rebuild_tensor_v2."""
  del others  # whether it has a gradient, and hooks
  numbers = (offset, *shape, *strides)
  if len(shape) != len(strides) or any(
    type(x) is not int or x < 0 for x in numbers
  ):
    raise ValueError(f"a tensor of shape {shape} with strides {strides}")
  last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
  if 0 not in shape and last >= storage.size:
    raise ValueError(f"a tensor of shape {shape} reaches beyond {storage.name}")

  def load() -> np.ndarray:
    with zipfile.ZipFile(storage.path) as archive:
      data = archive.read(storage.name)
    flat = np.frombuffer(data, storage.dtype)[offset:]
    steps = [step * storage.dtype.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps)

  return LazyArray(tuple(shape), storage.dtype, load)


class _Unpickler(pickle.Unpickler):
  """Knows tensors, empty modules and ordered dictionaries."""

  def __init__(
    self,
    file: Any,
    path: str,
    folder: str,
    infos: dict[str, zipfile.ZipInfo],
  ):
    super().__init__(file)
    self._path, self._folder, self._infos = path, folder, infos

  def find_class(self, module: str, name: str) -> Any:
    known: dict[tuple[str, str], Callable[..., Any]] = {
      ("torch._utils", "_rebuild_tensor_v2"): _tensor,
      ("collections", "OrderedDict"): dict,
    }
    if (module, name) in known:
      return known[module, name]
    if module == "torch" and name in _DTYPES:
      return _DTYPES[name]
    if module.partition(".")[0] == "__torch__":
      return _Module
    raise ValueError(f"it asks for {module}.{name}, which holds no weights")

  def persistent_load(self, pid: Any) -> _Storage:
    _, dtype, key, _, size = pid
    name = f"{self._folder}/data/{key}"
    if self._infos[name].file_size != size * dtype.itemsize:
      raise ValueError(f"{name} is not as long as it should be")
    return _Storage(self._path, name, dtype, size)


def _flatten(module: Any, prefix: str) -> dict[str, LazyArray]:
  if not isinstance(module, _Module):
    raise ValueError("its root is no module")
  tensors = {}
  for name, value in vars(module).items():
    if isinstance(value, LazyArray):
      tensors[prefix + name] = value
    elif isinstance(value, _Module):
      tensors |= _flatten(value, f"{prefix}{name}.")
  return tensors
