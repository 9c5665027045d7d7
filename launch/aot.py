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
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import rich.box
import rich.console
import rich.table
from absl import flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch import hlo  # noqa: E402
from launch.topologies import TOPOLOGIES  # noqa: E402
from unclip_jax import flops, trainer  # noqa: E402
from unclip_jax.utils import config as config_lib  # noqa: E402
from unclip_jax.utils import programs  # noqa: E402
from unclip_jax.utils.errors import UserError  # noqa: E402

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

# Products gathered in windows are for layers split over `tensor`; with sharded
# parameters they become thousands of small permutations, at half the speed.
_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
_GIB = 2**30

Result = dict[str, Any]


def main() -> None:
  unknown = [name for name in TOPOLOGY.value if name not in TOPOLOGIES]
  if unknown:
    raise UserError(
      f"topology '{unknown[0]}' is unknown: choose of {', '.join(TOPOLOGIES)}"
    )
  if WORKER.value:
    (name,) = TOPOLOGY.value
    result = compile_part(CONFIG.value, name, PART.value, MODE.value)
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
) -> Result:
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
) -> Result:
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
  sources = [*(ROOT / "unclip_jax").rglob("*.py"), ROOT / "launch/aot.py"]
  for path in sorted([*sources, ROOT / "launch/hlo.py"]):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def compile_part(
  config: ml_collections.ConfigDict, topology: str, part: str, mode: str
) -> Result:
  """Compiles in this process, which must not have made a CPU array before.

  Args:
    part: "train" or "sample" (`config.eval_batch_size` examples at once).
    mode: "fast" or "slow".

  Raises:
    UserError: a wrong config, or no libtpu.
  """
  devices = TOPOLOGIES[topology].devices()
  run = trainer.setup(config, abstract=True, devices=devices)
  is_train = part == "train"
  state, frozen, batch, rng = trainer.step_shapes(run, train=is_train)
  result: Result = {
    "name": config.name,
    "topology": topology,
    "part": part,
    "mode": mode,
    "mesh": dict(run.mesh.shape),
    "parameters": sum(
      math.prod(x.shape) for x in jax.tree.leaves(state.params)
    ),
  }
  if is_train:
    shardings = jax.tree.map(lambda x: x.sharding, state)
    function = run.backend.compile(run.train_step(), shardings)
    args = (state, frozen, batch, rng)
    total = trainer.model_flops(config)
    rows = config.batch_size // config.num_microbatches
    result |= {
      "batch_size": config.batch_size,
      "num_microbatches": config.num_microbatches,
    }
  else:
    predict = run.task.predict_fns()["sample"]
    function = trainer.compile_predict(run, predict)
    rows = config.eval_batch_size
    args = ({"params": state.params, **state.model_state}, frozen, batch, rng)
    total = flops.count(predict, *args)
    result["batch_size"] = rows
  result["tflop_per_device"] = total / len(devices) / 1e12
  lowered = function.lower(*args)
  options = {**_OPTIONS, **(_LEAST_EFFORT if mode == "fast" else {})}
  start = time.monotonic()
  try:
    compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return {**result, "fits": False, "reason": str(e).splitlines()[0]}
  result["compile_seconds"] = time.monotonic() - start
  memory = compiled.memory_analysis()
  program = hlo.read(compiled.as_text())
  params = {tuple(x.shape) for x in jax.tree.leaves((state.params, frozen))}
  gathered = [s for s in program.gathers_of(rows) if s not in params]
  result |= {
    "fits": True,
    "argument_bytes": memory.argument_size_in_bytes,
    "temp_bytes": memory.temp_size_in_bytes,
    "alias_bytes": memory.alias_size_in_bytes,
    "peak_bytes": memory.peak_memory_in_bytes,
    "collective_bytes": program.bytes_by_kind(),
    "rows_gathered": sorted(set(gathered)),
    "largest_collectives": [c._asdict() for c in program.largest(20)],
  }
  if mode == "slow":
    seconds = program.cycles / TOPOLOGIES[topology].clock
    peak = flops.peak(devices[0])
    result |= {
      "estimated_seconds": seconds,
      "estimated_utilization": total / len(devices) / seconds / peak,
    }
  return result


def cells(result: Mapping[str, Any]) -> dict[str, str]:
  """One row of the table."""
  row = {"name": result["name"], "topology": result["topology"]}
  if "failed" in result:
    return row | {"fits": f"not compiled: {result['failed']}"}
  row["mesh"] = " x ".join(
    f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1
  )
  row["batch"] = str(result["batch_size"])
  if result.get("num_microbatches", 1) > 1:
    row["batch"] += f" / {result['num_microbatches']}"
  row["TFLOP"] = f"{result['tflop_per_device']:.1f}"
  if not result["fits"]:
    return row | {"fits": f"no: {result['reason']}"}
  row["fits"] = "yes"
  for name in ("argument", "temp", "peak"):
    label = {"argument": "arguments", "temp": "temporaries"}.get(name, name)
    row[label] = f"{result[f'{name}_bytes'] / _GIB:.2f}"
  sizes = dict(result["collective_bytes"])
  for label, kind in (
    ("gather", "all-gather"),
    ("reduce", "all-reduce"),
    ("scatter", "reduce-scatter"),
  ):
    row[label] = f"{sizes.pop(kind, 0) / _GIB:.2f}"
  row["other"] = f"{sum(sizes.values()) / _GIB:.2f}"
  row["rows gathered"] = str(len(result["rows_gathered"]))
  if "estimated_seconds" in result:
    row["estimate"] = (
      f"{result['estimated_seconds']:.3g} s, "
      f"{result['estimated_utilization']:.0%}"
    )
  row["compiled in"] = f"{result['compile_seconds']:.0f} s"
  return row


def show(results: Sequence[Result], out: pathlib.Path) -> None:
  """Prints the table; writes it to `aot.md`, and all results to `aot.json`."""
  rows = [cells(result) for result in results]
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
