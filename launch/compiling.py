"""Compiling a part of a config for a TPU slice, and its row of a table."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from launch import hlo
from launch.topologies import TOPOLOGIES
from unclip_jax import evaluation, flops, trainer
from unclip_jax.utils.errors import UserError

# Products gathered in windows are for layers split over `tensor`; with sharded
# parameters they become thousands of small permutations, at half the speed.
_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
_LEAST_EFFORT = {"exec_time_optimization_effort": -1.0}
_GIB = 2**30

Result = dict[str, Any]


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
    predict = run.task.predict_fns().get("sample")
    if predict is None:
      raise UserError(f"'{config.name}' draws nothing: compile --part=train")
    function = evaluation.compile_predict(run, predict)
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
  for label, name in (
    ("arguments", "argument_bytes"),
    ("temporaries", "temp_bytes"),
    ("peak", "peak_bytes"),
  ):
    row[label] = f"{result[name] / _GIB:.2f}"
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
