"""Tiny Karlos of diffusers' and transformers' own classes, random weights."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import (
  pipeline_unclip,
  pipeline_unclip_image_variation,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers import UnCLIPScheduler, scheduling_unclip

from tests import bpe_files
from unclip_jax.diffusion import schedules


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Draws every parameter and buffer anew, so that none is 0 or 1.

  Matrices as narrow as torch's own: a network that is wider makes pictures that
  hang on the last bit of a number.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in module.state_dict().items():
      if not x.is_floating_point():
        continue
      noise = torch.randn(x.shape, generator=generator)
      if x.ndim > 1 and x.shape[0] > 1:
        x.copy_(noise * 0.3 / x[0].numel() ** 0.5)
      elif name == "clip_std":
        x.copy_(1 + 0.1 * noise.abs())
      elif "norm" in name and name.endswith("weight"):
        x.copy_(1 + 0.1 * noise)
      else:
        x.copy_(0.1 * noise)
  return module.eval()


def prior(
  num_heads: int = 2, num_layers: int = 1, head_size: int = 8
) -> PriorTransformer:
  return randomize(
    PriorTransformer(
      num_attention_heads=num_heads,
      attention_head_dim=head_size,
      num_layers=num_layers,
      embedding_dim=32,
      num_embeddings=77,
    )
  )


def text_proj(channels: int = 32) -> UnCLIPTextProjModel:
  return randomize(
    UnCLIPTextProjModel(
      clip_embeddings_dim=32,
      time_embed_dim=4 * channels,
      cross_attention_dim=100,
    )
  )


def decoder(
  channels: int = 32, num_layers: int = 1, head_channels: int = 8
) -> UNet2DConditionModel:
  return randomize(
    UNet2DConditionModel(
      sample_size=16,
      in_channels=3,
      out_channels=6,
      block_out_channels=(channels, 2 * channels, 3 * channels),
      layers_per_block=num_layers,
      down_block_types=(
        "ResnetDownsampleBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "SimpleCrossAttnDownBlock2D",
      ),
      up_block_types=(
        "SimpleCrossAttnUpBlock2D",
        "SimpleCrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
      ),
      mid_block_type="UNetMidBlock2DSimpleCrossAttn",
      attention_head_dim=head_channels,
      cross_attention_dim=100,
      resnet_time_scale_shift="scale_shift",
      class_embed_type="identity",
      norm_num_groups=8,
    ),
    1,
  )


def super_resolution(
  seed: int, num_layers: int = 1, num_levels: int = 2
) -> UNet2DModel:
  return randomize(
    UNet2DModel(
      sample_size=32,
      in_channels=6,
      out_channels=3,
      block_out_channels=(32, 64, 96)[:num_levels],
      layers_per_block=num_layers,
      down_block_types=("ResnetDownsampleBlock2D",) * num_levels,
      up_block_types=("ResnetUpsampleBlock2D",) * num_levels,
      add_attention=False,
      norm_num_groups=8,
    ),
    seed,
  )


def schedulers() -> dict[str, UnCLIPScheduler]:
  return {
    "prior_scheduler": UnCLIPScheduler(
      prediction_type="sample",
      variance_type="fixed_small_log",
      clip_sample_range=5.0,
    ),
    "decoder_scheduler": UnCLIPScheduler(
      prediction_type="epsilon", variance_type="learned_range"
    ),
    "super_res_scheduler": UnCLIPScheduler(
      prediction_type="epsilon", variance_type="fixed_small_log"
    ),
  }


def make_exact(scheduler: UnCLIPScheduler) -> None:
  """Gives a scheduler its tables in float64.

  Theirs are float32, in which 1 - alphas_cumprod[0] is 0.05 % off: so is the
  last step.
  """
  level = schedules.make_schedule("cosine").alphas_cumprod
  betas = 1 - level / np.concatenate([[1.0], level[:-1]])
  scheduler.alphas_cumprod = torch.tensor(level)
  scheduler.betas, scheduler.alphas = torch.tensor(betas), 1 - betas


def text_encoder(vocab_size: int) -> transformers.CLIPTextModelWithProjection:
  config = transformers.CLIPTextConfig(
    vocab_size=vocab_size,
    hidden_size=32,
    intermediate_size=64,
    projection_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=vocab_size - 2,
    eos_token_id=vocab_size - 1,
    pad_token_id=0,
  )
  return randomize(transformers.CLIPTextModelWithProjection(config), 2)


def image_encoder() -> transformers.CLIPVisionModelWithProjection:
  config = transformers.CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=64,
    projection_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=24,
    patch_size=8,
  )
  return randomize(transformers.CLIPVisionModelWithProjection(config), 3)


def save(folder: pathlib.Path, **modules: torch.nn.Module) -> None:
  """Networks by the names of their folders, and all schedulers."""
  for name, module in {**modules, **schedulers()}.items():
    module.save_pretrained(folder / name)


def save_model(folder: pathlib.Path) -> None:
  """A whole Karlo: what both of its repositories hold, in one folder."""
  bpe_files.write(folder / "tokenizer")
  tokenizer = transformers.CLIPTokenizer.from_pretrained(
    folder / "tokenizer", pad_token="!", model_max_length=77
  )
  tokenizer.save_pretrained(folder / "tokenizer")
  processor = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
  )
  processor.save_pretrained(folder / "feature_extractor")
  save(
    folder,
    text_encoder=text_encoder(len(tokenizer)),
    image_encoder=image_encoder(),
    prior=prior(),
    text_proj=text_proj(),
    decoder=decoder(),
    super_res_first=super_resolution(0),
    super_res_last=super_resolution(1),
  )


_SHARED = {
  "decoder": UNet2DConditionModel,
  "text_proj": UnCLIPTextProjModel,
  "super_res_first": UNet2DModel,
  "super_res_last": UNet2DModel,
  "text_encoder": transformers.CLIPTextModelWithProjection,
  "tokenizer": transformers.CLIPTokenizer,
  "decoder_scheduler": UnCLIPScheduler,
  "super_res_scheduler": UnCLIPScheduler,
}


def _load(kind: Any, folder: pathlib.Path, **more: Any) -> Any:
  """A pipeline whose parts are read by their own classes."""
  classes = {**_SHARED, **more}
  pipe = kind(**{k: v.from_pretrained(folder / k) for k, v in classes.items()})
  pipe.set_progress_bar_config(disable=True)
  return pipe


def load_pipeline(folder: pathlib.Path) -> pipeline_unclip.UnCLIPPipeline:
  return _load(
    pipeline_unclip.UnCLIPPipeline,
    folder,
    prior=PriorTransformer,
    prior_scheduler=UnCLIPScheduler,
  )


def load_variations(folder: pathlib.Path) -> Any:
  """diffusers' UnCLIPImageVariationPipeline."""
  return _load(
    pipeline_unclip_image_variation.UnCLIPImageVariationPipeline,
    folder,
    image_encoder=transformers.CLIPVisionModelWithProjection,
    feature_extractor=transformers.CLIPImageProcessorPil,
  )


def inject_noise(monkeypatch: Any, noise: Sequence[np.ndarray]) -> None:
  """Makes diffusers draw the given arrays, in the order of a pipeline's draws.

  Args:
    noise: of one stage after the other, `[num_sample_steps + 1, ...]` NHWC,
      whose last entry nobody draws.
  """

  def draws() -> Iterator[torch.Tensor]:
    for stage in noise:
      for x in stage[:-1]:
        yield torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)

  order = draws()
  pipelines = (pipeline_unclip, pipeline_unclip_image_variation)
  for module in (*pipelines, scheduling_unclip):
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(order))
