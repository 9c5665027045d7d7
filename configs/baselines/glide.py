"""GLIDE on emoji: a diffusion model of pictures given text alone, at 32 px.

  unclip train --config configs/baselines/glide.py \
    --workdir runs/baselines/glide

Nichol et al. 2021 (arXiv 2112.10741), which unCLIP's decoder extends by the
CLIP embedding: here it stands on no CLIP, and the network encodes the caption
itself. 20 % of the captions are dropped from the start, which GLIDE does in a
second training (section 4.2), and the process is that of
configs/emoji/decoder.py. 7 million parameters. Its upsampler and its form
for inpainting are glide_upsampler.py and glide_inpainting.py; `:smoke` trains
two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  config.name = "glide"
  config.data = data.emoji(quick=False, smoke=arg.smoke, image_size=32)

  config.task_name = "unclip_jax.tasks.decoder"
  config.task = dict(
    process=dict(
      schedule="cosine",
      snr_scale=0.2,
      prediction="x_start",
      variance="fixed_small",  # DDIM needs no other
    ),
    text_drop_prob=0.2,  # section 4.2
    sample_options=dict(
      sampler="ddim", num_sample_steps=50, guidance_scale=2.0
    ),
  )
  config.model_name = "unclip_jax.models.unet"
  config.model = dict(
    image_size=32,
    patch_size=2,  # a coarse first level: most of the work is there
    out_channels=3,
    channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(8, 4),
    head_channels=32,
    image_embed_dim=None,  # no CLIP
    text_encoder=text_encoder(width=128, depth=4, smoke=arg.smoke),
    dropout=0.0,
  )

  config.num_steps = 6000
  config.batch_size = 32
  config.ema_decay = 0.999
  config.optim.learning_rate = 3e-4
  config.evals = common.diffusion_evals(("true", "drawn"))

  if arg.smoke:
    # The paper's variance and its hybrid loss, so that tests go through them.
    config.task.process.variance = "learned_range"
    config.model.out_channels = 6
    config.model.channels = 16
    config.model.channel_mult = (1, 2)
    config.model.head_channels = 8
    config.model.attention_resolutions = (8,)
    config.task.sample_options.num_sample_steps = 2
    common.smoke(config)
  return config


def text_encoder(*, width: int, depth: int, smoke: bool) -> dict:
  """`config.model.text_encoder`, with heads of 32."""
  if smoke:
    width, depth = 32, 1
  return dict(
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,
    width=width,
    depth=depth,
    num_heads=width // 32,
  )
