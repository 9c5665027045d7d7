"""What an evaluator is, and how one walks over batches.

An evaluator never touches a model: it gets a `predict` function (which of the
task's `predict_fns` is the config's choice) and yields names with values. It is
a frozen dataclass named `Evaluator`, whose fields come from
`config.evals.<name>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from unclip_jax.utils import errors

Arrays = Mapping[str, np.ndarray]
Predict = Callable[[Arrays], Arrays]
Info = Callable[[int], Mapping[str, Any]]
Value = float | np.ndarray | str

NOTHING = (
  "there is nothing to evaluate: an evaluator got no example; choose another "
  "split in config.evals"
)


class Evaluator(Protocol):
  """Something that is run on a trained model."""

  def run(
    self, predict: Predict, batches: Iterable[Arrays], info: Info | None
  ) -> Iterator[tuple[str, Value]]:
    """Yields (name, value).

    Args:
      predict: batch -> arrays by name, [B, ...] each.
      batches: arrays by name [B, ...]; rows with `mask` False are padding, and
        neither they nor their predictions have any influence.
      info: position in the source -> what is known about the example (`name`,
        `group`, `captions`, ..., and the `tokenizer` of all), or None where
        the data knows nothing.

    Yields:
      A name, and a float, a picture float32 [H, W, 3] in [-1, 1], or a text in
      Markdown.
    """


def walk(
  predict: Predict,
  batches: Iterable[Arrays],
  max_examples: int | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
  """Yields (predictions, batch) for each batch, without the padding rows.

  Args:
    predict: as in `Evaluator.run`; a prediction without a batch dimension is
      passed on as it is.
    batches: as in `Evaluator.run`; without `mask`, every row is real.
    max_examples: stop after that many real rows; None = all.
  """
  left = np.inf if max_examples is None else max_examples
  for batch in batches:
    size = len(next(iter(batch.values())))
    mask = np.asarray(batch.get("mask", np.ones(size, bool)))
    keep = np.flatnonzero(mask)
    if left < len(keep):
      keep = keep[: int(left)]
    if len(keep) == 0:
      continue
    left -= len(keep)
    predictions = predict(batch)
    yield _rows(predictions, keep), _rows(batch, keep)
    if left <= 0:
      return


def collect(
  predict: Predict,
  batches: Iterable[Arrays],
  outputs: Sequence[str],
  inputs: Sequence[str] = (),
  max_examples: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """All real rows of the named predictions and of the named batch entries.

  Args:
    outputs: names that `predict` must yield.
    inputs: names that the batches must hold.

  Returns:
    (predictions, batch entries), [N, ...] each, in the order of the batches.

  Raises:
    UserError: a name is missing, or there is not one real row.
  """
  predicted: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
  given: dict[str, list[np.ndarray]] = {name: [] for name in inputs}
  count = 0
  for predictions, batch in walk(predict, batches, max_examples):
    for name, rows in predicted.items():
      rows.append(require(predictions, name, "prediction"))
    for name, rows in given.items():
      rows.append(require(batch, name, "batch"))
    count += 1
  if count == 0:
    raise errors.UserError(NOTHING)
  return (
    {name: np.concatenate(rows) for name, rows in predicted.items()},
    {name: np.concatenate(rows) for name, rows in given.items()},
  )


def require(arrays: Arrays, name: str, where: str) -> np.ndarray:
  """The array of that name, or a UserError that lists what there is."""
  if name not in arrays:
    raise errors.UserError(
      f"an evaluator needs '{name}' in the {where}, which has only "
      f"{sorted(arrays)}: choose another 'pred' or evaluator in config.evals"
    )
  return arrays[name]


def _rows(arrays: Arrays, keep: np.ndarray) -> dict[str, np.ndarray]:
  """Some rows of every array; scalars as they are."""
  result = {}
  for name, value in arrays.items():
    value = np.asarray(value)
    result[name] = value[keep] if value.ndim else value
  return result
