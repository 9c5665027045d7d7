"""Embeddings stored in records: right, whole, shared, refused where foreign."""

import functools
import pathlib

import jax
import ml_collections
import numpy as np
import pytest

from tests import random_variables
from unclip_jax import embeddings, model_folder, trainer, upstream
from unclip_jax.data import prepared, preparing
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

SYNTHETIC = "unclip_jax.data.synthetic"


def random_clip(folder, scale):
  """The folder of a CLIP with random weights."""
  config = config_lib.load("configs/emoji/clip.py:smoke")
  run = trainer.setup(config)
  batch = next(iter(run.data.eval_batches("validation", 2)))
  variables = random_variables.like(run.task.init, batch, {})
  variables = jax.tree.map(lambda x: scale * x, variables)
  model_folder.save_model(folder, config, variables, {}, run.data.assets())
  return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return random_clip(tmp_path_factory.mktemp("clip"), 1.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("plain"))
  plan = preparing.Plan(SYNTHETIC, {}, records_per_shard=20)
  preparing.prepare(plan, folder, num_processes=1)
  return folder


OPTIONS = dict(num_captions=2, text_encodings=True, batch_size=8)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, plain, clip):
  out = str(tmp_path_factory.mktemp("embedded") / "x")
  embeddings.write(plain, clip, out, **OPTIONS)
  return out


def config_of(stage, clip, folder, **data):
  config = config_lib.load(f"configs/emoji/{stage}.py:smoke")
  with config.unlocked():
    config.frozen.clip = dict(path=clip)
    config.data.source_name = "unclip_jax.data.prepared"
    config.data.source = ml_collections.ConfigDict(dict(folder=folder))
    config.data.update(data)
  return config


def batches(run):
  first = run.data.train_batches(3, 8)
  return next(iter(first)), next(iter(run.data.eval_batches("validation", 8)))


def test_training_sees_the_same_as_on_the_fly(clip, embedded):
  losses = []
  for stored in (True, False):
    config = config_of("prior", clip, embedded, stored_arrays=stored)
    run = trainer.setup(config)
    train, validation = batches(run)
    assert ("clip_image" in train) != stored == ("image_embed" in train)
    assert {k: x.shape for k, x in train.items()} == {
      k: x.shape for k, x in run.data.batch_spec(8).items()
    }
    frozen = {**run.frozen, **run.task.prepare(run.frozen, [validation])}
    shapes = jax.eval_shape(run.task.init, jax.random.key(0), train, frozen)
    variables = random_variables.like_tree(shapes)
    loss = jax.jit(functools.partial(run.task.loss, step=0, train=True))
    losses += [
      loss(variables, frozen, batch, jax.random.key(1)).loss
      for batch in (train, validation)
    ]
  stored, computed = losses[:2], losses[2:]
  # Text states are stored in half precision.
  np.testing.assert_allclose(stored, computed, rtol=2e-3)
  assert np.ptp(computed[0]) > 1e-3


def test_captions_keep_their_own_rows(clip, embedded):
  model = upstream.load_model(clip)
  data = trainer.setup(config_of("prior", clip, embedded)).data
  batch = next(iter(data.train_batches(0, 16)))
  text_embed, _ = model.task.encode_text(
    model.variables, batch["text_tokens"], batch["text_mask"]
  )
  np.testing.assert_allclose(batch["text_embed"], text_embed, atol=1e-4)
  records = data.source.records("train")
  drawn = [
    np.abs(records[i].arrays["text_embed"] - row).max(axis=-1).argmin()
    for i, row in zip(batch["index"], batch["text_embed"])
  ]
  assert set(drawn) == {0, 1}
  assert {len(records[i].captions) for i in range(8)} == {2}


def test_another_clip_is_refused(tmp_path, embedded):
  other = random_clip(tmp_path, 0.5)
  with pytest.raises(
    errors.UserError, match="stored arrays come from the clip"
  ):
    trainer.setup(config_of("prior", other, embedded))
  config = config_of("prior", other, embedded)
  trainer.setup(
    config_lib.apply_overrides(config, {"data.stored_arrays": "false"})
  )


def test_statistics_are_those_of_training(embedded):
  source = prepared.Source(embedded)
  records = source.records("train")
  embeds = np.stack(
    [records[i].arrays["image_embed"] for i in range(len(records))]
  )
  with np.load(pathlib.Path(embedded) / embeddings.STATISTICS_FILE) as found:
    assert found["count"] == len(embeds) == found["dot_counts"].sum()
    np.testing.assert_allclose(found["mean"], embeds.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["std"], embeds.std(0, ddof=1), rtol=1e-4)
    projected = (embeds - found["mean"]) @ found["components"].T
    np.testing.assert_allclose(
      projected.var(0, ddof=1), found["variances"], atol=1e-4
    )
    assert (np.diff(found["variances"]) <= 1e-12).all()


def test_processes_share_the_work_and_go_on(tmp_path, plain, clip, embedded):
  out = str(tmp_path / "x")
  share = dict(process_count=2, **OPTIONS)
  assert embeddings.write(plain, clip, out, process_index=1, **share) is None
  # As if killed before its last shard was accounted for.
  accounts = sorted(pathlib.Path(out).glob(".embedding/*.npz"))
  accounts[-1].unlink()
  assert embeddings.write(plain, clip, out, process_index=0, **share) is None
  index = embeddings.write(plain, clip, out, process_index=1, **share)
  assert index == prepared.read_index(embedded)
  assert not (pathlib.Path(out) / ".embedding").exists()
  for shard in (s for shards in index.splits.values() for s in shards):
    assert prepared.sha256(f"{out}/{shard.file}") == shard.sha256
  with pytest.raises(errors.UserError, match="num_captions"):
    embeddings.write(plain, clip, out, **{**OPTIONS, "num_captions": 1})


def test_only_a_clip_embeds(tmp_path, plain):
  run = trainer.setup(config_lib.load("configs/emoji/upsampler.py:smoke"))
  batch = next(iter(run.data.eval_batches("validation", 2)))
  variables = random_variables.like(run.task.init, batch, {})
  folder = str(tmp_path / "model")
  model_folder.save_model(folder, run.config, variables, {}, run.data.assets())
  with pytest.raises(errors.UserError, match="a CLIP's"):
    embeddings.write(plain, folder, str(tmp_path / "out"))
