"""The decoder on emoji, over the CLIP of configs/emoji/clip.py.

  unclip train --config configs/emoji/decoder.py --workdir runs/emoji/decoder \
    --config.frozen.clip.path=runs/emoji/clip

`:quick` is the third stage of `make quickstart`; `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import clip, data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = common.base()
  upstream = clip.get_config(common.size(arg))
  config.name = "decoder"
  config.data = data.emoji(
    quick=arg.quick,
    smoke=arg.smoke,
    image_size=16,
    clip_image_size=upstream.model.image_size,
  )
  config.frozen.clip = dict(path="runs/emoji/clip")

  config.task_name = "unclip_jax.tasks.decoder"
  config.task = dict(
    # x_start, where the paper has eps, and more noise: what the conditions
    # have to say is learned where the noise hides it. After 600 steps of
    # `:quick`, 93 % of the drawn pictures are nearest to their own, where v and
    # the plain schedule give about a quarter.
    process=dict(
      schedule="cosine",
      snr_scale=0.2,
      prediction="x_start",
      variance="fixed_small",  # DDIM needs no other
    ),
    embedding_space="mean_std",
    image_embed_drop_prob=0.1,
    # The paper drops half of the captions; so small a prior leans on them.
    text_drop_prob=0.1,
    sample_options=dict(
      sampler="ddim", num_sample_steps=50, guidance_scale=2.0
    ),
  )
  config.model_name = "unclip_jax.models.unet"
  config.model = dict(
    image_size=16,
    patch_size=2,  # a coarse first level: most of the work is there
    out_channels=3,
    channels=128,
    channel_mult=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(8, 4),
    head_channels=64,
    image_embed_dim=upstream.model.embed_dim,
    num_image_embed_tokens=4,
    text_width=upstream.model.text_width,
    dropout=0.0,
  )

  config.num_steps = 6000
  config.batch_size = 32
  config.ema_decay = 0.999
  config.optim.learning_rate = 3e-4
  config.evals = common.diffusion_evals(("true", "drawn"))
  # Are pictures drawn from the true embedding nearest to the true picture?
  config.evals.match = dict(
    type="unclip_jax.evaluators.nearest_match",
    pred="sample",
    split="train",
    max_examples=100,
    batch_size=50,
  )

  if arg.quick:
    # What memorises a few hundred pictures in six minutes on two cores.
    config.model.channels = 96
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (4,)
    # What is memorised needs no guidance, which makes colours glaring.
    config.task.sample_options.guidance_scale = 1.0
    config.task.sample_options.num_sample_steps = 30
    common.evaluate_on(config, "train")  # nothing is held out
    config.num_steps = 1250
    config.ema_decay = 0.995
    config.optim.learning_rate = 2e-3
    config.eval_every_steps = 1250
    config.checkpoint.every_steps = 625
    config.frozen.clip.path = "runs/quickstart/clip"
  if arg.smoke:
    # The paper's variance and its hybrid loss, so that tests go through them.
    config.task.process.variance = "learned_range"
    config.model.out_channels = 6
    config.model.patch_size = 1
    config.model.channels = 16
    config.model.num_res_blocks = 1
    config.model.head_channels = 8
    config.model.attention_resolutions = (8,)
    config.task.sample_options.num_sample_steps = 2
    config.frozen.clip = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
