"""Adapters on trained models: a prior with its CLIP, and a coupled toy."""

import functools
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image

from tests import gradients_test, random_models, random_variables
from unclip_jax import (
  checkpoints,
  gradients,
  inference,
  model_folder,
  run_folder,
  stages,
  trainer,
  upstream,
)
from unclip_jax.models import lora
from unclip_jax.tasks import lora as lora_task
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
  """Folder of a released CLIP and the prior over it, with random weights."""
  folder = tmp_path_factory.mktemp("parts")
  random_models.save(folder / "clip", smoke("clip"))
  config = smoke("prior")
  with config.unlocked():
    config.frozen.clip = dict(path=str(folder / "clip"))
  random_models.save(folder / "prior", config)
  stored = run_folder.load_config(folder / "prior")
  with stored.unlocked():
    stored.frozen.clip.path = "../clip"
  run_folder.save_config(folder / "prior", stored)
  return folder


def smoke(name):
  return config_lib.load(f"configs/emoji/{name}.py:smoke")


def lora_config(base):
  """configs/lora.py for a base, with few and quick steps."""
  config = config_lib.load(f"configs/lora.py:base={base}")
  config.evals = {}
  config.num_steps = 4
  config.checkpoint.every_steps = 2
  config.batch_size = config.eval_batch_size = 8
  config.optim.learning_rate = 0.1
  config.optim.warmup_steps = 0
  return config


class Setup(NamedTuple):
  run: trainer.Setup  # of adapters
  base: inference.Loaded
  batch: Any
  adapted: Any  # loss_and_sample of each
  plain: Any


@pytest.fixture(scope="module")
def setup(parts):
  run = trainer.setup(lora_config(parts / "prior"))
  base = inference.load(str(parts / "prior"))
  batch = next(iter(run.data.eval_batches("train", 4)))
  return Setup(
    run, base, batch, loss_and_sample(run.task), loss_and_sample(base.task)
  )


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "lora"
  trainer.train(lora_config(parts / "prior"), str(folder))
  return folder


def leaves(folder):
  return checkpoints.Checkpointer(folder / "checkpoints").restore_flat()[1]


def loss_and_sample(task):
  """(variables, frozen, batch) -> what a task gives, with fixed draws."""

  @jax.jit
  def run(variables, frozen, batch):
    rng = jax.random.key(3)
    output = task.loss(variables, frozen, batch, rng, step=0, train=True)
    options = dict(num_sample_steps=2, num_candidates=1)
    drawn = task.sample(variables, frozen, batch, rng, **options)
    return output.loss, drawn["image_embed"]

  return lambda *args: jax.device_get(run(*args))


