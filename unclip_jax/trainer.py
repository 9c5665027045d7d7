"""The training loop, and the one step that it repeats.

`train_step` is pure: `(state, frozen, batch, rng) -> (state, metrics)`. What
is learned, and from what, is the task's business (tasks/base.py); nothing
here names it. The order of a run is part of the design:

  start   resume from the run folder, else `config.init_from`, else scratch
  loop    step, log, evaluate, checkpoint, then advance the data

Everything random is a function of `(config.seed, step)` and the data are a
function of `step`, so a run that was killed and started again gives the same
parameters, bit for bit, as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging

from unclip_jax import (
  best,
  checkpoints,
  distributed,
  evaluation,
  flops,
  gradients,
  init_from,
  optim,
  partitioning,
  run_folder,
  timing,
  upstream,
)
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.tasks import base as tasks_base
from unclip_jax.train_state import TrainState
from unclip_jax.utils import axes, errors, metric_writers, progress, trees
from unclip_jax.utils import config as config_lib

PyTree = Any
Metrics = dict[str, jax.Array]
TrainStep = Callable[
  [TrainState, tasks_base.Frozen, tasks_base.Batch, jax.Array],
  tuple[TrainState, Metrics],
]


def init_state(
  task: tasks_base.Task,
  tx: optax.GradientTransformation,
  rng: jax.Array,
  batch: tasks_base.Batch,
  frozen: tasks_base.Frozen,
  given: Mapping[str, jax.Array] | None = None,
) -> TrainState:
  """A fresh state; pure, so `jax.eval_shape` gives its shapes for nothing.

  Args:
    given: flat name ("params.output.kernel") -> value in place of the task's.
  """
  variables = dict(trees.overlay(task.init(rng, batch, frozen), given or {}))
  params = variables.pop("params")
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=variables,
    opt_state=tx.init(params),
    ema_params=jax.tree.map(
      lambda x: jnp.array(x, jnp.float32, copy=True), params
    ),
  )


def make_train_step(
  task: tasks_base.Task,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float,
  num_microbatches: int = 1,
  sam: optim.Sam | None = None,
  mesh: jax.sharding.Mesh | None = None,
  sharding: partitioning.Rules = (("", "replicate"),),
  axis_rules: axes.Rules | None = None,
  axis_name: str | None = None,
) -> TrainStep:
  """The pure update `(state, frozen, batch, rng) -> (state, metrics)`.

  Args:
    ema_decay: of the moving average of parameters.
    num_microbatches: parts of the batch that are seen one after another before
      the one update; see gradients.py.
    sam: sharpness-aware minimisation; None = off.
    mesh: on which activations are placed, by `axis_rules`, and SAM's replicas;
      None: wherever they come to lie.
    sharding: of the parameters on it; see gradients.py.
    axis_rules: logical axis -> mesh axes (utils/axes.py).
    axis_name: of the devices under `jax.pmap`, which has no mesh.
  """
  gradients_of = gradients.make_gradients(
    task,
    num_microbatches=num_microbatches,
    sam=sam,
    mesh=mesh,
    sharding=sharding,
    axis_name=axis_name,
  )

  def train_step(
    state: TrainState,
    frozen: tasks_base.Frozen,
    batch: tasks_base.Batch,
    rng: jax.Array,
  ) -> tuple[TrainState, Metrics]:
    rng = jax.random.fold_in(rng, state.step)
    rngs = _keys_of_examples(rng, batch, axis_name)
    with axes.use(mesh, axis_rules or {}):
      grads, model_state, metrics = gradients_of(
        state.params, state.model_state, frozen, batch, rngs, state.step
      )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optim.ema_update(
      state.ema_params, params, ema_decay, state.step
    )
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["nonfinite_updates"] = optim.num_nonfinite(opt_state)
    new_state = TrainState(
      state.step + 1, params, model_state, opt_state, ema_params
    )
    return new_state, metrics

  return train_step


def _keys_of_examples(
  rng: jax.Array, batch: tasks_base.Batch, axis_name: str | None
) -> jax.Array:
  """A key for each row, by its place in the global batch."""
  rows = jax.tree.leaves(batch)[0].shape[0]
  if axis_name is None:
    return jax.random.split(rng, rows)
  rngs = jax.random.split(rng, rows * jax.lax.axis_size(axis_name))
  start = rows * jax.lax.axis_index(axis_name)
  return jax.lax.dynamic_slice_in_dim(rngs, start, rows)


@dataclasses.dataclass(frozen=True)
class Setup(evaluation.Stage):
  """What a config describes, built, with no parameter allocated yet."""

  tx: optax.GradientTransformation
  learning_rate: Callable[[Any], Any]
  sam: optim.Sam | None
  init_from: init_from.InitFrom
  best: best.Best
  backend: partitioning.Jit | partitioning.Pmap
  frozen: dict[str, PyTree]  # on the mesh; tables join at the start of a run

  def train_step(self) -> TrainStep:
    """`make_train_step` with what the config says, not compiled."""
    is_pmap = self.backend.axis_name is not None
    return make_train_step(
      self.task,
      self.tx,
      ema_decay=self.config.ema_decay,
      num_microbatches=self.config.num_microbatches,
      sam=self.sam,
      mesh=None if is_pmap else self.mesh,
      sharding=self.config.get("optimizer_sharding") or self.config.sharding,
      axis_rules=self.axis_rules,
      axis_name=self.backend.axis_name,
    )


def setup(
  config: ml_collections.ConfigDict,
  *,
  abstract: bool = False,
  devices: Sequence[jax.Device] | None = None,
) -> Setup:
  """Builds everything that `config` names.

  In the result's config, `frozen.NAME.fingerprint` is filled in: a run, and
  whoever loads it, can tell whether it gets the upstream model that it was
  trained with.

  Args:
    abstract: give shapes in place of the upstream models' arrays.
    devices: of the mesh; None: all that there are.

  Raises:
    UserError: the config is wrong, or an upstream folder is missing.
  """
  config = config.copy_and_resolve_references()
  mesh = partitioning.make_mesh(config.mesh, devices)
  partitioning.check_batch_size(
    config.batch_size, config.num_microbatches, mesh
  )
  models = upstream.load(config.frozen, abstract=abstract)
  assets_dir = None
  for name, model in models.items():
    with config.unlocked():
      config.frozen[name].fingerprint = model.fingerprint
    assets_dir = model.assets_dir or assets_dir
  frozen = upstream.frozen_of(models)
  shardings = partitioning.frozen_shardings(frozen, config.sharding, mesh)
  place = partitioning.as_shapes if abstract else jax.device_put
  frozen = place(frozen, shardings)
  data = data_pipeline.DataPipeline.from_config(
    config.data, seed=config.seed, assets_dir=assets_dir
  )
  for name, fingerprint in data.made_by.items():
    model = models.get(name)
    if model and model.fingerprint not in ("", fingerprint):
      raise errors.UserError(
        f"the data's stored arrays come from the {name} {fingerprint}, but"
        f" '{config.frozen[name].path}' holds the {name} {model.fingerprint}:"
        " compute them anew, or set config.data.stored_arrays=false"
      )
  tx, learning_rate = optim.make_optimizer(config.optim, config.num_steps)
  return Setup(
    config=config,
    task=tasks_base.build(config, {k: m.task for k, m in models.items()}),
    tx=tx,
    learning_rate=learning_rate,
    sam=optim.make_sam(
      config.optim, config.batch_size, config.num_microbatches
    ),
    init_from=config_lib.construct(
      init_from.InitFrom, config.get("init_from"), where="config.init_from"
    ),
    best=config_lib.construct(
      best.Best,
      config.checkpoint.get("best"),
      where="config.checkpoint.best",
    ),
    data=data,
    mesh=mesh,
    backend=partitioning.make_backend(config.parallel, mesh),
    frozen=frozen,
  )


def state_shapes(run: Setup, frozen: Mapping[str, PyTree]) -> TrainState:
  """The state's shapes, dtypes and shardings; allocates nothing."""
  shapes = jax.eval_shape(
    lambda rng, batch, frozen: init_state(run.task, run.tx, rng, batch, frozen),
    jax.random.key(0),
    run.data.batch_spec(run.config.batch_size),
    frozen,
  )
  shardings = partitioning.state_shardings(
    shapes, run.config.sharding, run.mesh, run.config.optimizer_sharding
  )
  return partitioning.as_shapes(shapes, shardings)


