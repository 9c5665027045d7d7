"""What the sources that read a format share: folder, tar, parquet and others.

A format gives rows (`Rows`): a key, texts and a picture for each. Here they
become records, the same way for all formats.

  captions    texts with single spaces; those that say nothing are dropped
  order       that of a hash of the keys, so that the first few are a fair
              sample
  split       the format's own, where it has a "validation"; else `holdout`
              percent of "train", by another hash of the keys: a record stays on
              its side where others are added. "all" is both of them
  tokenizer   trained on the captions of 100,000 records at most

Rows are read when they are asked for; what is found broken then is the
pipeline's to replace and to count.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from unclip_jax.data import source, tokenizers
from unclip_jax.data.source import NO_CAPTION, BrokenRecord, Record
from unclip_jax.utils.errors import UserError

# Longer texts are no captions, and would be cut by any tokenizer.
MAX_CHARS = 10_000
# More than 16 megapixels have in any format that is read.
MAX_IMAGE_BYTES = 2**27
_MAX_TRAINING_CHARS = 1000  # longer ones the tokenizer's training would skip
_MAX_TRAINING_RECORDS = 100_000
UNREADABLE = "unreadable"  # a reason of BrokenRecord


class Rows(Protocol):
  """Captioned pictures as a format keeps them.

  Fields:
    name: what messages call them, such as their folder.
    splits: name -> rows; those without splits of their own say "train".
    left_out: reason -> how many were seen that are no rows.
  """

  name: str
  splits: Mapping[str, range]
  left_out: Mapping[str, int]

  def key(self, row: int) -> str:
    """A name that no other row has, of the form "group/name"."""

  def texts(self, row: int) -> Iterable[str]:
    """What stands as its captions.

    Raises:
      BrokenRecord: it cannot be read.
    """

  def image(self, row: int) -> bytes:
    """The encoded picture.

    Raises:
      BrokenRecord: it cannot be read.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """The fields that all of these sources have.

  Fields:
    data_dir: where the tokenizer is kept; None: $UNCLIP_DATA_DIR, else
      ~/.cache/unclip_jax.
    flippable: whether mirrored pictures still fit their captions.
    holdout: percentage held out for validation, unless the data have a split
      "validation"; 0 trains on everything.
    vocab_size: bound on that of the tokenizer.
  """

  data_dir: str | None = None
  flippable: bool = False
  holdout: float = 10.0
  vocab_size: int = 1024

  def __post_init__(self):
    if not 0 <= self.holdout < 100:
      raise UserError("config.data.source.holdout is a percentage in [0, 100)")

  def open(self) -> Rows:
    """What a format defines.

    Raises:
      UserError: there is nothing that can be read.
    """
    raise NotImplementedError

  def records(self, split: str) -> Sequence[Record]:
    """The records of a split; pictures are read late.

    Raises:
      UserError: no such split, nothing in it, or nothing to read.
    """
    if split not in self._splits:
      raise UserError(
        f"there is no split {split!r}; there are {', '.join(self._splits)}"
      )
    rows = self._splits[split]
    if not len(rows):
      raise UserError(
        f"the split {split!r} of {self._rows.name} is empty: change"
        " config.data.source.holdout, or add pictures"
      )
    return Records(self._rows, rows, self.flippable)

  def tokenizer_path(self) -> str:
    """A tokenizer trained on captions, made at need."""
    captions = [c[:_MAX_TRAINING_CHARS] for c in self._some_captions()]
    text = "\n".join([str(self.vocab_size), *captions])
    encoded = text.encode("utf-8", "replace")
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    path = os.path.join(
      self.data_dir or source.default_data_dir(),
      "captioned",
      digest,
      tokenizers.SENTENCEPIECE_FILE,
    )
    if not os.path.isfile(path):
      tokenizers.train(captions, self.vocab_size, path)
    return path

  @property
  def left_out(self) -> Mapping[str, int]:
    """Reason -> how many pictures are in no split."""
    return self._rows.left_out

  def _some_captions(self) -> Iterator[str]:
    rows = self._splits["all"][:_MAX_TRAINING_RECORDS]
    for row in np.sort(rows):  # formats are fast in their own order
      try:
        yield from clean(self._rows.texts(int(row)))
      except BrokenRecord:
        continue

  @functools.cached_property
  def _rows(self) -> Rows:
    return self.open()

  @functools.cached_property
  def _splits(self) -> dict[str, np.ndarray]:
    """Name -> rows in their order."""
    splits = {k: np.asarray(v) for k, v in self._rows.splits.items()}
    if "train" in splits and "validation" not in splits:
      rows = splits["train"]
      # Of 64 bits the upper half.
      fractions = (self._hashes("split", rows) >> np.uint64(32)) / 2**32
      held_out = fractions < self.holdout / 100
      splits |= {"train": rows[~held_out], "validation": rows[held_out]}
    known = [splits[k] for k in ("train", "validation") if k in splits]
    splits["all"] = np.concatenate(known or list(splits.values()))
    return {
      name: rows[np.argsort(self._hashes("order", rows), kind="stable")]
      for name, rows in splits.items()
    }

  def _hashes(self, purpose: str, rows: np.ndarray) -> np.ndarray:
    """uint64 [N], the same for a key always."""
    digests = (
      hashlib.sha256(
        # Names of files need not be valid text.
        f"{purpose} {composed(self._rows.key(int(row)))}".encode(
          "utf-8", "surrogateescape"
        )
      ).digest()[:8]
      for row in rows
    )
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