def test_fresh_adapters_are_the_base_and_others_are_merged(setup):
  run, base, batch, adapted, plain = setup
  fresh = run.task.init(jax.random.key(0), batch, run.frozen)
  random = random_variables.like_tree(fresh)
  expected = plain(base.variables, base.frozen, batch)
  for a, b in zip(adapted(fresh, run.frozen, batch), expected):
    np.testing.assert_array_equal(a, b)

  merged = run.task.merge(random, run.frozen)
  for a, b, other in zip(
    adapted(random, run.frozen, batch),
    plain(merged, base.frozen, batch),
    expected,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.abs(a - other).max() > 1e-2


def test_the_base_brings_its_upstream_model_and_its_table(setup, parts):
  run = setup.run
  assert run.frozen.keys() == {"base"}
  own = run.frozen["base"]["frozen"]
  assert own.keys() == {"clip", "embedding_space"}
  clip = model_folder.load_model(parts / "clip")
  jax.tree.map(np.testing.assert_array_equal, own["clip"], clip.variables)
  tokenizer = str(parts / "prior" / "tokenizer.model")
  assert run.data.assets() == {"tokenizer.model": tokenizer}


def test_a_run_holds_the_adapters_alone(trained):
  names = leaves(trained)
  params = [n for n in names if n.startswith("state.params.")]
  assert len(params) == 2 * 6
  assert all(n.endswith((".kernel.a", ".kernel.b")) for n in params)
  assert not any(n.startswith("tables.") for n in names)
  assert all(np.abs(names[n]).max() > 0 for n in params)


def test_resumed_equals_uninterrupted(trained, parts, tmp_path):
  again = tmp_path / "again"
  shutil.copytree(trained, again)
  shutil.rmtree(again / "checkpoints" / "00000004")
  trainer.train(lora_config(parts / "prior"), str(again))
  whole, resumed = leaves(trained), leaves(again)
  assert whole.keys() == resumed.keys()
  for name, x in whole.items():
    assert x.tobytes() == resumed[name].tobytes(), name


def test_a_loaded_run_is_the_plain_model(trained, setup, parts, tmp_path):
  run, base, batch, adapted, plain = setup
  loaded = inference.load(str(trained))
  assert loaded.task == base.task
  adapters = model_folder.load_model(trained).variables
  for a, b in zip(
    adapted(adapters, run.frozen, batch),
    plain(loaded.variables, loaded.frozen, batch),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  # Nothing but the adapted kernels has changed.
  before, after = (trees.flatten(x.variables) for x in (base, loaded))
  changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
  assert changed == {n.rpartition(".")[0] for n in trees.flatten(adapters)}

  out = tmp_path / "elsewhere" / "prior"
  stages.save_part(loaded, str(out))
  part = inference.load(str(out))
  assert part.fingerprint == loaded.fingerprint != base.fingerprint
  jax.tree.map(np.testing.assert_array_equal, part.frozen, base.frozen)
  tokenizer = (out / "tokenizer.model").read_bytes()
  assert tokenizer == (parts / "prior" / "tokenizer.model").read_bytes()


def test_shapes_need_no_weights(trained, parts):
  for path in (parts / "clip", parts / "prior", trained):
    shapes = upstream.load_model(str(path), abstract=True)
    model = upstream.load_model(str(path))
    for a, b in (
      (shapes.variables, model.variables),
      (shapes.frozen, model.frozen),
    ):
      jax.tree.map(
        lambda x, y: np.testing.assert_equal(
          (type(x), x.shape, x.dtype), (jax.ShapeDtypeStruct, y.shape, y.dtype)
        ),
        a,
        b,
      )
    assert shapes.task == model.task
  config = lora_config(parts / "prior")
  assert f"total: {6 * 2 * 16 * 8 + 2 * 48 * 8:,} " in trainer.describe(config)


def test_a_converted_base_has_no_data_and_no_tokenizer(parts, tmp_path):
  base = tmp_path / "prior"
  shutil.copytree(parts / "prior", base)
  (tmp_path / "clip").symlink_to(parts / "clip")
  (base / "tokenizer.model").unlink()
  stored = run_folder.load_config(base).to_dict()
  clip = run_folder.load_config(parts / "clip").model
  known = ("name", "seed", "task_name", "task", "model_name", "model", "frozen")
  stored = ml_collections.ConfigDict({k: stored[k] for k in known})
  run_folder.save_config(base, stored)
  with pytest.raises(errors.UserError, match="names no data: give yours"):
    lora_config(base)

  pictures = tmp_path / "pictures"
  pictures.mkdir()
  Image.new("RGB", (9, 9)).save(pictures / "a.png")
  (pictures / "a.txt").write_text("a red ring")
  run = trainer.setup(lora_config(f"{base},pictures={pictures}"))
  (asset,) = run.data.assets().values()
  assert pathlib.Path(asset).samefile(parts / "clip" / "tokenizer.model")
  batch = next(run.data.train_batches(0, 2))
  side, L = clip.image_size, clip.context_length
  assert batch["clip_image"].shape == (2, side, side, 3)
  assert batch["text_tokens"].shape == (2, L)
  adapters = run.task.init(jax.random.key(0), batch, run.frozen)
  loss = run.task.loss(
    adapters, run.frozen, batch, jax.random.key(0), step=0, train=True
  ).loss
  assert np.isfinite(loss).all()
  # A base that was trained here keeps its evaluators and sizes.
  config = f"configs/lora.py:base={parts / 'prior'},pictures={pictures}"
  config = config_lib.load(config)
  stored = run_folder.load_config(parts / "prior")
  assert config.data.preprocess == stored.data.preprocess
  assert {*config.evals} == {*stored.evals}
  assert all(config.evals[name].split == "train" for name in config.evals)


def test_adapters_of_another_base_are_refused(trained, parts, tmp_path):
  folder = tmp_path / "lora"
  shutil.copytree(trained, folder)
  config = run_folder.load_config(folder)
  with config.unlocked():
    config.frozen.base.path = str(parts / "clip")
  run_folder.save_config(folder, config)
  with pytest.raises(errors.UserError, match="trained with the base"):
    inference.load(str(folder))


def test_a_coupled_base_takes_microbatches():
  task = lora_task.Task(
    lora.Model(rank=2, pattern="^in$"),
    {"base": gradients_test.Coupled(keep=1.0)},
  )
  params = {"in": random_variables.normal(3, 4), "scale": np.float32(0.3)}
  frozen = {"base": {"params": params}}
  adapters = random_variables.like_tree(
    task.init(jax.random.key(0), {}, frozen)
  )["params"]
  step = jnp.zeros((), jnp.int32)
  found = [
    gradients.make_gradients(task, num_microbatches=n)(
      adapters, {}, frozen, gradients_test.BATCH, gradients_test.RNGS, step
    )
    for n in (1, 4)
  ]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found
  )
  assert np.abs(found[0].grads["in"]["a"]).max() > 1e-3
