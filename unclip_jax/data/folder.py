"""Source `folder`: your own pictures, each with a caption.

All .png, .jpg, .jpeg and .webp files in a folder and below it (names that start
with a dot excepted; links are followed). Captions are read from

  a text file     beside each picture: a.txt for a.jpg, a phrasing a line
  metadata.jsonl  in the folder: {"file_name": "b/a.jpg", "text": "..."} a line
  metadata.csv    the same as columns (both as Hugging Face's imagefolder); a
                  file that is named twice has two phrasings

What cannot be used is left out: pictures without a caption, and those whose
header cannot be read or speaks of more than 16 megapixels. How many they are is
logged once. Damage behind the header shows when a picture is first read.
Captions, order and splits are as data/captioned.py says; keys are the paths.
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from unclip_jax.data import captioned, preprocess
from unclip_jax.data.source import NO_CAPTION, BrokenRecord
from unclip_jax.utils.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclasses.dataclass(frozen=True)
class Source(captioned.Source):
  """The fields of `config.data.source`, beside those of all such sources.

  Fields:
    folder: holds the pictures.
  """

  folder: str

  def open(self) -> captioned.Rows:
    if not os.path.isdir(self.folder):
      raise UserError(
        f"there is no folder {self.folder!r}: config.data.source.folder must"
        " name that of your pictures"
      )
    paths = _find(self.folder)
    texts = _captions(self.folder, paths)
    used = [p for p in paths if texts[p]]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      readable = list(pool.map(self._is_readable, used))
    unreadable = [p for p, ok in zip(used, readable) if not ok]
    summary = (
      f"{len(paths)} pictures in {self.folder}, of which"
      f" {len(paths) - len(used)} have no caption and {len(unreadable)} no"
      " readable header"
    )
    if len(unreadable) == len(used):
      raise UserError(
        f"nothing to train on: {summary}; captions come from a .txt file beside"
        f" each picture or from {' or '.join(_METADATA)}"
      )
    if len(used) - len(unreadable) < len(paths):
      some = f" ({', '.join(unreadable[:3])})" if unreadable else ""
      logging.warning("%s%s: these are left out", summary, some)
    kept = list(itertools.compress(used, readable))
    left_out = {
      NO_CAPTION: len(paths) - len(used),
      preprocess.BROKEN: len(unreadable),
    }
    left_out = {reason: count for reason, count in left_out.items() if count}
    return _Rows(self.folder, kept, texts, left_out)

  def _is_readable(self, path: str) -> bool:
    try:
      with open(os.path.join(self.folder, path), "rb") as file:
        preprocess.open_picture(file, name=path)
    except (OSError, UserError):
      return False
    return True


class _Rows:
  """Files of a folder; see captioned.Rows."""

  def __init__(
    self,
    folder: str,
    paths: Sequence[str],
    texts: Mapping[str, tuple[str, ...]],
    left_out: Mapping[str, int],
  ):
    self.name = folder
    self.left_out = left_out
    self.splits = {"train": range(len(paths))}
    self._paths = paths
    self._texts = texts

  def key(self, row: int) -> str:
    return self._paths[row]

  def texts(self, row: int) -> Sequence[str]:
    return self._texts[self._paths[row]]

  def image(self, row: int) -> bytes:
    path = self._paths[row]
    try:
      with open(os.path.join(self.name, path), "rb") as file:
        captioned.check_size(os.fstat(file.fileno()).st_size, key=path)
        return file.read()
    except OSError as e:
      raise BrokenRecord(captioned.UNREADABLE, str(e)) from e


def _find(root: str) -> list[str]:
  """Paths of all pictures below a folder, relative to it, with "/"; sorted."""
  seen = set()
  found = []
  for folder, folders, files in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in seen:  # a link to where the walk has been
      folders.clear()
      continue
    seen.add(real)
    folders[:] = sorted(x for x in folders if not x.startswith("."))
    for name in files:
      if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
        path = os.path.relpath(os.path.join(folder, name), root)
        found.append(path.replace(os.sep, "/"))
  return sorted(found)


def _captions(folder: str, paths: Sequence[str]) -> dict[str, tuple[str, ...]]:
  """Path -> captions; () where there are none."""
  found = [name for name in _METADATA if os.path.isfile(f"{folder}/{name}")]
  if len(found) > 1:
    raise UserError(
      f"{folder} holds both {' and '.join(found)}: delete one of them"
    )
  if not found:
    return {
      p: captioned.clean(_text_beside(folder, p).splitlines()) for p in paths
    }
  texts = defaultdict(list)
  for row in _rows(os.path.join(folder, found[0])):
    name, text = row.get("file_name"), row.get("text")
    if isinstance(name, str) and isinstance(text, str):
      texts[captioned.composed(os.path.normpath(name))].append(text)
  return {p: captioned.clean(texts[captioned.composed(p)]) for p in paths}


def _text_beside(folder: str, path: str) -> str:
  """The text file of a picture; "" where there is none that can be read."""
  name = os.path.join(folder, os.path.splitext(path)[0] + ".txt")
  try:
    with open(name, encoding="utf-8-sig", errors="replace") as file:
      return file.read(captioned.MAX_CHARS)
  except OSError:
    return ""


def _rows(path: str) -> Iterator[Mapping[str, Any]]:
  """The rows of a metadata file that can be read."""
  with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
    rows = iter(csv.DictReader(file) if path.endswith(".csv") else file)
    while True:
      try:
        row = next(rows)
        row = json.loads(row) if isinstance(row, str) else row
      except StopIteration:
        return
      except (csv.Error, ValueError, RecursionError):
        continue
      if isinstance(row, dict):
        yield row
