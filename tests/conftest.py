"""Settings of the whole test run, made before anything imports jax.

They go into the environment, so that programs which tests start inherit them.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping

import hypothesis
import pytest
from absl import logging

if "jax" in sys.modules:
  raise RuntimeError(
    "jax was imported before tests/conftest.py could set it up"
  )

ROOT = pathlib.Path(__file__).resolve().parents[1]

# XLA sizes its thread pool by this: simulated devices that wait for each other
# in a collective hang where the pool is as small as the number of cores.
os.environ["NPROC"] = "64"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_XLA_FLAGS = {
  # On CPU the default convolutions of jax 0.10 are slower by up to 77 %.
  "--xla_cpu_experimental_ynn_fusion_type": "-individual_convolution",
  # Most of the suite's time goes into compiling what runs once or twice.
  "--xla_backend_optimization_level": "0",
}
for _flag, _value in _XLA_FLAGS.items():
  if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
      f"{os.environ.get('XLA_FLAGS', '')} {_flag}={_value}"
    ).strip()

# Compilation makes the first example of a property slow, whatever the machine.
hypothesis.settings.register_profile(
  "unclip_jax", deadline=None, derandomize=True, max_examples=30
)
hypothesis.settings.load_profile("unclip_jax")


# Files of few, long tests: begun last, they would leave a worker without work.
_LONG = ("multidevice", "distributed", "kill", "configs", "notebooks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """The long files first (see PYTEST_ARGS in the Makefile), few slow tests."""
  if not os.environ.get("UNCLIP_SLOW"):
    skip = pytest.mark.skip(reason="larger cases: set UNCLIP_SLOW=1")
    for item in items:
      if item.get_closest_marker("slow"):
        item.add_marker(skip)
  items.sort(
    key=lambda item: item.path.stem not in {f"{x}_test" for x in _LONG}
  )


@pytest.fixture(scope="session", autouse=True)
def data_dir(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[pathlib.Path]:
  """Where datasets are prepared: empty at first, one for the whole session."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent  # that of all workers
  path = base / "data_dir"
  path.mkdir(exist_ok=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("UNCLIP_DATA_DIR", str(path))
    yield path


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
  """Programs that several tests and their child processes compile, once."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  import jax

  jax.config.update("jax_compilation_cache_dir", str(base / "jax_cache"))
  # The small ones too: each program compiles some fifty of them.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(base / "jax_cache"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
  """Those of a file are dropped after it: a worker would grow to 6 GB."""
  yield
  import jax

  jax.clear_caches()


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
  """Runs `python ARGS` from the repository's root and returns what it printed.

  The function takes the arguments, and by keyword
    devices: simulate so many CPU devices.
    env: further environment variables.
    timeout: seconds after which the test fails.
    check: fail, showing both outputs, where the exit code is not 0.
  """

  def run(
    *args: str | os.PathLike[str],
    devices: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    check: bool = True,
  ) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    if devices is not None:
      environment["XLA_FLAGS"] += (
        f" --xla_force_host_platform_device_count={devices}"
      )
    process = subprocess.run(
      [sys.executable, *args],
      cwd=ROOT,
      env=environment,
      timeout=timeout,
      capture_output=True,
      text=True,
    )
    if check and process.returncode != 0:
      pytest.fail(
        f"exit code {process.returncode}\n{process.stdout}\n{process.stderr}"
      )
    return process

  return run


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """What is logged as a warning, each as one text."""
  seen: list[str] = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: seen.append(text % args)
  )
  return seen
