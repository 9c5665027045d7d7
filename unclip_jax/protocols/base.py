"""What a protocol is: an experiment on a whole model, written down.

A protocol is a module with a frozen dataclass `Protocol`, whose fields are its
options; `run` gets a `Subject` and gives a `Result`: numbers, one table, and
what can be drawn of the table. Evaluators measure one predict function;
protocols say what is compared with what (other guidance, other captions, other
splits) and use evaluators for it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from typing import Protocol as TypingProtocol

import numpy as np
from PIL import Image

from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.evaluators import base as evaluators
from unclip_jax.utils import errors, files

Row = Mapping[str, float | str]
# A predict function and what is known of the data -> one that also sees the
# pictures with another network (features.Features.beside).
Beside = Callable[
  [evaluators.Predict, evaluators.Info | None], evaluators.Predict
]


class Plot(NamedTuple):
  """One picture of the table: a line through the rows of each group."""

  x: str
  y: str
  group: str | None = None


class Result(NamedTuple):
  """What a protocol found."""

  rows: Sequence[Row]
  figures: Mapping[str, Any] = {}  # what is not in the table; plain numbers
  plots: Sequence[Plot] = ()
  pictures: Mapping[str, np.ndarray] = {}  # [H, W, 3] in [-1, 1]
  texts: Mapping[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Subject:
  """The model that is looked at, and what it is looked at with.

  Attributes:
    pipe: a pipelines.UnCLIPPipeline.
    data: captions and true pictures of the pipeline's size.
    split: of the data.
    clip: a CLIP beside the pictures: `image_embed`, `text_embed`.
    inception: an Inception beside them: `features`; None: there is none.
    seed: of the draws.
    batch_size: pictures drawn at once.
  """

  pipe: Any
  data: data_pipeline.DataPipeline
  split: str
  clip: Beside
  inception: Beside | None = None
  seed: int = 0
  batch_size: int = 25

  def predict(self, name: str, **options: Mapping[str, Any]) -> Any:
    """A predict function of the pipeline.

    Args:
      **options: stage -> options of its `sample`, in place of its own.

    Raises:
      UserError: the pipeline has no such function.
    """
    predict_fns = self.pipe.predict_fns(self.seed, options)
    if name not in predict_fns:
      raise errors.UserError(
        f"this model does not do {name}: it does {', '.join(predict_fns)}"
      )
    return predict_fns[name]

  def batches(self, count: int | None, split: str | None = None) -> Any:
    """The first examples of a split."""
    return self.data.eval_batches(split or self.split, self.batch_size, count)

  def info(self, split: str | None = None) -> evaluators.Info:
    """What is known of the examples of a split."""
    return lambda index: self.data.example_info(index, split or self.split)

  def networks(self) -> dict[str, str]:
    """For a result: whose features its `fid` and the like are of."""
    return {"features_of": "clip" if self.inception is None else "inception"}

  def look(
    self,
    predict: evaluators.Predict,
    count: int | None,
    *,
    split: str | None = None,
    num_pictures: int = 0,
  ) -> dict[str, np.ndarray]:
    """What the networks beside the model see in the first examples.

    Args:
      predict: gives `image`.
      num_pictures: so many of these are returned too.

    Returns:
      `image_embed`, `text_embed` and `true_image_embed` [N, D] of the CLIP;
      `features` and `true_features` [N, F] of the Inception, or where there is
      none the CLIP's embeddings again; all else that the Inception gives;
      `index` [N]; `image` [num_pictures, H, W, 3] in [-1, 1].
    """
    info = self.info(split)
    seen = self.clip(predict, info)
    if self.inception is not None:
      seen = self.inception(seen, info)
    parts: dict[str, list[np.ndarray]] = {}
    for output, batch in evaluators.walk(
      seen, self.batches(count, split), count
    ):
      kept = {**output, "index": batch["index"]}
      kept["image"] = kept["image"][: max(0, num_pictures)]
      num_pictures -= len(kept["image"])
      for name, rows in kept.items():
        parts.setdefault(name, []).append(rows)
    if not parts:
      raise errors.UserError(evaluators.NOTHING)
    found = {name: np.concatenate(rows) for name, rows in parts.items()}
    found.setdefault("features", found["image_embed"])
    found.setdefault("true_features", found["true_image_embed"])
    return found

  def look_repeatedly(
    self,
    num_images: int,
    count: int,
    *,
    draw: str = "text_to_image",
    split: str | None = None,
    num_pictures: int = 0,
    **options: Mapping[str, Any],
  ) -> dict[str, np.ndarray]:
    """What `look` sees in several pictures of each of the first captions.

    Args:
      num_images: of a caption, each with a seed of its own.
      draw: the predict function.
      count, split, num_pictures: as in `look`.
      **options: as in `predict`.

    Returns:
      The arrays of `look`, [N, num_images, ...].
    """
    seen = []
    for i in range(num_images):
      again = dataclasses.replace(self, seed=self.seed + i)
      predict = again.predict(draw, **options)
      seen.append(
        again.look(predict, count, split=split, num_pictures=num_pictures)
      )
    return {k: np.stack([x[k] for x in seen], axis=1) for k in seen[0]}


class Protocol(TypingProtocol):
  """An experiment."""

  def run(self, subject: Subject) -> Result:
    """Carries it out.

    Raises:
      UserError: the model or the data lacks what it needs.
    """


def measure(
  evaluator: evaluators.Evaluator, arrays: evaluators.Arrays
) -> dict[str, float]:
  """The numbers of an evaluator for what `Subject.look` gave."""
  rows = {name: x for name, x in arrays.items() if name != "image"}
  found = evaluator.run(lambda batch: batch, [rows], None)
  return {name: float(value) for name, value in found if not np.ndim(value)}


def write(
  result: Result, out: pathlib.Path, head: Mapping[str, Any]
) -> list[pathlib.Path]:
  """Writes OUT (JSON), and beside it the table, the plots and the pictures.

  Args:
    out: path of the JSON file.
    head: what stands first in it, such as the protocol and its options.

  Returns:
    All paths.
  """
  out.parent.mkdir(parents=True, exist_ok=True)
  content = {**head, "rows": list(result.rows), **result.figures}
  text = json.dumps(content, indent=2, ensure_ascii=False)
  files.write_atomically(out, text + "\n")
  written = [out, out.with_suffix(".md")]
  files.write_atomically(written[1], table(result.rows) + "\n")
  for name, picture in result.pictures.items():
    path = out.with_suffix(f".{name}.png")
    pixels = np.clip(np.asarray(picture) * 127.5 + 127.5, 0, 255)
    Image.fromarray(np.round(pixels).astype(np.uint8)).save(path)
    written.append(path)
  for name, content in result.texts.items():
    written.append(out.with_suffix(f".{name}.txt"))
    files.write_atomically(written[-1], content)
  for plot in result.plots:
    path = out.with_suffix(f".{plot.y}_by_{plot.x}.png")
    if draw(result.rows, plot, path):
      written.append(path)
  return written


def table(rows: Sequence[Row]) -> str:
  """Rows as Markdown; a column for every name, in order of appearance."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  lines = [names, ["---"] * len(names)]
  lines += [[_cell(row.get(name)) for name in names] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | str | None) -> str:
  if value is None:
    return ""
  if isinstance(value, str):
    return value
  is_count = abs(value) >= 1000 and float(value).is_integer()
  return f"{value:,.0f}" if is_count else f"{value:.4g}"


def draw(rows: Sequence[Row], plot: Plot, path: pathlib.Path) -> bool:
  """Draws a plot; False where no row has both numbers."""
  import matplotlib.figure  # a second, which other programs need not wait for

  rows = [row for row in rows if plot.x in row and plot.y in row]
  if not rows:
    return False
  figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  groups = dict.fromkeys(str(row.get(plot.group, "")) for row in rows)
  for group in groups:
    points = [row for row in rows if str(row.get(plot.group, "")) == group]
    axes.plot(
      [row[plot.x] for row in points],
      [row[plot.y] for row in points],
      marker="o",
      label=group,
    )
  axes.set_xlabel(plot.x.replace("_", " "))
  axes.set_ylabel(plot.y.replace("_", " "))
  axes.grid(alpha=0.3)
  if plot.group:
    axes.legend(title=plot.group.replace("_", " "))
  figure.savefig(path, dpi=150)
  return True