def step_shapes(
  run: Setup, *, train: bool = True
) -> tuple[TrainState, PyTree, PyTree, jax.Array]:
  """What a train step takes, as shapes and shardings: see `TrainStep`.

  Args:
    train: False gives the batch that evaluators take.
  """
  tables = _table_shapes(run)
  state = state_shapes(run, {**run.frozen, **tables})
  size = run.config.batch_size if train else run.config.eval_batch_size
  batch = run.data.batch_spec(size, train=train)
  rows = partitioning.batch_sharding(run.mesh)
  batch = partitioning.as_shapes(batch, jax.tree.map(lambda _: rows, batch))
  rng = jax.eval_shape(lambda: jax.random.key(0))
  whole = partitioning.replicated(run.mesh)
  rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=whole)
  return state, {**run.frozen, **tables}, batch, rng


def model_flops(config: ml_collections.ConfigDict) -> int:
  """FLOPs of one update: forward and backward pass of the loss, each once.

  What a step does over again to save memory, and what SAM does more, is not in
  it. Makes no array.
  """
  config = config.copy_and_resolve_references().unlock()
  config.mesh = dict(data=1)
  config.parallel = "jit"
  for field in ("remat", "scan"):
    if field in config.model:
      del config.model[field]
  run = setup(config, abstract=True, devices=jax.devices()[:1])
  state, frozen, batch, rng = step_shapes(run)
  rngs = jax.eval_shape(
    lambda rng: jax.random.split(rng, config.batch_size), rng
  )
  return flops.count(
    gradients.make_gradients(run.task),
    state.params,
    state.model_state,
    frozen,
    batch,
    rngs,
    state.step,
  )


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  allow_config_change: bool = False,
  strict: bool = False,
  profile: str | None = None,
  started: float | None = None,
) -> TrainState:
  """Trains until `config.num_steps`; resumes what the folder holds.

  SIGTERM saves the current step and returns.

  Args:
    workdir: run folder; made if missing, locked while in use.
    allow_config_change: resume although the stored config differs.
    strict: stop at a corrupt checkpoint instead of taking the one before.
    profile: "START:COUNT" steps to trace; see `timing.Profile`.
    started: when the process began, by `time.monotonic`; None: now.

  Raises:
    UserError: a wrong config, a folder in use, a stored config that differs.
  """
  timer = timing.Timer(workdir, started=started)
  trace = timing.Profile(profile, workdir) if profile is not None else None
  with (
    distributed.ends_together(),
    run_folder.lock(workdir),
    _Stop() as stop,
  ):
    run = setup(config)
    config = run.config
    run_folder.check_config(workdir, config, allow_change=allow_config_change)
    checkpointer = checkpoints.Checkpointer(
      os.path.join(workdir, "checkpoints"),
      keep=config.checkpoint.keep,
      strict=strict,
    )
    writer = metric_writers.create_writer(workdir)
    try:
      state, tables, record = _start(run, workdir, checkpointer)
      # Not earlier: a start that failed leaves a folder that is free.
      run_folder.save_config(workdir, config)
      run_folder.save_assets(workdir, run.data.assets())
      writer.truncate_after(int(state.step))
      frozen = {**run.frozen, **tables}
      return _loop(
        run,
        state,
        frozen,
        tables,
        record,
        checkpointer,
        writer,
        stop,
        timer,
        trace,
      )
    finally:
      with timer.part("checkpoint"):
        checkpointer.close()
      writer.close()
      timer.finish()


