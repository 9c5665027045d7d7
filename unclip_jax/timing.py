"""Where the time of a run goes: every second accounted for, and traces.

A `Timer` is always in one of `PARTS`, so that their seconds add up to the whole
since the process began:

  startup     imports, setup, restoring, compiling, and the whole first step
  step        starting steps and waiting for the device
  data_wait   waiting for batches
  evaluation  running evaluators and writing what they give
  checkpoint  holding the loop up by saving; most of it is in the background
  other       the rest: logging, mostly

The device runs ahead of the loop by up to two steps; a part that needs the
state waits for them, and those seconds are that part's.

Goodput is the share of the time that went into steps that count. A session, one
process's part of a run, is on record in WORKDIR/timing.json up to its last
checkpoint or its end; steps that a later session did again do not count. What
passes between sessions, and from a killed one's last checkpoint to its end, is
not known here.
"""

from __future__ import annotations

import array
import contextlib
import functools
import json
import os
import pathlib
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import logging

from unclip_jax.utils import errors, files

PathLike = str | os.PathLike[str]
Session = dict[str, Any]

PARTS = ("startup", "step", "data_wait", "evaluation", "checkpoint", "other")
_FILE = "timing.json"


def process_started() -> float:
  """When this process began, as `time.monotonic` tells it; else, now."""
  now = time.monotonic()
  try:
    stat = pathlib.Path("/proc/self/stat").read_text()
  except OSError:  # not Linux
    return now
  # proc(5), field 22, counted from behind the name in parentheses.
  ticks = int(stat.rpartition(")")[2].split()[19])
  began = ticks / os.sysconf("SC_CLK_TCK")
  return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)


class Timer:
  """Accounts for the time of one session."""

  def __init__(
    self,
    workdir: PathLike,
    *,
    started: float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Args:
    workdir: run folder, which holds timing.json.
    started: when the session began, by the clock; None: now.
    clock: seconds; never goes back.
    """
    self._path = pathlib.Path(workdir) / _FILE
    self._clock = clock
    self._part = "startup"
    self._since = clock() if started is None else started
    self._seconds = dict.fromkeys(PARTS, 0.0)
    self._step_seconds = array.array("d")  # of every step but the first
    self._first_step: int | None = None
    # The accounts of the last `scalars` and of the last step's end.
    self._window: dict[str, float] | None = None
    self._step_end: dict[str, float] = {}
    self._window_steps = 0

  def begin(
    self,
    step: int,
    *,
    batch_size: int,
    num_devices: int,
    peak_steps_per_second: float | None = None,
  ) -> None:
    """Says what the loop goes over; comes before the first step.

    Args:
      step: that the loop starts from.
      batch_size: examples a step, of all devices together.
      peak_steps_per_second: steps that the devices could do if they reached
        their peak FLOP/s; None: not known.
    """
    self._earlier = _read(self._path)
    self._first_step = step
    self._examples_per_device = batch_size / num_devices
    self._num_devices = num_devices
    self._peak_steps_per_second = peak_steps_per_second

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Counts the time inside as that of one of `PARTS`; a trace shows it."""
    before = self._switch(name)
    try:
      with jax.profiler.TraceAnnotation(name):
        yield
    finally:
      self._switch(before)

  @contextlib.contextmanager
  def step(self) -> Iterator[None]:
    """A step, and the waiting for the device that goes with it.

    The first is start-up: it is compiled, and must be waited for inside.
    """
    first = self._window is None
    with self.part("startup" if first else "step"):
      yield
    if first:
      self._part = "other"
      self._window = dict(self._seconds)
    else:
      self._step_seconds.append(_busy(self._seconds, self._step_end))
      self._window_steps += 1
    self._step_end = dict(self._seconds)

  def scalars(self) -> dict[str, float]:
    """`timing/...` since the last call, for the log; after the first step.

    Rates leave evaluation, checkpoints and the first step out; there are none
    where no other step was made.
    """
    self._switch(self._part)
    steps, busy = self._window_steps, _busy(self._seconds, self._window)
    wait = self._seconds["data_wait"] - self._window["data_wait"]
    self._window, self._window_steps = dict(self._seconds), 0
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = {
      "peak_memory_gib": peak_kib / 2**20,
      "goodput": self._seconds["step"] / sum(self._seconds.values()),
    }
    if steps and busy:
      rates = self._rates(steps / busy)
      values |= {
        "seconds_per_step": busy / steps,
        "examples_per_second": (
          rates["examples_per_second_per_device"] * self._num_devices
        ),
        "data_wait_share": wait / busy,
        **rates,
      }
    return {f"timing/{name}": value for name, value in values.items()}

  def _rates(self, steps_per_second: float) -> dict[str, float]:
    per_device = steps_per_second * self._examples_per_device
    rates = {"examples_per_second_per_device": per_device}
    if self._peak_steps_per_second is not None:
      rates["model_flops_utilization"] = (
        steps_per_second / self._peak_steps_per_second
      )
    return rates

  def session(self) -> Session:
    """What happened so far, for JSON."""
    self._switch(self._part)
    whole = sum(self._seconds.values())
    session: Session = {
      "first_step": self._first_step,
      "last_step": (
        self._first_step + (self._window is not None) + len(self._step_seconds)
      ),
      "wall_seconds": whole,
      "seconds": dict(self._seconds),
      "shares": {name: x / whole for name, x in self._seconds.items()},
    }
    if self._step_seconds:
      median = statistics.median(self._step_seconds)
      # Nine of ten steps are at least as quick.
      slow = sorted(self._step_seconds)[(9 * len(self._step_seconds) - 1) // 10]
      session["steps_per_second"] = {"median": 1 / median, "p90": 1 / slow}
      session |= self._rates(len(self._step_seconds) / sum(self._step_seconds))
    return session

  def save(self) -> None:
    """Writes timing.json with this session, on process 0."""
    if jax.process_index() == 0:
      _write(self._path, [*self._earlier, self.session()])

  def finish(self) -> None:
    """Writes timing.json and logs a table, if the loop was reached."""
    if self._first_step is None or jax.process_index() != 0:
      return
    session = self.session()
    sessions = [*self._earlier, session]
    _write(self._path, sessions)
    for line in _table(session, goodput(sessions)):
      logging.info("%s", line)

  def _switch(self, part: str) -> str:
    """Accounts for the time until now; returns the part that ends."""
    now = self._clock()
    self._seconds[self._part] += now - self._since
    self._since = now
    before, self._part = self._part, part
    return before


def goodput(sessions: Sequence[Session]) -> float:
  """Share of the sessions' time that went into steps which no other redid."""
  good, reached = 0.0, float("inf")
  for session in reversed(sessions):
    first, last = session["first_step"], session["last_step"]
    kept = max(0, min(last, reached) - first)
    good += session["seconds"]["step"] * kept / max(1, last - first)
    reached = min(reached, first)
  return good / sum(session["wall_seconds"] for session in sessions)


def _busy(after: dict[str, float], before: dict[str, float]) -> float:
  """Seconds between two accounts that are the steps' own."""
  return sum(after[x] - before[x] for x in ("step", "data_wait", "other"))


def _read(path: pathlib.Path) -> list[Session]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))["sessions"]
  except FileNotFoundError:
    return []
  except (ValueError, TypeError, KeyError):
    # What a run did is worth more than the account of it.
    logging.warning("%s cannot be read, and is begun anew", path)
    return []