class Records(Sequence[Record]):
  """Records that are read when they are asked for."""

  def __init__(self, rows: Rows, places: np.ndarray, flippable: bool):
    self._rows = rows
    self._places = places
    self._flippable = flippable

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> Record:
    row = int(self._places[range(len(self))[index]])
    key = self._rows.key(row)
    captions = clean(self._rows.texts(row))
    if not captions:
      raise BrokenRecord(NO_CAPTION, f"the picture {key!r} has no caption")
    return Record(
      image=self._rows.image(row),
      code_point=key,
      name=captions[0],
      group=os.path.dirname(key),
      captions=captions,
      flippable=self._flippable,
    )

  def in_file_order(self) -> Records:
    """The same records, in the order in which they are read fastest."""
    return Records(self._rows, np.sort(self._places), self._flippable)


def clean(texts: Iterable[str]) -> tuple[str, ...]:
  """Texts with single spaces; those that say nothing are dropped."""
  lines = (" ".join(text[:MAX_CHARS].split()) for text in texts)
  return tuple(
    line
    for line in lines
    if any(c.isprintable() and not c.isspace() for c in line)
  )


def composed(path: str) -> str:
  """The one form of a name; some systems store accents apart."""
  return unicodedata.normalize("NFC", path)


def find_files(path: str, suffix: str) -> list[str]:
  """The files that a field `path` means, sorted.

  Args:
    path: a file, a folder (then those in it and below it with the suffix), or
      a pattern such as "data/*.tar", in which ** is any number of folders.
    suffix: ".tar".

  Raises:
    UserError: there are none.
  """
  pattern = path
  if os.path.isdir(path):
    pattern = os.path.join(glob.escape(path), "**", f"*{suffix}")
  found = sorted(f for f in glob.glob(pattern, recursive=True) if _is_file(f))
  if not found:
    raise UserError(
      f"there is no file {path!r}: config.data.source.path must name a"
      f" {suffix} file, a folder of them, or a pattern such as"
      f" 'data/*{suffix}'"
    )
  return found


def short_names(path: str, files: Sequence[str]) -> list[str]:
  """What `find_files(path)` found without its folder and without suffixes."""
  folders = [os.path.dirname(os.path.abspath(file)) for file in files]
  root = path if os.path.isdir(path) else os.path.commonpath(folders)
  return [os.path.splitext(os.path.relpath(f, root))[0] for f in files]


def texts_at(value: Any, path: str) -> list[str]:
  """Every text at a place like "captions/text" of nested fields and lists."""
  if isinstance(value, bytes):
    value = value.decode("utf-8", "replace")
  if isinstance(value, str):
    return [] if path else [value]
  if isinstance(value, Mapping):
    # TFDS has names like "image/filename".
    name, _, rest = (path, "", "") if path in value else path.partition("/")
    return texts_at(value.get(name), rest)
  if isinstance(value, (list, tuple, np.ndarray)):
    return [text for item in value for text in texts_at(item, path)]
  return []


def texts_in(row: Mapping[str, Any], places: Sequence[str]) -> list[str]:
  """The texts at all of these places."""
  return [text for place in places for text in texts_at(row, place)]


def image_of(value: Any, *, key: str) -> bytes:
  """The encoded picture in a cell: bytes, or fields with "bytes" (as Hugging
  Face's).

  Raises:
    BrokenRecord: there is none.
  """
  if isinstance(value, Mapping):
    value = value.get("bytes")
  if not isinstance(value, bytes):
    raise BrokenRecord(UNREADABLE, f"the record {key!r} holds no picture")
  check_size(len(value), key=key)
  return value


def check_columns(
  name: str, columns: Sequence[str], image: str, captions: Sequence[str]
) -> tuple[str, ...]:
  """The places of captions that a table has.

  Args:
    name: what messages call the table.
    columns: that it has.
    image: the field `image` of a source.
    captions: the field `captions`, places as `texts_at` takes them.

  Raises:
    UserError: it has no picture, or none of the captions.
  """
  found = tuple(c for c in captions if c.partition("/")[0] in columns)
  if image not in columns or not found:
    raise UserError(
      f"{name} has the columns {', '.join(columns)}: name those of the picture"
      " and of the captions by config.data.source.image and .captions"
    )
  return found


def check_size(num_bytes: int, *, key: str) -> None:
  """Raises BrokenRecord where a file is larger than any picture."""
  if num_bytes > MAX_IMAGE_BYTES:
    raise BrokenRecord(
      UNREADABLE, f"the picture {key!r} has {num_bytes} bytes: it is none"
    )


def _is_file(path: str) -> bool:
  hidden = os.path.basename(path).startswith(".")
  return os.path.isfile(path) and not hidden