def _start(
  run: Setup, workdir: str, checkpointer: checkpoints.Checkpointer
) -> tuple[TrainState, dict[str, PyTree], dict[str, best.Record]]:
  """The newest whole checkpoint, else a fresh state and its tables.

  Also what is known of the best step, where that is watched.
  """
  config = run.config
  table_shapes = _table_shapes(run)
  template = state_shapes(run, {**run.frozen, **table_shapes})
  _write_overview(
    partitioning.overview(template, run.frozen, run.mesh), workdir
  )
  checkpointer.clean_incomplete()
  record = run.best.record()
  restored = checkpointer.restore(
    {"state": template, "tables": table_shapes, **record}
  )
  if restored is not None:
    step, tree = restored
    logging.info("resuming %s at step %d", workdir, step)
    return tree["state"], tree["tables"], {k: tree[k] for k in record}

  given = run.init_from.load(
    config.frozen,
    {
      "params": template.params,
      **template.model_state,
      "tables": table_shapes,
    },
  )
  tables = _tables(run, table_shapes, given)
  shardings = jax.tree.map(lambda x: x.sharding, template)
  batch = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), run.data.batch_spec(1)
  )
  init = jax.jit(
    lambda *args: init_state(run.task, run.tx, *args), out_shardings=shardings
  )
  state = init(
    jax.random.key(config.seed), batch, {**run.frozen, **tables}, given
  )
  return state, tables, record