def _write(path: pathlib.Path, sessions: Sequence[Session]) -> None:
  report = {"goodput": goodput(sessions), "sessions": list(sessions)}
  files.write_atomically(path, json.dumps(report, indent=2) + "\n")


def _table(session: Session, goodput: float) -> Iterator[str]:
  yield (
    f"steps {session['first_step']} to {session['last_step']} in "
    f"{session['wall_seconds']:.1f} s:"
  )
  for name in PARTS:
    seconds, share = session["seconds"][name], session["shares"][name]
    yield f"  {name:<10}  {seconds:>10.1f} s  {share:>6.1%}"
  if "steps_per_second" in session:
    rates = session["steps_per_second"]
    yield (
      f"  {rates['median']:.3g} steps/s (median; nine of ten at "
      f"{rates['p90']:.3g} or more), "
      f"{session['examples_per_second_per_device']:.4g} examples/s/device"
    )
  if "model_flops_utilization" in session:
    share = session["model_flops_utilization"]
    yield f"  {share:.1%} of the devices' peak FLOP/s (model FLOPs)"
  yield f"  goodput {goodput:.1%}, all sessions together"


class Profile:
  """A trace of a few steps, for `jax.profiler`'s viewers."""

  def __init__(self, spec: str, workdir: PathLike):
    """Args:
    spec: "START:COUNT": COUNT steps are traced, after START others that
      follow the first, which is compiled.
    workdir: run folder; the trace goes to WORKDIR/profile.

    Raises:
      UserError: the spec is no such pair.
    """
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", spec)
    if not match or int(match[2]) == 0:
      raise errors.UserError(
        f"--profile {spec!r} is not START:COUNT: 5:3 traces 3 steps, after the"
        " first, which is compiled, and 5 others"
      )
    self._start, self._count = int(match[1]), int(match[2])
    self._folder = os.path.join(workdir, "profile")

  def wrap(
    self, train_step: Callable[..., Any], step: int, num_steps: int
  ) -> Callable[..., Any]:
    """The step that traces itself when its turn comes, on process 0.

    Args:
      step: that the loop starts from.
      num_steps: that it goes to.

    Raises:
      UserError: there are too few steps left.
    """
    begin = step + 1 + self._start
    end = begin + self._count
    if end > num_steps:
      raise errors.UserError(
        f"--profile {self._start}:{self._count} takes {end - step} steps with"
        f" the first, and {max(0, num_steps - step)} are left: lower it"
      )
    if jax.process_index() != 0:
      return train_step

    @functools.wraps(train_step)
    def traced(*args: Any) -> Any:
      nonlocal step
      if step == begin:
        options = jax.profiler.ProfileOptions()
        # Python's own calls fill the trace, and make all of it slow.
        options.python_tracer_level = 0
        jax.profiler.start_trace(self._folder, profiler_options=options)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        result = train_step(*args)
      step += 1
      if step == end:
        # What the device has not done yet would not be in the trace.
        jax.block_until_ready(result)
        jax.profiler.stop_trace()
        logging.info(
          "steps %d to %d are traced in %s: open its .trace.json.gz in"
          " https://ui.perfetto.dev, or `pip install xprof` and `xprof --logdir"
          " %s`",
          begin,
          end,
          self._folder,
          self._folder,
        )
      return result

    return traced
