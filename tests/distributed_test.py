"""Two processes on loopback: equal to one, stopped together, never hanging."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import logged
from unclip_jax import checkpoints, distributed, partitioning
from unclip_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
SGD = ["--config.optim.name=sgd", "--config.optim.learning_rate=0.1"]


def free_port():
  with contextlib.closing(socket.socket()) as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def command(name, workdir, *flags):
  return [
    *(sys.executable, "-m", "unclip_jax.train"),
    f"--config=configs/emoji/{name}.py:smoke",
    f"--workdir={workdir}",
    *flags,
  ]


@contextlib.contextmanager
def two_processes(name, workdir, *flags, devices=2):
  """Both, with their output in files: gloo writes between our lines."""
  port = free_port()
  environment = {
    **os.environ,
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
    f"--xla_force_host_platform_device_count={devices}",
  }
  processes = []
  with contextlib.ExitStack() as stack:
    for i in range(2):
      log = stack.enter_context(open(f"{workdir}.{i}.log", "w"))
      processes.append(
        subprocess.Popen(
          [
            *command(name, workdir, *flags),
            f"--coordinator=localhost:{port}",
            f"--num_processes={2}",
            f"--process_id={i}",
            "--peer_timeout=20",
          ],
          cwd=ROOT,
          env=environment,
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      )
    try:
      yield processes
    finally:
      for process in processes:
        process.kill()


def log_of(workdir, i):
  return pathlib.Path(f"{workdir}.{i}.log").read_text()


def last_leaves(workdir):
  step, flat = checkpoints.Checkpointer(workdir / "checkpoints").restore_flat()
  return step, {k: v for k, v in flat.items() if "params." in k}


@pytest.mark.parametrize(
  "name, flags",
  # A fresh CLIP's embeddings differ by rounding, which a fitted space enlarges.
  [
    ("prior", [*MESH, "--config.task.embedding_space=raw"]),
    pytest.param("clip", ["--config.parallel=pmap"], marks=pytest.mark.slow),
  ],
  ids=["jit", "pmap"],
)
def test_two_processes_equal_one(name, flags, tmp_path, run_python):
  one, two = tmp_path / "one", tmp_path / "two"
  single = [x for x in flags if "mesh" not in x and "parallel" not in x]
  run_python(*command(name, one, *SGD, *single)[1:])
  with two_processes(name, two, *SGD, *flags) as processes:
    codes = [process.wait(timeout=240) for process in processes]
  assert codes == [0, 0], log_of(two, 0) + log_of(two, 1)
  found, expected = logged.values(two), logged.values(one)
  assert list(found) == list(expected) == [1, 2]
  np.testing.assert_allclose(
    list(found.values()), list(expected.values()), rtol=1e-5
  )
  (step, leaves), (_, reference) = last_leaves(two), last_leaves(one)
  assert step == 2 and leaves.keys() == reference.keys()
  for key, value in reference.items():
    np.testing.assert_allclose(
      leaves[key], value, rtol=1e-4, atol=2e-6, err_msg=key
    )
  # Each step and picture once, though two processes ran.
  assert len((two / "metrics.jsonl").read_text().splitlines()) == len(
    (one / "metrics.jsonl").read_text().splitlines()
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags", [MESH, ["--config.parallel=pmap"]], ids=["jit", "pmap"]
)
def test_two_processes_look_at_the_best_step(flags, tmp_path):
  """Which is loaded from disk again: it is not the last one."""
  workdir = tmp_path / "run"
  flags = [
    *flags,
    *("--config.num_steps=12", "--config.optim.learning_rate=0.3"),
    *("--config.eval_every_steps=1", "--config.evals.samples={}"),
    "--config.ema_decay=0.0",
    "--config.checkpoint.best.metric=eval/loss/loss",
    "--config.checkpoint.best.patience=2",
  ]
  with two_processes("upsampler", workdir, *flags) as processes:
    codes = [process.wait(timeout=240) for process in processes]
  assert codes == [0, 0], log_of(workdir, 0) + log_of(workdir, 1)
  found = logged.values(workdir, "eval/loss/loss")
  least, end = min(found, key=found.get), max(found)
  assert end == least + 2 < 12
  assert logged.values(workdir, "best/loss/loss") == {end: found[least]}


def wait_for_step(workdir, step, processes):
  deadline = time.monotonic() + 180
  while max(logged.values(workdir), default=0) < step:
    assert all(p.poll() is None for p in processes), log_of(workdir, 0)
    assert time.monotonic() < deadline, log_of(workdir, 0)
    time.sleep(0.1)


def test_a_process_that_stops_stops_the_other(tmp_path, run_python):
  """SIGTERM saves the same step everywhere; a death ends the survivor."""
  workdir = tmp_path / "run"
  flags = [
    *("--config.num_steps=100000", "--config.optim.schedule=constant"),
    *(
      "--config.checkpoint.every_steps=100000",
      "--config.eval_every_steps=100000",
    ),
  ]
  with two_processes("clip", workdir, *flags, devices=1) as processes:
    wait_for_step(workdir, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=60) for process in processes]
  assert codes == [0, 0], log_of(workdir, 0) + log_of(workdir, 1)
  (saved,) = checkpoints.Checkpointer(workdir / "checkpoints").steps()
  assert saved == max(logged.values(workdir)) >= 3

  with two_processes("clip", workdir, *flags, devices=1) as processes:
    wait_for_step(workdir, saved + 3, processes)
    processes[1].kill()
    killed = time.monotonic()
    code = processes[0].wait(timeout=90)
    assert time.monotonic() - killed < 60
  assert code != 0
  assert "another process stopped" in log_of(workdir, 0) or (
    "another task died" in log_of(workdir, 0)
  )
  # One process goes on from what two have saved.
  flags[0] = f"--config.num_steps={saved + 1}"
  run_python(
    *command("clip", workdir, *flags, "--allow_config_change")[1:], timeout=120
  )
  assert checkpoints.Checkpointer(workdir / "checkpoints").steps() == [
    saved,
    saved + 1,
  ]


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(coordinator="localhost:1"), "go together"),
    (dict(coordinator="localhost:1", num_processes=2, process_id=2), "0 to 1"),
  ],
)
def test_mistakes_are_user_errors(given, message):
  with pytest.raises(UserError, match=message) as e:
    distributed.initialize(**given)
  assert "\n" not in str(e.value)


def test_a_stuck_step_ends_the_process(run_python):
  program = """
import time
from unclip_jax import distributed
with distributed.Watchdog(0.4) as watchdog:
  time.sleep(1)  # the first step may take its time: it is compiled
  watchdog.feed()
  with watchdog.paused():
    time.sleep(1)
  print("alive", flush=True)
  time.sleep(30)
"""
  process = run_python("-c", program, check=False, timeout=25)
  assert process.returncode == 71
  assert "alive" in process.stdout
  assert "no step was done in 0.4 s" in process.stderr
  assert "time.sleep" in process.stderr or "File" in process.stderr


def test_rows_of_this_process_are_all_of_them():
  mesh = partitioning.make_mesh(dict(data=-1))
  assert partitioning.process_rows(mesh, 8) == (0, 1)
