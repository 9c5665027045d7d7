"""Karlo's networks here against diffusers', on the same random weights."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.interop import original_karlo, torch_karlo  # noqa: E402
from unclip_jax import stages, tensor_files  # noqa: E402
from unclip_jax.interop import karlo, parts  # noqa: E402
from unclip_jax.models import prior as prior_model  # noqa: E402
from unclip_jax.models import unet as unet_model  # noqa: E402
from unclip_jax.utils import errors, trees  # noqa: E402

_RNG = np.random.default_rng(0)


def _variables(part: parts.Part, collection: str = "params"):
  flat = {
    k: v.load()
    for k, v in part.arrays.items()
    if k.startswith(f"{collection}.")
  }
  return {"params": trees.unflatten(flat)[collection]}


def _normal(*shape: int) -> np.ndarray:
  return _RNG.standard_normal(shape).astype(np.float32)


def _error(ours: np.ndarray, theirs: torch.Tensor) -> float:
  theirs = theirs.detach().float().numpy()
  ours = np.asarray(ours, np.float32)
  if theirs.ndim == 4:
    theirs = theirs.transpose(0, 2, 3, 1)
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _mask(*lengths: int, size: int = 77) -> np.ndarray:
  return np.arange(size) < np.asarray(lengths)[:, None]


@pytest.mark.parametrize("num_heads, num_layers", [(2, 1), (3, 3)])
def test_prior(num_heads, num_layers, tmp_path):
  theirs = torch_karlo.prior(num_heads, num_layers)
  torch_karlo.save(tmp_path, prior=theirs)
  part = karlo.read_prior(str(tmp_path))
  network = prior_model.Model(**part.config.model)
  x_t, text_embed = _normal(3, 32), _normal(3, 32)
  states, mask = _normal(3, 77, 32), _mask(2, 9, 77)
  for timestep in (0, 999):
    expected = theirs(
      torch.tensor(x_t),
      timestep,
      torch.tensor(text_embed),
      torch.tensor(states),
      torch.tensor(mask),
    ).predicted_image_embedding
    variables = _variables(part)
    timesteps = jnp.full(3, timestep)
    args = (text_embed, states, mask)
    ours, _ = network.apply(variables, x_t, timesteps, *args)
    assert _error(ours, expected) < 1e-5
    halves = network.clone(dtype=jnp.bfloat16)
    ours, _ = halves.apply(variables, x_t, timesteps, *args)
    assert _error(ours, expected) < 2e-2
    cache = network.apply(variables, *args, method=network.prefill)
    ours = network.apply(
      variables, x_t, timesteps, cache, method=network.denoise
    )
    assert _error(ours, expected) < 1e-5


@pytest.mark.parametrize(
  "channels, num_layers, head_channels",
  [(32, 1, 8), pytest.param(64, 3, 64, marks=pytest.mark.slow)],
)
def test_text_proj_and_decoder(channels, num_layers, head_channels, tmp_path):
  proj = torch_karlo.text_proj(channels)
  theirs = torch_karlo.decoder(channels, num_layers, head_channels)
  torch_karlo.save(tmp_path, decoder=theirs, text_proj=proj)
  part = karlo.read_decoder(str(tmp_path))
  network = unet_model.Model(**part.config.model)
  image_embed, text_embed = _normal(2, 32), _normal(2, 32)
  states, mask = _normal(2, 77, 32), _mask(3, 40)
  context, emb = proj(
    image_embeddings=torch.tensor(image_embed),
    prompt_embeds=torch.tensor(text_embed),
    text_encoder_hidden_states=torch.tensor(states),
    do_classifier_free_guidance=False,
  )
  # 96 positions and more: with as many as the context has, diffusers would
  # not pad the mask.
  x_t = _normal(2, 16, 16, 3)
  expected = theirs(
    torch.tensor(x_t.transpose(0, 3, 1, 2)),
    torch.tensor(500),
    encoder_hidden_states=context,
    class_labels=emb,
    attention_mask=torch.nn.functional.pad(torch.tensor(mask), (4, 0), value=1),
  ).sample
  for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
    ours, _ = network.clone(dtype=dtype).apply(
      _variables(part),
      x_t,
      jnp.full(2, 500),
      image_embed=image_embed,
      text_embed=text_embed,
      text_encodings=states,
      text_mask=mask,
    )
    assert _error(ours, expected) < bound


@pytest.mark.parametrize("num_layers", [1, 3])
def test_super_resolution(num_layers, tmp_path):
  both = {
    "super_res_first": torch_karlo.super_resolution(0, num_layers),
    "super_res_last": torch_karlo.super_resolution(1, num_layers),
  }
  torch_karlo.save(tmp_path, decoder=torch_karlo.decoder(), **both)
  part = karlo.read_upsampler(str(tmp_path))
  network = unet_model.Model(**part.config.model)
  x_t, low_res = _normal(1, 32, 32, 3), _normal(1, 8, 8, 3)
  enlarged = torch.nn.functional.interpolate(
    torch.tensor(low_res.transpose(0, 3, 1, 2)),
    size=(32, 32),
    mode="bicubic",
    align_corners=False,
    antialias=True,
  )
  x = torch.cat([torch.tensor(x_t.transpose(0, 3, 1, 2)), enlarged], dim=1)
  for name, collection in (
    ("super_res_first", "params"),
    ("super_res_last", "last"),
  ):
    expected = both[name](x, 166).sample
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
      ours, _ = network.clone(dtype=dtype).apply(
        _variables(part, collection), x_t, jnp.full(1, 166), low_res=low_res
      )
      assert _error(ours, expected) < bound


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A whole tiny Karlo in the layout of diffusers."""
  path = tmp_path_factory.mktemp("karlo")
  torch_karlo.save_model(path)
  return path


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
  out = tmp_path_factory.mktemp("model")
  stages.write_index(str(out), karlo.convert_in(str(folder), str(out)))
  return out


