"""Source `folder`: your own pictures, each with a caption.

All .png, .jpg, .jpeg and .webp files in a folder and below it (names that start
with a dot excepted; links are followed). Captions are read from

  a text file     beside each picture: a.txt for a.jpg, a phrasing a line
  metadata.jsonl  in the folder: {"file_name": "b/a.jpg", "text": "..."} a line
  metadata.csv    the same as columns (both as Hugging Face's imagefolder); a
                  file that is named twice has two phrasings

What cannot be used is left out: pictures without a caption, and those whose
header cannot be read or speaks of more than 16 megapixels. How many they are is
logged once. Damage behind the header shows when a picture is first read; the
next whole one of its split then stands in for it.

  order   that of a hash of the paths, so that the first few are a fair sample
  split   by another hash of the paths: it stays where pictures are added
"""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from unclip_jax.data import preprocess, source, tokenizers
from unclip_jax.data.source import Record
from unclip_jax.utils.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_METADATA = ("metadata.jsonl", "metadata.csv")
# Longer texts are no captions, and would be cut by any tokenizer.
_MAX_CHARS = 10_000
_MAX_TRAINING_CHARS = 1000  # longer ones the tokenizer's training would skip


class _Entry(NamedTuple):
  path: str  # relative to the folder, with "/"
  captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
  """The fields of `config.data.source`.

  Fields:
    folder: holds the pictures.
    data_dir: where the tokenizer is kept; None: $UNCLIP_DATA_DIR, else
      ~/.cache/unclip_jax.
    flippable: whether mirrored pictures still fit their captions.
    holdout: percentage held out for validation; 0 trains on everything.
    vocab_size: bound on that of the tokenizer.
  """

  folder: str
  data_dir: str | None = None
  flippable: bool = False
  holdout: float = 10.0
  vocab_size: int = 1024

  def __post_init__(self):
    if not 0 <= self.holdout < 100:
      raise UserError("config.data.source.holdout is a percentage in [0, 100)")

  def records(self, split: str) -> Sequence[Record]:
    """The records of "train", "validation" or "all"; pictures are read late.

    Raises:
      UserError: no such split, nothing in it, or no such folder.
    """
    if split not in source.SPLITS:
      raise UserError(
        f"there is no split {split!r}; there are {', '.join(source.SPLITS)}"
      )
    entries = [e for e in self._entries if self._in_split(e, split)]
    if not entries:
      raise UserError(
        f"the split {split!r} of {self.folder} is empty: change"
        " config.data.source.holdout, or add pictures"
      )
    return _Records(self.folder, entries, self.flippable)

  def tokenizer_path(self) -> str:
    """A tokenizer trained on all captions, made at need."""
    captions = [
      c[:_MAX_TRAINING_CHARS] for e in self._entries for c in e.captions
    ]
    text = "\n".join([str(self.vocab_size), *captions])
    encoded = text.encode("utf-8", "replace")
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    path = os.path.join(
      self.data_dir or source.default_data_dir(),
      "folder",
      digest,
      tokenizers.SENTENCEPIECE_FILE,
    )
    if not os.path.isfile(path):
      tokenizers.train(captions, self.vocab_size, path)
    return path

  def _in_split(self, entry: _Entry, split: str) -> bool:
    digest = _hash("split", entry.path)
    held_out = int.from_bytes(digest[:4], "big") / 2**32 < self.holdout / 100
    return split == "all" or held_out == (split == "validation")

  @functools.cached_property
  def _entries(self) -> list[_Entry]:
    """All that can be used, in their order."""
    if not os.path.isdir(self.folder):
      raise UserError(
        f"there is no folder {self.folder!r}: config.data.source.folder must"
        " name that of your pictures"
      )
    paths = _find(self.folder)
    captions = _captions(self.folder, paths)
    entries = [_Entry(p, captions[p]) for p in paths if captions[p]]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      readable = list(pool.map(self._is_readable, entries))
    unreadable = [e.path for e, ok in zip(entries, readable) if not ok]
    summary = (
      f"{len(paths)} pictures in {self.folder}, of which"
      f" {len(paths) - len(entries)} have no caption and {len(unreadable)} no"
      " readable header"
    )
    if len(unreadable) == len(entries):
      raise UserError(
        f"nothing to train on: {summary}; captions come from a .txt file beside"
        f" each picture or from {' or '.join(_METADATA)}"
      )
    if len(entries) - len(unreadable) < len(paths):
      some = f" ({', '.join(unreadable[:3])})" if unreadable else ""
      logging.warning("%s%s: these are left out", summary, some)
    return sorted(
      itertools.compress(entries, readable),
      key=lambda entry: _hash("order", entry.path),
    )

  def _is_readable(self, entry: _Entry) -> bool:
    try:
      with open(os.path.join(self.folder, entry.path), "rb") as file:
        preprocess.open_picture(file, name=entry.path)
    except (OSError, UserError):
      return False
    return True


