"""Many processes as one run: how they find each other, and how they end.

One process runs on each host of a TPU slice, or for each GPU; all run the same
program and meet in every step. If one of them stops, those that wait for it end
too, within `peer_timeout` seconds, and say so.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils

from unclip_jax.utils.errors import UserError

_PEER_FAILED = 71  # exit code


def initialize(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  peer_timeout: int = 100,
) -> None:
  """Joins this process to the run; call it before anything asks for devices.

  Without arguments jax asks the cluster: Cloud TPU, GKE, SLURM, Open MPI.

  Args:
    coordinator: HOST:PORT of process 0, which listens there.
    num_processes: how many there are.
    process_id: which one this is, 0 = the one that writes.
    peer_timeout: seconds after which a process that is not heard of counts as
      stopped.

  Raises:
    UserError: only some of the three were given, or nobody answers.
  """
  given = (coordinator, num_processes, process_id)
  if any(x is None for x in given) and any(x is not None for x in given):
    raise UserError(
      "--coordinator, --num_processes and --process_id go together: give all "
      "three, or --distributed alone where the cluster tells"
    )
  if num_processes is not None and not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id {process_id} is not one of {num_processes} processes: "
      f"give 0 to {num_processes - 1}"
    )
  try:
    jax.distributed.initialize(
      *given,
      heartbeat_timeout_seconds=peer_timeout,
      initialization_timeout=peer_timeout,
      shutdown_timeout_seconds=peer_timeout,
    )
  except (ValueError, RuntimeError) as e:
    line = " ".join(str(e).split())
    raise UserError(
      f"the processes of this run do not find each other: {line}; give "
      "--coordinator, --num_processes and --process_id"
    ) from e
  logging.info(
    "process %d of %d, %d of %d devices",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def stop_requested(step: int) -> bool:
  """Whether some process got SIGTERM; all hear of it at the same step.

  Args:
    step: counts up by one from call to call.
  """
  return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def ends_together() -> Iterator[None]:
  """In a run of many processes an error ends this one at once.

  Without, it would wait for the others at its exit while they wait for it in
  the next collective. One line says what it was; a collective that fails most
  often means that another process has stopped.
  """
  try:
    yield
  except BaseException as e:
    if jax.process_count() == 1:
      raise
    me = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(e, UserError):
      _end(f"error: {me}: {e}", 2)
    if isinstance(e, KeyboardInterrupt):
      _end(f"interrupted: {me}", 130)
    traceback.print_exc()
    if isinstance(e, jax.errors.JaxRuntimeError):
      _end(
        f"error: {me} cannot go on: a collective failed, most likely because "
        "another process stopped; its log says why. The same command on all "
        "hosts goes on from the last checkpoint",
        _PEER_FAILED,
      )
    _end(f"error: {me}: {type(e).__name__}", 1)


def _end(line: str, code: int) -> None:
  print(line, file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)


class Watchdog:
  """Ends the process when a step takes too long: a peer may be alive and stuck.

  Each `feed` gives another `timeout` seconds; before the first one, and while
  `paused`, there is no limit.
  """

  def __init__(self, timeout: float | None):
    """Args:
    timeout: seconds; None or 0: no limit.
    """
    self._timeout = timeout
    self._deadline: float | None = None
    self._done = threading.Event()

  def __enter__(self) -> Watchdog:
    if self._timeout:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *error: object) -> None:
    self._done.set()

  def feed(self) -> None:
    """A step is done."""
    if self._timeout:
      self._deadline = time.monotonic() + self._timeout

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """No limit inside."""
    deadline, self._deadline = self._deadline, None
    yield
    if deadline is not None:
      self.feed()

  def _watch(self) -> None:
    while not self._done.wait(min(1.0, self._timeout / 4)):
      deadline = self._deadline
      if deadline is not None and time.monotonic() > deadline:
        faulthandler.dump_traceback()
        _end(
          f"error: no step was done in {self._timeout:g} s "
          "(config.step_timeout): another process may be stuck, or the data; "
          "above is where this one stands",
          _PEER_FAILED,
        )