def _weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
  found = {}
  for path in folder.rglob("*.safetensors"):
    for name, array in tensor_files.read_safetensors(path)[0].items():
      found[f"{path.parent.name}.{name}"] = array.load()
  return found


def test_there_and_back_every_tensor_is_the_same(folder, model, tmp_path):
  karlo.convert_out(str(model), str(tmp_path))
  before, after = _weights(folder), _weights(tmp_path)
  assert before.keys() == after.keys()
  for name, array in before.items():
    assert array.dtype == after[name].dtype
    np.testing.assert_array_equal(array, after[name], err_msg=name)
  theirs = torch_karlo.load_pipeline(tmp_path)
  fields = dict(theirs.prior_scheduler.config)
  assert fields["clip_sample_range"] == 5.0
  assert theirs.tokenizer("a red frog").input_ids == (
    torch_karlo.load_pipeline(folder).tokenizer("a red frog").input_ids
  )
  index = json.loads((tmp_path / "model_index.json").read_text())
  assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"]


def test_bin_files_give_the_same_part(folder, tmp_path):
  for name in ("prior", "prior_scheduler"):
    shutil.copytree(folder / name, tmp_path / name)
  stem = tmp_path / "prior" / "diffusion_pytorch_model"
  tensors = {
    k: torch.tensor(v.load())
    for k, v in tensor_files.read_safetensors(f"{stem}.safetensors")[0].items()
  }
  os.remove(f"{stem}.safetensors")
  torch.save(tensors, f"{stem}.bin")
  _assert_equal(
    karlo.read_prior(str(tmp_path)).arrays,
    karlo.read_prior(str(folder)).arrays,
  )


def _assert_equal(a, b) -> None:
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name].load(), b[name].load(), err_msg=name)


def test_original_files_give_the_same_parts(tmp_path):
  modules = {
    "prior": torch_karlo.prior(3, 2),
    "text_proj": torch_karlo.text_proj(),
    "decoder": torch_karlo.decoder(num_layers=2, head_channels=8),
    "super_res_first": torch_karlo.super_resolution(0, 2, num_levels=3),
    "super_res_last": torch_karlo.super_resolution(1, 2, num_levels=3),
  }
  torch_karlo.save(tmp_path, **modules)
  files = {
    "prior-ckpt-step=1.ckpt": original_karlo.prior(modules["prior"], 8),
    "decoder-ckpt-step=1.ckpt": {
      **original_karlo.unet(modules["decoder"], "model", 8),
      **original_karlo.projections(modules["text_proj"]),
    },
    "improved-sr-ckpt-step=1.ckpt": {
      **original_karlo.unet(modules["super_res_first"], "model_first_steps"),
      **original_karlo.unet(modules["super_res_last"], "model_last_step"),
    },
  }
  for name, tensors in files.items():
    torch.save({"state_dict": tensors, "global_step": 1}, tmp_path / name)
  torch.save(original_karlo.stats(modules["prior"]), tmp_path / "a_stats.th")
  shape = karlo.OriginalShape(
    image_size=16,
    scale=2,
    channel_mult=(1, 2, 3),
    num_res_blocks=2,
    attention_resolutions=(8, 4),
    head_channels=8,
  )
  found = karlo.read_original(str(tmp_path), shape)
  for read in (karlo.read_prior, karlo.read_decoder, karlo.read_upsampler):
    expected = read(str(tmp_path))
    part = found[expected.config.name]
    _assert_equal(part.arrays, expected.arrays)
    theirs, ours = expected.config.to_dict(), part.config.to_dict()
    if expected.config.name == "prior":
      assert ours["task"]["process"].pop("clip_x_start") == 10.0
      assert theirs["task"]["process"].pop("clip_x_start") == 5.0
    theirs["task"]["process"].pop("num_timesteps")
    assert ours["task"] == theirs["task"]
    for field in ours["model"].keys() - {"max_groups", "dropout"}:
      assert ours["model"][field] == theirs["model"][field], field


