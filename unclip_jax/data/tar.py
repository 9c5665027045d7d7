"""Source `tar`: tars of pictures and captions, as webdataset and img2dataset
write them.

Files whose names are the same up to the first dot (of the last part) are one
sample: 000001.jpg (or .jpeg, .png, .webp), and its captions from

  000001.txt    a phrasing a line
  000001.json   texts at the fields `captions`, "a/b" inside of a; lists of
                texts are phrasings

Of pictures without either, and of tars that are cut off, a warning tells; whole
samples before the cut are used. Names and places of all files are read once and
kept under data_dir/tar until a tar changes; then any picture is read in one
step. Tars that are compressed as a whole cannot be read so: unpack them first.
Captions, order and splits are as data/captioned.py says; keys are "TAR/NAME".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from unclip_jax.data import captioned, source
from unclip_jax.data.source import NO_CAPTION, BrokenRecord
from unclip_jax.utils.errors import UserError

# Column of the index -> suffixes, without the first dot.
_SUFFIXES = {"image": ("jpg", "jpeg", "png", "webp"), "txt": ("txt",)}
_SUFFIXES |= {"json": ("json",)}
_KINDS = {s: kind for kind, suffixes in _SUFFIXES.items() for s in suffixes}
_MAX_JSON_BYTES = 2**24
_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Source(captioned.Source):
  """The fields of `config.data.source`, beside those of all such sources.

  Fields:
    path: a tar, a folder of them, or a pattern such as "data/*.tar".
    captions: fields of the .json files.
  """

  path: str
  captions: tuple[str, ...] = ("caption", "text")

  def open(self) -> captioned.Rows:
    paths = captioned.find_files(self.path, ".tar")
    names = captioned.short_names(self.path, paths)
    index = _index(paths, names, self.data_dir or source.default_data_dir())
    left_out = {
      NO_CAPTION: int(index.without_caption),
      "the end of a tar": int(index.cut_off),
    }
    left_out = {reason: count for reason, count in left_out.items() if count}
    if left_out:
      logging.warning(
        "left out of %s: %s",
        self.path,
        ", ".join(f"{n} ({reason})" for reason, n in left_out.items()),
      )
    if not len(index.keys):
      raise UserError(
        f"nothing to train on in {self.path}: no picture has a .txt or .json"
        " file of its name (a tar that is compressed must be unpacked first)"
      )
    return _Rows(self.path, paths, index, self.captions, left_out)


class _Index(NamedTuple):
  """Where samples lie; an offset and a size are (0, 0) of what is missing."""

  keys: np.ndarray  # bytes [N]
  tars: np.ndarray  # int32 [N]
  places: np.ndarray  # int64 [N, 3 kinds, offset and size]
  without_caption: np.ndarray  # [], pictures
  cut_off: np.ndarray  # [], tars


class _Rows:
  """Samples of tars; see captioned.Rows."""

  def __init__(
    self,
    name: str,
    paths: Sequence[str],
    index: _Index,
    fields: Sequence[str],
    left_out: Mapping[str, int],
  ):
    self.name = name
    self.left_out = left_out
    self.splits = {"train": range(len(index.keys))}
    self._paths = paths
    self._index = index
    self._fields = fields

  def key(self, row: int) -> str:
    return os.fsdecode(bytes(self._index.keys[row]))

  def texts(self, row: int) -> Sequence[str]:
    found = []
    _, size = self._index.places[row, 1]
    if size:
      # A character has at most four bytes.
      data = self._read(row, "txt", 4 * captioned.MAX_CHARS)
      found += data.decode("utf-8-sig", "replace").splitlines()
    _, size = self._index.places[row, 2]
    if 0 < size <= _MAX_JSON_BYTES:
      try:
        fields = json.loads(self._read(row, "json").decode("utf-8", "replace"))
      except (ValueError, RecursionError):
        fields = {}
      found += captioned.texts_in(fields, self._fields)
    return list(dict.fromkeys(found))  # img2dataset writes both files

  def image(self, row: int) -> bytes:
    captioned.check_size(int(self._index.places[row, 0, 1]), key=self.key(row))
    return self._read(row, "image")

  def _read(self, row: int, kind: str, most: int | None = None) -> bytes:
    path = self._paths[self._index.tars[row]]
    offset, size = map(int, self._index.places[row, [*_SUFFIXES].index(kind)])
    size = min(size, most or size)
    try:
      with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    except OSError as e:
      raise BrokenRecord(captioned.UNREADABLE, str(e)) from e
    if len(data) < size:
      raise BrokenRecord(captioned.UNREADABLE, f"{path} was cut off")
    return data


def _index(paths: Sequence[str], names: Sequence[str], data_dir: str) -> _Index:
  """The index of all tars, from the cache if they are as they were."""
  state = [
    (os.path.realpath(path), name, stat.st_size, stat.st_mtime_ns)
    for path, name, stat in zip(paths, names, map(os.stat, paths))
  ]
  digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
  cache = os.path.join(data_dir, "tar", f"{digest}.npz")
  try:
    with np.load(cache) as arrays:
      return _Index(*(arrays[name] for name in _Index._fields))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    pass
  keys: list[bytes] = []
  tars: list[int] = []
  places: list[list[tuple[int, int]]] = []
  without_caption = cut_off = 0
  for number, (path, name) in enumerate(zip(paths, names)):
    samples, is_whole = _samples(path)
    cut_off += not is_whole
    for stem, files in samples.items():
      if "image" not in files:
        continue
      if files.keys() == {"image"}:
        without_caption += 1
        continue
      keys.append(os.fsencode(f"{name}/{stem}"))
      tars.append(number)
      places.append([files.get(kind, (0, 0)) for kind in _SUFFIXES])
  index = _Index(
    np.array(keys, bytes),
    np.array(tars, np.int32),
    np.array(places, np.int64).reshape(-1, len(_SUFFIXES), 2),
    np.array(without_caption),
    np.array(cut_off),
  )
  os.makedirs(os.path.dirname(cache), exist_ok=True)
  part = f"{cache}.{os.getpid()}.part"
  with open(part, "wb") as file:
    np.savez(file, **index._asdict())
  os.replace(part, cache)
  return index


def _samples(path: str) -> tuple[dict[str, dict[str, tuple[int, int]]], bool]:
  """Stem -> kind -> offset and size in bytes, of what is whole in a tar; and
  whether it has its end."""
  samples: dict[str, dict[str, tuple[int, int]]] = {}
  file_size = os.path.getsize(path)
  is_whole = False
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        tar.members.clear()  # else it keeps them all
        if not member.isreg():
          continue
        stem, kind = _split(member.name)
        if kind and member.offset_data + member.size <= file_size:
          files = samples.setdefault(stem, {})
          files.setdefault(kind, (member.offset_data, member.size))
      tar.fileobj.seek(tar.offset)
      is_whole = tar.fileobj.read(_BLOCK) == bytes(_BLOCK)
  except (tarfile.TarError, OSError, EOFError, ValueError) as e:
    logging.warning("%s cannot be read to its end: %s", path, e)
    return samples, False
  if not is_whole:
    logging.warning("%s is cut off: what is whole before is used", path)
  return samples, is_whole


def _split(name: str) -> tuple[str, str | None]:
  """ "a/b.c.jpg" -> "a/b", the kind of "c.jpg", which is none."""
  folder, base = os.path.split(os.path.normpath(name))
  stem, _, suffix = base.partition(".")
  return os.path.join(folder, stem), _KINDS.get(suffix.lower())
