r"""Compile a config for a TPU slice that is not there, and say what it costs.

  python launch/aot.py --config configs/paper/prior_diffusion.py \
    --topology v5e-256 --topology v5p-128 --out runs/aot

XLA compiles the train step (with `--part sample`, what draws) for the devices
of each topology. That needs the extra `tpu`, but no TPU and no data. The table
tells of one device:

  fits            or the compiler's own words why not
  arguments       GiB of state, upstream models and batch: exact
  temporaries     GiB of all else, by the compiler's buffer assignment
  peak            GiB in use at once
  TFLOP           of the model: both passes of the loss, each once; counted in
                  the traced function (unclip_jax/flops.py)
  gather, reduce, scatter, other
                  GiB a step of its collectives, by their larger side:
                  all-gather, all-reduce, reduce-scatter, the rest
  rows gathered   how many all-gathers give an array as long as the batch, or
                  the microbatch
  estimate        seconds a step and utilisation, with `--mode slow` only: the
                  sum of the compiler's `estimated_cycles` by the clock. It
                  holds no time of communication, and nobody has measured it

`--mode fast` compiles at the least effort: enough for all but the estimate, in
a tenth of the time. Every compilation is a process of its own, killed after
`--timeout` seconds. Its result stays in `--out`, under a hash of the config,
the topology, the versions and this repository's sources, and is not made again.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import ml_collections
import rich.box
import rich.console
import rich.table
from absl import flags, logging

if __name__ == "__main__":
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from launch import compiling
from launch.topologies import TOPOLOGIES
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import programs
from unclip_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = programs.config_flag()
TOPOLOGY = flags.DEFINE_multi_string(
  "topology", ["v5e-256"], "A slice, such as v5e-256; may be repeated."
)
PART = flags.DEFINE_enum(
  "part", "train", ["train", "sample"], "The train step, or what draws."
)
MODE = flags.DEFINE_enum(
  "mode", "fast", ["fast", "slow"], "slow: with estimates, ten times as long."
)
OUT = flags.DEFINE_string("out", "runs/aot", "Folder of results.")
JOBS = flags.DEFINE_integer("jobs", 1, "Compilations at a time.")
TIMEOUT = flags.DEFINE_float("timeout", 3600.0, "Seconds for one compilation.")
WORKER = flags.DEFINE_string(
  "worker", None, "Compile here, into this file: what the processes are told."
)


def main() -> None:
  unknown = [name for name in TOPOLOGY.value if name not in TOPOLOGIES]
  if unknown:
    raise UserError(
      f"topology '{unknown[0]}' is unknown: choose of {', '.join(TOPOLOGIES)}"
    )
  if WORKER.value:
    (name,) = TOPOLOGY.value
    result = compiling.compile_part(CONFIG.value, name, PART.value, MODE.value)
    pathlib.Path(WORKER.value).write_text(json.dumps(result, indent=2))
    return
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  config = CONFIG.value
  with concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool:
    results = list(
      pool.map(lambda name: _run(config, name, out), TOPOLOGY.value)
    )
  show(results, out)


def _run(
  config: ml_collections.ConfigDict, topology: str, out: pathlib.Path
) -> compiling.Result:
  """The stored result, or that of a new process."""
  identity = _identity(config, topology)
  stem = f"{config.name}-{PART.value}-{topology}-{MODE.value}-{identity}"
  path = out / f"{stem}.json"
  if path.exists():
    logging.info("%s: made before (%s)", topology, path)
    return json.loads(path.read_text())
  part = path.with_suffix(".part")
  command = [
    *(sys.executable, str(pathlib.Path(__file__).resolve())),
    *(f"--worker={part}", f"--topology={topology}"),
    *(f"--part={PART.value}", f"--mode={MODE.value}"),
    *CONFIG.arguments,
  ]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  log_path = path.with_suffix(".log")
  logging.info("%s: compiling (log: %s)", topology, log_path)
  start = time.monotonic()
  try:
    with open(log_path, "w", encoding="utf-8") as log:
      process = subprocess.run(
        command,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT.value,
        check=False,
      )
  except subprocess.TimeoutExpired:
    return _failed(config, topology, f"stopped after {TIMEOUT.value:g} s")
  if process.returncode != 0:
    lines = log_path.read_text(errors="replace").strip().splitlines()
    return _failed(config, topology, lines[-1] if lines else "no output")
  part.rename(path)
  logging.info("%s: %.0f s", topology, time.monotonic() - start)
  return json.loads(path.read_text())


def _failed(
  config: ml_collections.ConfigDict, topology: str, reason: str
) -> compiling.Result:
  return {"name": config.name, "topology": topology, "failed": reason}


def _identity(config: ml_collections.ConfigDict, topology: str) -> str:
  """A hash of all that a result depends on."""
  digest = hashlib.sha256(config_lib.to_json(config).encode())
  for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
    try:
      digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    except importlib.metadata.PackageNotFoundError:
      digest.update(name.encode())
  digest.update(repr(TOPOLOGIES[topology]).encode())
  sources = [*(ROOT / "unclip_jax").rglob("*.py")]
  sources += [ROOT / "launch" / f"{x}.py" for x in ("aot", "compiling", "hlo")]
  for path in sorted(sources):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def show(results: Sequence[compiling.Result], out: pathlib.Path) -> None:
  """Prints the table; writes it to `aot.md`, and all results to `aot.json`."""
  rows = [compiling.cells(result) for result in results]
  titles = list(dict.fromkeys(title for row in rows for title in row))
  titles.sort(key=lambda title: title == "fits")  # its words may be long
  shown = rich.table.Table(*titles, box=rich.box.SIMPLE)
  for row in rows:
    shown.add_row(*(row.get(title, "") for title in titles))
  rich.console.Console(width=200 if not sys.stdout.isatty() else None).print(
    shown
  )
  lines = [titles, ["---"] * len(titles)]
  lines += [[row.get(title, "") for title in titles] for row in rows]
  text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  (out / "aot.md").write_text(text, encoding="utf-8")
  (out / "aot.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
  programs.run(main)
