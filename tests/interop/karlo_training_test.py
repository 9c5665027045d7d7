"""A converted Karlo, trained on with one's own pictures, and handed back."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.interop import torch_karlo  # noqa: E402
from unclip_jax import inference, model_folder, pipelines, stages, trainer  # noqa: E402
from unclip_jax.interop import karlo  # noqa: E402
from unclip_jax.utils import config as config_lib  # noqa: E402

CONFIGS = {
  "prior": "prior",
  "decoder": "decoder",
  "upsampler_32": "super_resolution",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Of diffusers, of ours, and of pictures."""
  root = tmp_path_factory.mktemp("karlo")
  theirs, ours, pictures = (root / x for x in ("theirs", "ours", "pictures"))
  torch_karlo.save_model(theirs)
  stages.write_index(str(ours), karlo.convert_in(str(theirs), str(ours)))
  pictures.mkdir()
  rng = np.random.default_rng(0)
  for i in range(4):
    noise = rng.integers(0, 255, (40, 32, 3), np.uint8)
    Image.fromarray(noise).save(pictures / f"{i}.png")
    (pictures / f"{i}.txt").write_text("a red frog")
  return root


def _config(folders, name: str, *more: str):
  # The released upsampler is called for the size that it draws.
  part = {"upsampler_32": "upsampler_256"}.get(name, name)
  if not os.path.exists(folders / "ours" / part):
    os.symlink(folders / "ours" / name, folders / "ours" / part)
  args = [f"model={folders / 'ours'}", f"pictures={folders / 'pictures'}"]
  config = config_lib.load(
    f"configs/karlo/{CONFIGS[name]}.py:{','.join([*args, *more])}"
  )
  config.batch_size = config.eval_batch_size = 2
  config.num_steps = 2
  config.evals = {}
  config.optim.warmup_steps = 0
  if name == "upsampler_32" and not more:
    config.data.preprocess.crop_size = 16
  return config


# The decoder, which takes a minute to compile, starts below with adapters.
@pytest.mark.parametrize("name", ["prior", "upsampler_32"])
def test_a_run_starts_where_the_public_weights_are(folders, name, tmp_path):
  config = _config(folders, name)
  config.optim.learning_rate = 0.0
  trainer.train(config, str(tmp_path))
  given = model_folder.load_model(folders / "ours" / name)
  found = model_folder.load_model(tmp_path)
  assert found.fingerprint == given.fingerprint
  assert found.tables.keys() == given.tables.keys()
  if name == "upsampler_32":
    np.testing.assert_array_equal(
      found.variables["last"]["conv_in"]["kernel"],
      given.variables["last"]["conv_in"]["kernel"],
    )


def test_what_was_trained_goes_back_to_diffusers(folders, tmp_path):
  config = _config(folders, "prior")
  config.optim.learning_rate = 1e-2
  trainer.train(config, str(tmp_path / "prior"))
  for name in ("clip", "decoder", "upsampler_32"):
    os.symlink(folders / "ours" / name, tmp_path / name)
  pipe = pipelines.UnCLIPPipeline.from_parts(
    {x: str(tmp_path / x) for x in ("clip", "prior", "decoder", "upsampler_32")}
  )
  pipe.save_pretrained(str(tmp_path / "model"))
  karlo.convert_out(str(tmp_path / "model"), str(tmp_path / "theirs"))
  before, after = (
    torch_karlo.load_pipeline(x)
    for x in (folders / "theirs", tmp_path / "theirs")
  )
  assert torch.equal(
    before.decoder.conv_in.weight, after.decoder.conv_in.weight
  )
  change = before.prior.proj_in.weight - after.prior.proj_in.weight
  assert 1e-4 < change.abs().max() < 0.1


def test_adapters_on_the_decoder(folders, tmp_path):
  config = _config(folders, "decoder", "lora")
  trainer.train(config, str(tmp_path))
  adapters = model_folder.load_model(tmp_path).variables["params"]
  base = inference.load(str(folders / "ours" / "decoder"))
  merged = inference.load(str(tmp_path))
  assert merged.fingerprint != base.fingerprint
  assert adapters.keys() != base.variables["params"].keys()
  kernel = merged.variables["params"]["conv_in"]["kernel"]
  np.testing.assert_array_equal(
    kernel, base.variables["params"]["conv_in"]["kernel"]
  )