def _tables(
  run: Setup, shapes: PyTree, given: Mapping[str, jax.Array]
) -> dict[str, PyTree]:
  """The task's tables, computed from data unless all of them are given."""
  tables = {"tables": shapes}
  if not trees.flatten(tables).keys() <= given.keys():
    batches = run.data.eval_batches(
      "train", run.config.eval_batch_size, run.config.prepare_examples
    )
    tables["tables"] = jax.device_put(
      run.task.prepare(run.frozen, batches), partitioning.replicated(run.mesh)
    )
  return trees.overlay(tables, given)["tables"]


def _write_overview(overview: str, workdir: str) -> None:
  """The whole table to WORKDIR/parameters.txt, its last lines to the log."""
  if jax.process_index() == 0:
    path = os.path.join(workdir, "parameters.txt")
    with open(path, "w", encoding="utf-8") as f:
      f.write(overview + "\n")
  for line in overview.rpartition("\n\n")[2].splitlines():
    logging.info("%s", line)


def _table_shapes(run: Setup) -> dict[str, PyTree]:
  """What `task.prepare` would give, as shapes on the mesh."""
  batch = run.data.batch_spec(run.config.eval_batch_size)
  tables = jax.eval_shape(
    lambda frozen, batch: run.task.prepare(frozen, [batch]), run.frozen, batch
  )
  whole = partitioning.replicated(run.mesh)
  return partitioning.as_shapes(tables, jax.tree.map(lambda _: whole, tables))


def _loop(
  run: Setup,
  state: TrainState,
  frozen: Mapping[str, PyTree],
  tables: Mapping[str, PyTree],
  record: dict[str, best.Record],
  checkpointer: checkpoints.Checkpointer,
  writer: metric_writers.MetricWriter,
  stop: _Stop,
  timer: timing.Timer,
  trace: timing.Profile | None,
) -> TrainState:
  config = run.config
  rng = jax.random.fold_in(jax.random.key(config.seed), 1)
  train_step = run.backend.compile(
    run.train_step(), jax.tree.map(lambda x: x.sharding, state)
  )
  evals = evaluation.build(run)
  run.best.check(evals)
  start = step = int(state.step)
  batches = run.data.train_batches(
    step,
    config.batch_size,
    *partitioning.process_rows(run.mesh, config.batch_size),
  )

  def save(step: int) -> None:
    checkpointer.save(
      step,
      {"state": run.backend.on_mesh(state), "tables": tables, **record},
      keep_step=best.step_of(record),
    )

  def look(name: str, state: TrainState) -> dict[str, Any]:
    with timer.part("evaluation"), watchdog.paused():
      return evals[name](evals[name].variables(state), frozen)

  def write(step: int, prefix: str, results: Mapping[str, Any]) -> None:
    named = {f"{prefix}/{k}": v for k, v in results.items()}
    metric_writers.write_results(writer, step, named)

  if trace is not None:
    train_step = trace.wrap(train_step, start, config.num_steps)
  timer.begin(
    start,
    batch_size=config.batch_size,
    num_devices=run.mesh.size,
    peak_steps_per_second=_peak_steps_per_second(run),
  )
  pending: Metrics | None = None
  with (
    progress.Progress(config.name, config.num_steps, start=start) as bar,
    distributed.Watchdog(config.step_timeout) as watchdog,
    contextlib.closing(batches),
  ):
    stopping = run.best.is_over(record)
    while step < config.num_steps and not stopping:
      with timer.part("data_wait"):
        batch = run.backend.place(next(batches))
      with timer.step():
        state, metrics = train_step(state, frozen, batch, rng)
        step += 1
        # At most two steps are in flight: wait for the one before this one.
        # The first is waited for itself, as it counts as start-up.
        jax.block_until_ready(metrics if pending is None else pending)
      watchdog.feed()
      pending = metrics
      # Asked once: a signal later in this step is for the next one.
      stopping = stop.requested(step)
      last = step == config.num_steps or stopping

      if step % config.log_every_steps == 0 or last:
        with timer.part("step"):
          values = {f"train/{k}": float(v) for k, v in metrics.items()}
        _check_finite(values, config, step, save)
        values["train/learning_rate"] = float(run.learning_rate(step - 1))
        values.update(timer.scalars())
        writer.write_scalars(step, values)
        bar.update(step, note=f"loss {values['train/loss']:.4g}")
      else:
        bar.update(step)

      due = [
        name
        for name, evaluate in evals.items()
        if step % evaluate.every_steps == 0 or step == config.num_steps
      ]
      found = {}
      for name in due:
        found[name] = look(name, run.backend.on_mesh(state))
        write(step, f"eval/{name}", found[name])
        record = run.best.update(record, step, name, found[name])
      is_over = run.best.is_over(record)
      stopping, last = stopping or is_over, last or is_over
      best_step = best.step_of(record)
      if best_step and (is_over or step == config.num_steps):
        if best_step != step:
          with timer.part("checkpoint"), watchdog.paused():
            kept = _load_evaluated(
              checkpointer, best_step, run.backend.on_mesh(state)
            )
          found = {name: look(name, kept) for name in evals}
        for name, results in found.items():
          write(step, f"best/{name}", results)
      is_best = step == best_step
      if step % config.checkpoint.every_steps == 0 or last or is_best:
        with timer.part("checkpoint"), watchdog.paused():
          save(step)
          writer.flush()
          timer.save()
  if run.best.is_over(record):
    logging.info(
      "stopped at step %d: %s is the best at step %d",
      step,
      run.best.metric,
      best.step_of(record) or 0,
    )
  elif step < config.num_steps:
    logging.info("stopped at step %d; the same command goes on", step)
  return state