class _Records(Sequence[Record]):
  """Records whose pictures are read from their files when asked for."""

  def __init__(self, folder: str, entries: Sequence[_Entry], flippable: bool):
    self._folder = folder
    self._entries = entries
    self._flippable = flippable
    self._stand_ins: dict[int, int] = {}  # of all that were read once

  def __len__(self) -> int:
    return len(self._entries)

  def __getitem__(self, index: int) -> Record:
    N = len(self._entries)
    index = range(N)[index]
    if index not in self._stand_ins:
      turns = ((index + turn) % N for turn in range(N))
      whole = next((i for i in turns if self._is_whole(i)), None)
      if whole is None:
        raise UserError(f"no picture in {self._folder} can be decoded any more")
      self._stand_ins[index] = whole
    return self._read(self._stand_ins[index])

  def _is_whole(self, index: int) -> bool:
    if index in self._stand_ins:
      return self._stand_ins[index] == index
    try:
      record = self._read(index)
      preprocess.decode(record.image, name=record.code_point)
    except (OSError, UserError) as e:
      logging.warning("another picture stands in for a damaged one: %s", e)
      return False
    return True

  def _read(self, index: int) -> Record:
    path, captions = self._entries[index]
    with open(os.path.join(self._folder, path), "rb") as file:
      image = file.read()
    return Record(
      image=image,
      code_point=path,
      name=captions[0],
      group=os.path.dirname(path),
      captions=captions,
      flippable=self._flippable,
    )


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
    return {p: _clean(_text_beside(folder, p).splitlines()) for p in paths}
  texts = defaultdict(list)
  for row in _rows(os.path.join(folder, found[0])):
    name, text = row.get("file_name"), row.get("text")
    if isinstance(name, str) and isinstance(text, str):
      texts[_composed(os.path.normpath(name))].append(text)
  return {p: _clean(texts[_composed(p)]) for p in paths}


def _text_beside(folder: str, path: str) -> str:
  """The text file of a picture; "" where there is none that can be read."""
  name = os.path.join(folder, os.path.splitext(path)[0] + ".txt")
  try:
    with open(name, encoding="utf-8-sig", errors="replace") as file:
      return file.read(_MAX_CHARS)
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


def _clean(texts: Sequence[str]) -> tuple[str, ...]:
  """Texts with single spaces; those that say nothing are dropped."""
  lines = (" ".join(text[:_MAX_CHARS].split()) for text in texts)
  return tuple(
    line
    for line in lines
    if any(c.isprintable() and not c.isspace() for c in line)
  )


def _composed(path: str) -> str:
  """The one form of a name; some systems store accents apart."""
  return unicodedata.normalize("NFC", path)


def _hash(purpose: str, path: str) -> bytes:
  # Names need not be valid text.
  name = _composed(path).encode("utf-8", "surrogateescape")
  return hashlib.sha256(f"{purpose} ".encode() + name).digest()
