"""Datasets in TFDS's ArrayRecord folders: prepared once, read whole.

Of several processes one prepares and the others wait for it. A folder appears
whole or not at all; a damaged one is noticed before any work starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from unclip_jax.data import source
from unclip_jax.utils.errors import UserError

_PART = ".part-"
# What `quiet` switches belongs to the process: one thread at a time.
_QUIET = threading.RLock()


def prepare(
  make: Callable[[str], Any],
  build: Callable[[Any], None],
  data_dir: str | None,
) -> str:
  """Builds a dataset unless it is there.

  Args:
    make: from a folder for datasets to the TFDS builder of this one in it.
    build: fills `builder.data_path`; the folder is moved when it returns.
    data_dir: the folder for datasets; None: `source.default_data_dir()`.

  Returns:
    The dataset's folder.

  Raises:
    UserError: `data_dir` cannot be written to.
  """
  data_dir = os.path.abspath(data_dir or source.default_data_dir())
  folder = str(make(data_dir).data_path)
  if not os.path.isdir(folder):
    with _lock(data_dir):
      if not os.path.isdir(folder):  # no other process was faster
        part = tempfile.mkdtemp(prefix=_PART, dir=data_dir)
        try:
          builder = make(part)
          build(builder)
          os.makedirs(os.path.dirname(folder), exist_ok=True)
          os.rename(builder.data_path, folder)
        finally:
          shutil.rmtree(part, ignore_errors=True)
    logging.info("the dataset is in %s", folder)
  return folder


def read_rows(folder: str) -> list[dict[str, Any]]:
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
def quiet() -> Iterator[None]:
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
