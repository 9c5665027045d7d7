"""Tiny Karlos of diffusers' and transformers' own classes, random weights."""

from __future__ import annotations

import pathlib

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers import UnCLIPScheduler


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Weights of every parameter and buffer anew, none of them zero."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in module.state_dict().items():
      if not x.is_floating_point():
        continue
      noise = torch.randn(x.shape, generator=generator)
      fan_in = x[0].numel() if x.ndim > 1 else 1
      if x.ndim > 1 and x.shape[0] > 1:
        x.copy_(noise / fan_in**0.5)
      elif name.endswith(("norm.weight", "clip_std")) or "norm" in name:
        x.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
      else:
        x.copy_(0.1 * noise)
      if name == "clip_std":
        x.copy_(1 + 0.1 * noise.abs())
  return module.eval()


def prior(num_heads: int = 2, num_layers: int = 1) -> PriorTransformer:
  return randomize(
    PriorTransformer(
      num_attention_heads=num_heads,
      attention_head_dim=12,
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


def super_resolution(seed: int, num_layers: int = 1) -> UNet2DModel:
  return randomize(
    UNet2DModel(
      sample_size=32,
      in_channels=6,
      out_channels=3,
      block_out_channels=(32, 64),
      layers_per_block=num_layers,
      down_block_types=("ResnetDownsampleBlock2D",) * 2,
      up_block_types=("ResnetUpsampleBlock2D",) * 2,
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


def save(folder: pathlib.Path, **modules: torch.nn.Module) -> None:
  """Networks by the names of their folders, and all schedulers."""
  for name, module in {**modules, **schedulers()}.items():
    module.save_pretrained(folder / name)
