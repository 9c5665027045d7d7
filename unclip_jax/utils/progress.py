"""Progress with an estimate of the time left, for every long piece of work.

A terminal gets one bar (rich); a pipe or a log file gets a line every few
seconds. Times come from a monotonic clock.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

import rich.console
import rich.progress


class Progress:
  """`with Progress("training", total) as progress: progress.update(n)`."""

  def __init__(
    self, name: str, total: int, *, start: int = 0, every_seconds: float = 15.0
  ):
    """Args:
    name: what is being done.
    total: number of pieces of work.
    start: pieces that an earlier run did; they do not count for the rate.
    every_seconds: time between two lines where there is no terminal.
    """
    self._name = name
    self._total = total
    self._start = start
    self._every_seconds = every_seconds
    self._bar: rich.progress.Progress | None = None
    self._note = ""
    self._begin = time.monotonic()
    self._last = self._begin

  def __enter__(self) -> Progress:
    if sys.stderr.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description:<12}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("eta"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        console=rich.console.Console(stderr=True),
      )
      self._bar.start()
      self._task = self._bar.add_task(
        self._name, total=self._total, completed=self._start, note=""
      )
    return self

  def update(self, done: int, note: str = "") -> None:
    """Says that `done` pieces (in all) are finished; a note stays."""
    self._note = note = note or self._note
    if self._bar is not None:
      self._bar.update(self._task, completed=done, note=note)
      return
    now = time.monotonic()
    if now - self._last < self._every_seconds and done < self._total:
      return
    self._last = now
    rate = (done - self._start) / max(now - self._begin, 1e-9)
    left = (self._total - done) / rate if rate else float("inf")
    eta = f"{left // 60:.0f}:{left % 60:02.0f}" if rate else "?"
    print(
      f"{self._name}  {done}/{self._total}  {rate:.2f}/s  eta {eta}  {note}",
      file=sys.stderr,
      flush=True,
    )

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._bar is not None:
      self._bar.stop()
