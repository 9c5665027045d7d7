"""What `config.evals` asks for, run on a training's state or a trained model.

Evaluators (evaluators/) never touch a model: here they get a compiled predict
function of the task, batches of a split, and, where they look through a second
network, its features (features.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

from unclip_jax import features, model_folder, partitioning, upstream
from unclip_jax.data import pipeline as data_pipeline
from unclip_jax.tasks import base as tasks_base
from unclip_jax.train_state import TrainState
from unclip_jax.utils import axes, errors
from unclip_jax.utils import config as config_lib

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """What evaluators need of a config, built."""

  config: ml_collections.ConfigDict
  task: tasks_base.Task
  data: data_pipeline.DataPipeline
  mesh: jax.sharding.Mesh

  @property
  def axis_rules(self) -> axes.Rules:
    """Logical axis -> mesh axes."""
    return dict(self.config.get("axis_rules", {}))


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One entry of `config.evals`, ready to run on a model."""

  evaluator: Any
  predict: Callable[..., dict[str, jax.Array]]
  batches: Any
  info: Callable[[int], dict[str, Any]]
  every_steps: int
  use_ema: bool
  rng: jax.Array
  mesh: jax.sharding.Mesh
  network: features.Features | None

  def variables(self, state: TrainState) -> PyTree:
    """Those of a state that are evaluated."""
    params = state.ema_params if self.use_ema else state.params
    return {"params": params, **state.model_state}

  def __call__(
    self, variables: PyTree, frozen: Mapping[str, PyTree]
  ) -> dict[str, Any]:
    def predict(batch: Mapping[str, Any]) -> dict[str, Any]:
      placed = partitioning.spread(batch, self.mesh)
      return jax.device_get(self.predict(variables, frozen, placed, self.rng))

    if self.network is not None:
      predict = self.network.beside(predict, self.info)
    return dict(self.evaluator.run(predict, self.batches, self.info))


def build(run: Stage) -> dict[str, Evaluation]:
  """The evaluators of `config.evals`; equal predict functions are shared.

  Raises:
    UserError: an unknown evaluator, predict function or field.
  """
  config = run.config
  predict_fns = run.task.predict_fns()
  jitted: dict[str, Any] = {}
  networks: dict[str, features.Features] = {}
  evals = {}
  for name, spec in config.evals.items():
    fields = dict(spec.items())
    if not fields:  # switched off, by --config.evals.NAME={}
      continue
    where = f"config.evals.{name}"
    pred = fields.pop("pred")
    if pred not in predict_fns:
      raise errors.UserError(
        f"{where}.pred '{pred}' is unknown"
        + config_lib.suggest(pred, predict_fns)
      )
    jitted.setdefault(pred, compile_predict(run, predict_fns[pred]))
    path = fields.pop("features", None)
    if path and path not in networks:
      networks[path] = features.load(path, run.mesh)
    split = fields.pop("split", "validation")
    batches = run.data.eval_batches(
      split,
      fields.pop("batch_size", config.eval_batch_size),
      fields.pop("max_examples", None),
    )
    evals[name] = Evaluation(
      every_steps=fields.pop("every_steps", config.eval_every_steps),
      use_ema=fields.pop("use_ema", True),
      evaluator=config_lib.instantiate(fields.pop("type"), "Evaluator", fields),
      predict=jitted[pred],
      batches=batches,
      info=lambda index, split=split: run.data.example_info(index, split),
      rng=jax.random.key(config.seed),
      mesh=run.mesh,
      network=networks[path] if path else None,
    )
  return evals


def evaluate(
  path: str, config: ml_collections.ConfigDict
) -> dict[str, dict[str, Any]]:
  """Runs the evaluators of `config.evals` on a trained model.

  Args:
    path: a run folder, or one part of a released model. Of a run the moving
      average is what counts, whatever `use_ema` says.
    config: the model's own, in which the evaluators and the task's options may
      be others.

  Returns:
    Evaluator -> name -> number, or picture in [-1, 1].

  Raises:
    UserError: there is no such folder, it names no data, or the config is
      wrong.
  """
  if "data" not in config:
    raise errors.UserError(
      f"the model in {path} was converted, and does not say what data it is"
      " for: fine-tune it on data of yours first"
    )
  config = upstream.at_home(config, path)
  mesh = partitioning.make_mesh(config.get("mesh", {"data": -1}))
  models = upstream.load(config.frozen)
  stored = model_folder.load_model(path)
  run = Stage(
    config=config,
    task=tasks_base.build(config, {k: m.task for k, m in models.items()}),
    data=data_pipeline.DataPipeline.from_config(
      config.data,
      seed=config.seed,
      assets_dir=upstream.assets_dir(stored.assets_dir, models),
    ),
    mesh=mesh,
  )
  frozen = {"model": stored.variables, **upstream.frozen_of(models)}
  rules = config.get("sharding", ((".*", "replicate"),))
  shardings = partitioning.frozen_shardings(frozen, rules, mesh)
  frozen = jax.device_put(frozen, shardings)
  variables = frozen.pop("model")
  frozen |= jax.device_put(stored.tables, partitioning.replicated(mesh))
  return {
    name: evaluator(variables, frozen) for name, evaluator in build(run).items()
  }


def compile_predict(
  run: Stage, predict_fn: tasks_base.PredictFn
) -> tasks_base.PredictFn:
  """On the mesh, with results that every process has whole."""

  def predict(*args: Any) -> dict[str, jax.Array]:
    with axes.use(run.mesh, run.axis_rules):
      return predict_fn(*args)

  return jax.jit(predict, out_shardings=partitioning.replicated(run.mesh))