def _load_evaluated(
  checkpointer: checkpoints.Checkpointer, step: int, state: TrainState
) -> TrainState:
  """What evaluators see of an earlier step, laid out as in `state`."""
  # Named as in checkpoints, without the optimizer's moments.
  names = ("params", "ema_params", "model_state")
  here = {"state": {name: getattr(state, name) for name in names}}
  _, flat = checkpointer.restore_flat(step, lambda _: list(trees.flatten(here)))
  shardings = jax.tree.map(lambda x: x.sharding, here)
  loaded = jax.device_put(trees.unflatten_like(here, flat), shardings)
  return state.replace(**loaded["state"])


def _peak_steps_per_second(run: Setup) -> float | None:
  """Updates that the devices could do at their peak; None: not known."""
  peak = flops.peak(run.mesh.devices.flat[0])
  return peak and peak * run.mesh.size / model_flops(run.config)


def _check_finite(
  values: Mapping[str, float],
  config: ml_collections.ConfigDict,
  step: int,
  save: Callable[[int], None],
) -> None:
  """Saves and stops a run of which too many updates were skipped."""
  skipped = int(values["train/nonfinite_updates"])
  if skipped > config.max_nonfinite_updates:
    save(step)
    raise errors.UserError(
      f"{skipped} updates had non-finite gradients and were skipped, more "
      f"than config.max_nonfinite_updates {config.max_nonfinite_updates}: "
      f"step {step} is saved; lower config.optim.learning_rate"
    )


class _Stop:
  """What SIGTERM asks for; a second SIGTERM ends the process at once.

  Of many processes one that gets it stops all, after the same step.
  """

  def __init__(self) -> None:
    self._signalled = False

  def __enter__(self) -> _Stop:
    # Only the main thread may install handlers; a notebook cell may not be.
    # That of many processes is jax's own.
    self._main = (
      jax.process_count() == 1
      and threading.current_thread() is threading.main_thread()
    )
    if self._main:
      self._before = signal.signal(signal.SIGTERM, self._handle)
    return self

  def _handle(self, signum: int, frame: Any) -> None:
    if self._signalled:
      os._exit(128 + signum)
    self._signalled = True

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; asked once a step."""
    if jax.process_count() > 1:
      return distributed.stop_requested(step)
    return self._signalled

  def __exit__(self, *error: Any) -> None:
    if self._main:
      signal.signal(signal.SIGTERM, self._before)


def describe(config: ml_collections.ConfigDict) -> str:
  """The parameter table with its total, the mesh, and memory per device.

  Makes no array.

  Raises:
    UserError: the config is wrong, or an upstream folder is missing.
  """
  run = setup(config, abstract=True)
  state = step_shapes(run)[0]
  return partitioning.overview(state, run.frozen, run.mesh)
