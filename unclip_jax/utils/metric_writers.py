"""Metric writers with the interface of clu, without TensorFlow.

`clu.metric_writers` cannot be imported without TensorFlow. Here its methods
(`write_scalars/images/texts/histograms/hparams`, `flush`, `close`) write

  WORKDIR/metrics.jsonl                   {"step": 10, "train/loss": 0.5}
  WORKDIR/tb/                             TensorBoard, through tensorboardX, or
                                          clu's own writer where it imports
  WORKDIR/samples/<name>_<8-digit step>.png

A writer that fails warns once and never stops a run.

Shape letters: N pictures of one name, H W C.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import PIL.Image
from absl import logging

from unclip_jax.utils import config as config_lib
from unclip_jax.utils import files

if TYPE_CHECKING:
  import tensorboardX

PathLike = str | os.PathLike[str]
Array = jax.Array | np.ndarray
Scalar = int | float | np.number | Array


class MetricWriter:
  """clu's interface; every method does nothing until it is overridden."""

  def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
    """Writes numbers by name."""

  def write_images(self, step: int, images: Mapping[str, Array]) -> None:
    """Writes pictures [N, H, W, C] or [H, W, C]: float in [0, 1] or uint8."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts by name; TensorBoard reads them as Markdown."""

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Array],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    """Writes the distribution of the values of arrays of any shape."""

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes the run's config, nested or flat."""

  def truncate_after(self, step: int) -> None:
    """Forgets what was written for later steps; a resumed run calls this."""

  def flush(self) -> None:
    """Brings to disk what is buffered."""

  def close(self) -> None:
    """Flushes; nothing may be written afterwards."""


def create_writer(workdir: PathLike) -> MetricWriter:
  """The writer of a run; on processes other than 0 it writes nothing."""
  if jax.process_index() != 0:
    return MultiWriter([])
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  return MultiWriter(
    [
      JsonLinesWriter(workdir / "metrics.jsonl"),
      _tensorboard_writer(workdir / "tb"),
      PngWriter(workdir / "samples"),
    ]
  )


def write_results(
  writer: MetricWriter, step: int, results: Mapping[str, Any]
) -> None:
  """Writes what evaluators yield: numbers, pictures in [-1, 1], and texts."""
  texts = {k: v for k, v in results.items() if isinstance(v, str)}
  results = {k: v for k, v in results.items() if k not in texts}
  scalars = {k: v for k, v in results.items() if np.ndim(v) == 0}
  pictures = {k: v / 2 + 0.5 for k, v in results.items() if np.ndim(v)}
  if scalars:
    writer.write_scalars(step, scalars)
  if pictures:
    writer.write_images(step, pictures)
  if texts:
    writer.write_texts(step, texts)


class MultiWriter(MetricWriter):
  """Writes to several writers; one that fails warns once and is tolerated."""

  def __init__(self, writers: Sequence[Any]):
    self._writers = list(writers)
    self._warned: set[int] = set()

  def _each(self, method: str, *args: Any) -> None:
    for i, writer in enumerate(self._writers):
      try:
        # clu's own writer knows no truncate_after.
        getattr(writer, method, lambda *_: None)(*args)
      except Exception as e:
        if i not in self._warned:
          self._warned.add(i)
          logging.warning(
            "%s.%s failed, the run goes on without it: %r",
            type(writer).__name__,
            method,
            e,
          )

  def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
    self._each("write_scalars", step, scalars)

  def write_images(self, step: int, images: Mapping[str, Array]) -> None:
    self._each("write_images", step, images)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._each("write_texts", step, texts)

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Array],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    self._each("write_histograms", step, arrays, num_buckets)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    self._each("write_hparams", _plain_hparams(hparams))

  def truncate_after(self, step: int) -> None:
    self._each("truncate_after", step)

  def flush(self) -> None:
    self._each("flush")

  def close(self) -> None:
    self._each("close")


class JsonLinesWriter(MetricWriter):
  """One JSON object a line, for scalars and texts.

  Each row is one unbuffered write: a killed process loses none, and tears at
  most the last, which is cut off when the file is opened again.
  """

  def __init__(self, path: PathLike):
    self._path = pathlib.Path(path)
    self._file: Any = None

  def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
    values = {name: _number(value) for name, value in scalars.items()}
    self._write({"step": int(step), **values})

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._write({"step": int(step), **texts})

  def truncate_after(self, step: int) -> None:
    self.close()
    if not self._path.exists():
      return
    kept = []
    for line in self._path.read_bytes().splitlines(keepends=True):
      try:
        if json.loads(line)["step"] <= step and line.endswith(b"\n"):
          kept.append(line)
      except (ValueError, KeyError, TypeError):
        continue  # torn or foreign
    files.write_atomically(self._path, b"".join(kept))

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None

  def _write(self, row: Mapping[str, Any]) -> None:
    if self._file is None:
      # Opened for each part of a run, closed by `close`; unbuffered.
      self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
      content = self._path.read_bytes()
      self._file.truncate(content.rfind(b"\n") + 1)
    line = (json.dumps(row) + "\n").encode()
    written = 0
    try:
      written = self._file.write(line)
    finally:
      if written != len(line):
        self.close()  # opening it again cuts the torn row off
    if written != len(line):
      raise OSError(f"{self._path} took {written} of {len(line)} bytes")


