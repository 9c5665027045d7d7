"""TorchScript archives: every tensor as torch has it, and nothing is run."""

import os
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.interop import torch_modules  # noqa: E402
from unclip_jax.interop import torchscript  # noqa: E402
from unclip_jax.utils.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def tensors():
  generator = torch.Generator().manual_seed(0)
  x = torch.randn(4, 5, 6, generator=generator)
  return {
    "weight": x,
    "blocks.0.fp16": x.half(),
    "blocks.0.transposed": x.permute(2, 0, 1),
    "blocks.1.slice": x[1:3, ::2],
    "blocks.1.bf16": x.bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "size": torch.tensor(7),
  }


@pytest.fixture(scope="module")
def archive(tensors, tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("script") / "model.pt"
  torch_modules.save_script(tensors, str(path))
  return path


def test_tensors_are_those_of_torch(tensors, archive):
  found = torchscript.read(str(archive))
  assert found.keys() == tensors.keys()
  for name, tensor in tensors.items():
    array = found[name].load()
    assert array.shape == found[name].shape == tuple(tensor.shape)
    assert array.dtype == found[name].dtype
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
    np.testing.assert_array_equal(
      array.astype(np.float32), tensor.float().numpy(), err_msg=name
    )


def test_only_archives_are_taken_for_such(archive, tmp_path):
  assert torchscript.is_archive(str(archive))
  torch.save({"a": torch.zeros(1)}, tmp_path / "plain.pt")
  (tmp_path / "text.pt").write_text("no zip")
  for name in ("plain.pt", "text.pt", "none.pt"):
    assert not torchscript.is_archive(str(tmp_path / name))


def _rewrite(source: pathlib.Path, target: pathlib.Path, **changes) -> str:
  """A copy of an archive in which files have other contents, or are gone."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
    for name in old.namelist():
      content = changes.get(name.partition("/")[2], old.read(name))
      if content is not None:
        new.writestr(name, content)
  return str(target)


class _Harmful:
  def __init__(self, mark: pathlib.Path):
    self._mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self._mark),)


def test_code_in_the_pickle_is_not_run(archive, tmp_path):
  mark = tmp_path / "mark"
  changes = {"data.pkl": pickle.dumps(_Harmful(mark))}
  path = _rewrite(archive, tmp_path / "harmful.pt", **changes)
  with pytest.raises(UserError, match=r"asks for posix\.mkdir"):
    torchscript.read(path)
  assert not mark.exists()


def test_the_code_of_the_archive_is_not_needed(tensors, archive, tmp_path):
  with zipfile.ZipFile(archive) as file:
    names = [name.partition("/")[2] for name in file.namelist()]
  code = {name: None for name in names if name.startswith("code/")}
  assert code
  path = _rewrite(archive, tmp_path / "no_code.pt", **code)
  assert torchscript.read(path).keys() == tensors.keys()


def _pickled(shape: tuple, strides: tuple, offset: int, size: int) -> bytes:
  """data.pkl of a module with one tensor, in storage 0."""

  def number(x: int) -> bytes:
    return pickle.dumps(x, 2)[2:-1]

  def numbers(xs: tuple) -> bytes:
    return b"(" + b"".join(map(number, xs)) + b"t"

  storage = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + number(size) + b"tQ"
  )
  tensor = (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage
    + number(offset)
    + numbers(shape)
    + numbers(strides)
    + b"\x89}tR"
  )
  return b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00w" + tensor + b"sb."


def test_no_tensor_reaches_beyond_its_storage(archive, tmp_path):
  data = np.arange(6, dtype=np.float32)

  def read(*tensor):
    changes = {"data.pkl": _pickled(*tensor), "data/0": data.tobytes()}
    return torchscript.read(_rewrite(archive, tmp_path / "x.pt", **changes))

  array = read((2, 2), (2, 1), 2, 6)["w"].load()
  np.testing.assert_array_equal(array, [[2, 3], [4, 5]])
  for tensor in (
    ((2, 3), (3, 1), 1, 6),
    ((2,), (6,), 0, 6),
    ((7,), (1,), 0, 6),
    ((1,), (1,), -1, 6),
    ((2,), (-1,), 3, 6),
    ((2,), (1, 1), 0, 6),
    ((2,), (1,), 0, 7),
    ((2,), (1,), 0, 10**12),
  ):
    with pytest.raises(UserError, match="damaged"):
      read(*tensor)


@pytest.mark.parametrize(
  "changes",
  [
    {"data.pkl": None},
    {"data.pkl": b""},
    {"data.pkl": b"\x80\x02K\x01."},
    {"data/0": None},
    {"data/0": b"short"},
    {"byteorder": b"big"},
  ],
)
def test_damaged_archives_are_one_line(archive, tmp_path, changes):
  path = _rewrite(archive, tmp_path / "x.pt", **changes)
  with pytest.raises(UserError, match="is damaged") as error:
    torchscript.read(path)
  assert "\n" not in str(error.value)


def test_cut_archives_are_one_line(archive, tmp_path):
  path = tmp_path / "x.pt"
  shutil.copy(archive, path)
  whole = path.read_bytes()
  for length in (0, 10, len(whole) // 2, len(whole) - 30):
    path.write_bytes(whole[:length])
    with pytest.raises(UserError, match="is damaged"):
      torchscript.read(str(path))
