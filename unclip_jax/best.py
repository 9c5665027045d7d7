"""Which step of a run was the best, and when to stop for want of a better one.

Early stopping: a run ends when a metric has not improved in so many evaluations
in a row (Prechelt 1998, "Early stopping - but when?", the criterion UP). The
checkpoint of the best step is kept beside the newest ones, and it is what
whoever loads the run gets; at the end the run's evaluators look at it. What is
known of the best step is a part of each checkpoint, so that a resumed run
decides as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from unclip_jax.utils import errors

# `value` float64, `step` and `stale` int64, all []: the best value, where it
# was found, and how many evaluations there have been since.
Record = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Best:
  """The fields of `config.checkpoint.best`.

  Attributes:
    metric: "eval/NAME/KEY", as it is written; "" = off.
    mode: "min" or "max".
    patience: evaluations in a row without a better value that end the run;
      0 = never.
  """

  metric: str = ""
  mode: str = "min"
  patience: int = 0

  def __post_init__(self) -> None:
    if self.mode not in ("min", "max"):
      raise errors.UserError(
        f"config.checkpoint.best.mode '{self.mode}' is not min or max"
      )
    if self.patience < 0:
      raise errors.UserError(
        f"config.checkpoint.best.patience {self.patience} is a number of "
        "evaluations: choose 0 (never stop) or more"
      )
    if self.patience and not self.metric:
      raise errors.UserError(
        "config.checkpoint.best.patience needs a metric to watch: set "
        "config.checkpoint.best.metric to eval/NAME/KEY"
      )

  def check(self, evals: Collection[str]) -> None:
    """Raises UserError unless the metric comes from one of the evaluators."""
    if self.metric and not any(
      self.metric.startswith(f"eval/{name}/") for name in evals
    ):
      raise errors.UserError(
        f"config.checkpoint.best.metric '{self.metric}' comes from none of "
        f"config.evals: it must begin with one of "
        f"{', '.join(f'eval/{name}/' for name in evals) or '(none)'}"
      )

  def record(self) -> dict[str, Record]:
    """What a checkpoint holds of it at the start of a run; {} if it is off."""
    if not self.metric:
      return {}
    worst = math.inf if self.mode == "min" else -math.inf
    return {"best": _record(worst, 0, 0)}

  def update(
    self,
    record: Mapping[str, Record],
    step: int,
    evaluator: str,
    results: Mapping[str, Any],
  ) -> dict[str, Record]:
    """The record after an evaluator has been run at a step.

    Args:
      evaluator: its name in `config.evals`.
      results: what it found, by key.

    Raises:
      UserError: the metric is that evaluator's, and was not found.
    """
    name = f"eval/{evaluator}/"
    if not self.metric or not self.metric.startswith(name):
      return dict(record)
    key = self.metric.removeprefix(name)
    if key not in results:
      raise errors.UserError(
        f"config.checkpoint.best.metric '{self.metric}' was not found: "
        f"{evaluator} gives {', '.join(results)}"
      )
    before, value = record["best"], float(results[key])
    sign = 1 if self.mode == "min" else -1
    if sign * value < sign * before["value"]:
      return {"best": _record(value, step, 0)}
    stale = int(before["stale"]) + 1
    return {"best": {**before, "stale": np.asarray(stale, np.int64)}}

  def is_over(self, record: Mapping[str, Record]) -> bool:
    """Whether the run has waited long enough for a better value."""
    return bool(self.patience) and int(record["best"]["stale"]) >= self.patience


def step_of(record: Mapping[str, Record]) -> int | None:
  """The best step so far; None: there is none."""
  return int(record["best"]["step"]) or None if record else None


def _record(value: float, step: int, stale: int) -> Record:
  return {
    "value": np.asarray(value, np.float64),
    "step": np.asarray(step, np.int64),
    "stale": np.asarray(stale, np.int64),
  }