class PngWriter(MetricWriter):
  """One PNG file for each name and step; N pictures become a grid."""

  def __init__(self, directory: PathLike):
    self._directory = pathlib.Path(directory)

  def write_images(self, step: int, images: Mapping[str, Array]) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    for name, value in images.items():
      grid = _grid(_uint8_pictures(value))
      picture = PIL.Image.fromarray(
        grid[..., 0] if grid.shape[2] == 1 else grid
      )
      stem = re.sub(r"[^\w.-]+", "_", name)
      path = self._directory / f"{stem}_{int(step):08d}.png"
      temporary = path.with_suffix(".tmp")
      picture.save(temporary, format="PNG")
      os.replace(temporary, path)


class TensorBoardXWriter(MetricWriter):
  """TensorBoard event files, without TensorFlow."""

  def __init__(self, directory: PathLike):
    self._directory = str(directory)
    self._purge_step: int | None = None
    self._open: tensorboardX.SummaryWriter | None = None

  @property
  def _writer(self) -> tensorboardX.SummaryWriter:
    # Opened at the first write, when it is known where the run resumes.
    if self._open is None:
      # Here, because it imports torch where that is installed: seconds.
      import tensorboardX

      self._open = tensorboardX.SummaryWriter(
        self._directory, purge_step=self._purge_step
      )
    return self._open

  def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, _number(value), step)

  def write_images(self, step: int, images: Mapping[str, Array]) -> None:
    for name, value in images.items():
      pictures = _uint8_pictures(value)
      self._writer.add_images(name, pictures, step, dataformats="NHWC")

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      self._writer.add_text(name, text, step)

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Array],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    for name, values in arrays.items():
      self._writer.add_histogram(
        name,
        np.asarray(values, np.float32),
        step,
        max_bins=(num_buckets or {}).get(name),
      )

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    self._writer.add_hparams(dict(hparams), {}, name="hparams")

  def truncate_after(self, step: int) -> None:
    # TensorBoard hides the events from the purge step on in earlier files.
    self.close()
    self._purge_step = step + 1

  def flush(self) -> None:
    if self._open is not None:
      self._open.flush()

  def close(self) -> None:
    if self._open is not None:
      self._open.close()
      self._open = None


def _tensorboard_writer(directory: pathlib.Path) -> Any:
  """clu's writer where TensorFlow is installed and works, else ours."""
  if importlib.util.find_spec("tensorflow") is not None:
    try:
      from clu import metric_writers

      return metric_writers.SummaryWriter(str(directory))
    except Exception as e:
      logging.warning("clu's writer does not work (%r), using tensorboardX", e)
  return TensorBoardXWriter(directory)


def _number(value: Scalar) -> int | float:
  return np.asarray(value).item()


def _plain_hparams(hparams: Mapping[str, Any]) -> dict[str, Any]:
  """Dotted name -> number, bool or text."""
  return {
    name: value if isinstance(value, (bool, int, float, str)) else str(value)
    for name, value in config_lib.leaves(hparams).items()
  }


def _uint8_pictures(value: Array) -> np.ndarray:
  """Pictures in [0, 1] or uint8 -> uint8 [N, H, W, C]."""
  pictures = np.asarray(value)
  if pictures.ndim == 3:
    pictures = pictures[None]
  if pictures.dtype == np.uint8:
    return pictures
  pictures = np.nan_to_num(pictures.astype(np.float32))
  return np.floor(np.clip(pictures, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _grid(pictures: np.ndarray) -> np.ndarray:
  """[N, H, W, C] -> one picture, row by row, as near to square as N allows."""
  N, H, W, C = pictures.shape
  columns = math.ceil(math.sqrt(N))
  rows = math.ceil(N / columns)
  grid = np.zeros((rows * columns, H, W, C), np.uint8)
  grid[:N] = pictures
  grid = grid.reshape(rows, columns, H, W, C).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * H, columns * W, C)
