"""Karlo's networks here against diffusers', on the same random weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from tests.interop import torch_karlo  # noqa: E402
from unclip_jax.interop import karlo, parts  # noqa: E402
from unclip_jax.models import prior as prior_model  # noqa: E402
from unclip_jax.models import unet as unet_model  # noqa: E402
from unclip_jax.utils import trees  # noqa: E402

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
    cache = network.apply(variables, *args, method=network.prefill)
    ours = network.apply(
      variables, x_t, timesteps, cache, method=network.denoise
    )
    assert _error(ours, expected) < 1e-5


@pytest.mark.parametrize(
  "channels, num_layers, head_channels", [(32, 1, 8), (64, 3, 64)]
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
  ours, _ = network.apply(
    _variables(part),
    x_t,
    jnp.full(2, 500),
    image_embed=image_embed,
    text_embed=text_embed,
    text_encodings=states,
    text_mask=mask,
  )
  assert _error(ours, expected) < 1e-5


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
    ours, _ = network.apply(
      _variables(part, collection), x_t, jnp.full(1, 166), low_res=low_res
    )
    assert _error(ours, both[name](x, 166).sample) < 1e-5