class TestHostile:
  """A clear line for each, and nothing in a file is run."""

  @pytest.fixture
  def hostile(self, folder, tmp_path):
    for name in ("prior", "prior_scheduler"):
      shutil.copytree(folder / name, tmp_path / name)
    return tmp_path

  def _refused(self, hostile, match: str) -> None:
    with pytest.raises(errors.UserError, match=match):
      karlo.read_prior(str(hostile))

  def _file(self, hostile) -> pathlib.Path:
    return hostile / "prior" / "diffusion_pytorch_model.safetensors"

  @pytest.mark.parametrize("ending", ["safetensors", "bin"])
  def test_a_pickle_that_runs_code(self, hostile, ending):
    class Evil:
      def __reduce__(self):
        return os.mkdir, (str(hostile / "executed"),)

    self._file(hostile).unlink()
    path = hostile / "prior" / f"diffusion_pytorch_model.{ending}"
    path.write_bytes(pickle.dumps({"a": Evil()}))
    self._refused(hostile, "is damaged, or")
    torch.save({"a": Evil()}, path)
    self._refused(hostile, "is damaged, or")
    assert not (hostile / "executed").exists()

  @pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
  def test_truncated(self, hostile, size):
    whole = self._file(hostile).read_bytes()
    self._file(hostile).write_bytes(whole[:size])
    self._refused(hostile, "is damaged, or no safetensors file")

  def test_names_and_shapes(self, hostile):
    arrays = tensor_files.read_safetensors(self._file(hostile))[0]
    arrays = {k: tensor_files.lazy(v.load()) for k, v in arrays.items()}

    def write(**changed) -> None:
      new = {**arrays, **changed}
      new = {k: v for k, v in new.items() if v is not None}
      tensor_files.write_safetensors(self._file(hostile), new)

    write(**{"proj_in.weight": None})
    self._refused(hostile, r"prior.proj_in.weight is missing")
    write(extra=tensor_files.lazy(np.zeros(3, np.float32)))
    self._refused(hostile, r"prior.extra is left over")
    write(**{"proj_in.weight": tensor_files.lazy(np.zeros((2, 2), np.float32))})
    self._refused(hostile, r"proj_in.weight has another shape, \[2, 2\]")
    write(**{"proj_in.weight": tensor_files.lazy(np.zeros(4, np.float32))})
    self._refused(hostile, r"proj_in.weight has another shape, \[4\]")

  def test_another_model(self, folder, hostile):
    shutil.rmtree(hostile / "prior")
    self._refused(hostile, "there is no .*config.json")
    shutil.copytree(folder / "super_res_first", hostile / "prior")
    self._refused(hostile, "does not hold the expected model")
    config = hostile / "prior" / "config.json"
    config.write_text('{"added_emb_type": null}')
    self._refused(hostile, "added_emb_type = None, where only 'prd'")
    config.write_text("[1]")
    self._refused(hostile, "holds no fields")
    config.write_text("{")
    self._refused(hostile, "is damaged")

  def test_folders(self, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(errors.UserError, match="there is no folder"):
      karlo.convert_in(str(tmp_path / "none"), out)
    with pytest.raises(errors.UserError, match="there is no "):
      karlo.convert_in(str(tmp_path), out)
    with pytest.raises(errors.UserError, match="there is no whole model"):
      karlo.convert_out(str(tmp_path), out)
    (tmp_path / "prior-ckpt.ckpt").write_bytes(b"x")
    with pytest.raises(errors.UserError, match=r"no file ViT-\*.pt"):
      karlo.convert_in(str(tmp_path), out)
    assert not os.path.exists(out)


def test_unclip_convert_both_ways(folder, tmp_path, run_python):
  ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
  args = ("-m", "unclip_jax", "convert")
  run_python(*args, "--from", "karlo", "--src", str(folder), "--out", ours)
  run_python(*args, "--to", "diffusers", "--src", ours, "--out", theirs)
  before, after = _weights(folder), _weights(pathlib.Path(theirs))
  assert before.keys() == after.keys()
  for name, array in before.items():
    np.testing.assert_array_equal(array, after[name])
