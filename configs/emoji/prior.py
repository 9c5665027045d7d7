"""The diffusion prior on emoji, over the CLIP of configs/emoji/clip.py.

  unclip train --config configs/emoji/prior.py --workdir runs/emoji/prior \
    --config.frozen.clip.path=runs/emoji/clip

`:quick` is the second stage of `make quickstart`; `:smoke` trains two steps.
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
  config.name = "prior"
  config.data = data.emoji(
    quick=arg.quick,
    smoke=arg.smoke,
    image_size=32,
    clip_image_size=upstream.model.image_size,
  )
  config.frozen.clip = dict(path="runs/emoji/clip")

  config.task_name = "unclip_jax.tasks.prior_diffusion"
  config.task = dict(
    process=dict(schedule="cosine", prediction="x_start"),
    embedding_space="mean_std",
    text_drop_prob=0.1,
    sample_options=dict(
      sampler="ddpm",
      num_sample_steps=64,
      guidance_scale=1.0,
      num_candidates=2,
    ),
  )
  config.model_name = "unclip_jax.models.prior"
  config.model = dict(
    embed_dim=upstream.model.embed_dim,
    text_width=upstream.model.text_width,
    context_length=data.CONTEXT_LENGTH,
    width=256,
    depth=6,
    num_heads=4,
    dropout=0.0,
  )

  config.num_steps = 4000
  config.batch_size = 64
  config.ema_decay = 0.999
  config.optim.learning_rate = 3e-4
  config.optim.weight_decay = 0.06  # PAPER: Table 3 of Ramesh et al. 2022
  config.optim.b2 = 0.96
  config.optim.eps = 1e-6

  report = dict(
    type="unclip_jax.evaluators.prior_report", pred="sample", max_examples=256
  )
  config.evals = dict(
    loss=dict(type="unclip_jax.evaluators.mean", pred="loss", max_examples=256),
    report=report,
    report_train=dict(report, split="train"),
  )

  if arg.quick or arg.smoke:
    config.model.width = 128
    config.model.depth = 4
  if arg.quick:
    common.evaluate_on(config, "train")  # nothing is held out
    config.num_steps = 600
    config.ema_decay = 0.99
    config.optim.learning_rate = 1e-3
    config.eval_every_steps = 600
    config.checkpoint.every_steps = 300
    config.frozen.clip.path = "runs/quickstart/clip"
  if arg.smoke:
    config.model.width = 16
    config.model.depth = 1
    config.model.num_heads = 2
    config.task.sample_options.num_sample_steps = 2
    config.frozen.clip = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
