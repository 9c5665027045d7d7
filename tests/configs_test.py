"""Every config builds and fits; its `:smoke` trains (a variant is traced)."""

import json
import math
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh

from configs import common
from unclip_jax import evaluation, partitioning, trainer
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import trees

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted(
  str(path.relative_to(ROOT))
  for path in (ROOT / "configs").rglob("*.py")
  if "def get_config" in path.read_text()
  and path.name != "evals.py"  # trains nothing: tests/evaluate_test.py
)


# Folders whose configs have a `:quick`.
SMALL = ("emoji", "emoji_styles", "shapes")
# These train a given model on; without one there are `:smoke` and `:scratch`.
TRAINING_ON = [x for x in CONFIGS if "/karlo/" in x or x == "configs/lora.py"]


def test_the_configs_are_found():
  folders = {pathlib.Path(path).parent.name for path in CONFIGS}
  assert {"ablations", "emoji", "paper", "shapes"} <= folders
  assert len(TRAINING_ON) == 4


def upstream(path, name, size):
  """The config of an upstream model that a config at `path` fits on."""
  folder = path.split("/")[1]
  if folder == "baselines":
    tokenizer = "vqgan" if "vqgan" in path else "dvae"
    name = {"tokenizer": tokenizer}.get(name, name)
    here = (ROOT / f"configs/baselines/{name}.py").exists()
    folder = folder if here else "emoji"
  folder = folder if folder in (*SMALL, "baselines") else "emoji"
  return config_lib.load(str(ROOT / f"configs/{folder}/{name}.py") + size)


@pytest.mark.parametrize(
  "path, size",
  [(path, "") for path in CONFIGS if path not in TRAINING_ON]
  + [(path, ":quick") for path in CONFIGS if path.split("/")[1] in SMALL]
  + [(path, ":scratch") for path in CONFIGS if "/karlo/" in path],
)
def test_state_shapes(path, size):
  config = config_lib.load(str(ROOT / path) + size)
  with config.unlocked():
    for name in config.frozen:
      if "untrained" in config.frozen[name]:
        continue
      config.frozen[name] = dict(untrained=upstream(path, name, size))
  run = trainer.setup(config, abstract=True)
  batch = run.data.batch_spec(2)
  tables = jax.eval_shape(
    lambda frozen, batch: run.task.prepare(frozen, [batch]), run.frozen, batch
  )
  state = trainer.state_shapes(run, {**run.frozen, **tables})
  if "/paper/" in path:
    check_default_rules(state.params)
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  assert (
    1e5 < count < (1e8 if path.split("/")[1] in (*SMALL, "ablations") else 1e10)
  )


def check_default_rules(params):
  """Nearly all is split over `fsdp`, and most over `tensor` too."""
  mesh = AbstractMesh((2, 4, 2), partitioning.AXES)
  shapes = {k: x.shape for k, x in trees.flatten(params).items()}
  specs = partitioning.param_specs(shapes, common.SHARDING, mesh)

  def share(axis):
    """Of the parameters, that is split over an axis."""
    split = [k for k in shapes if axis in jax.tree.leaves(tuple(specs[k]))]
    sizes = {k: math.prod(shape) for k, shape in shapes.items()}
    return sum(sizes[k] for k in split) / sum(sizes.values())

  assert share("fsdp") > 0.98 and share("tensor") > 0.6


# Variants of the emoji's configs, which are run, in size or in some fields; and
# the baselines, a step of each of whose tasks is run and pinned in tests/tasks.
VARIANTS = [
  x
  for x in CONFIGS
  if x.split("/")[1]
  in ("ablations", "baselines", "emoji_styles", "karlo", "paper", "shapes")
]


@pytest.mark.parametrize("path", VARIANTS)
def test_a_variant_can_be_trained(path):
  """Traced and not compiled, which takes ten times as long."""
  config = config_lib.load(str(ROOT / path) + ":smoke")
  run = trainer.setup(config, abstract=True)
  assert set(evaluation.build(run)) == set(config.evals)
  shapes = trainer.step_shapes(run)
  state, metrics = jax.eval_shape(run.train_step(), *shapes)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes[0]
  )
  assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
  "path",
  [
    pytest.param(x, marks=[pytest.mark.slow] if x in VARIANTS else [])
    for x in CONFIGS
  ],
)
def test_smoke_trains_evaluates_and_saves(path, tmp_path):
  config = config_lib.load(str(ROOT / path) + ":smoke")
  if "/emoji/" not in path:
    # Built but not run: to compile a sampler takes longer than both steps.
    built = evaluation.build(trainer.setup(config))
    assert set(built) == set(config.evals)
    config.evals = {}
  state = trainer.train(config, str(tmp_path))
  assert int(state.step) == 2
  rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").open()]
  losses = [row["train/loss"] for row in rows if "train/loss" in row]
  assert len(losses) == 2 and all(math.isfinite(x) for x in losses)
  evaluated = {k for row in rows for k in row if k.startswith("eval/")}
  pictures = {path.name for path in (tmp_path / "samples").rglob("*.png")}
  for name in config.evals:
    assert any(k.startswith(f"eval/{name}/") for k in evaluated) or any(
      name in picture for picture in pictures
    ), name
  assert (tmp_path / "checkpoints" / "00000002" / "manifest.json").exists()
  assert (tmp_path / "config.json").exists()
  assert (tmp_path / "assets" / "tokenizer.model").exists()
