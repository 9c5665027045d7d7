"""The decoder on shapes, over the CLIP of configs/shapes/clip.py.

  unclip train --config configs/shapes/decoder.py \
    --workdir runs/shapes/decoder --config.frozen.clip.path=runs/shapes/clip

Beside `decoder_text.py`, which has captions alone, it asks what the paper's
section 7 asks: what of a scene does the CLIP's embedding not hold?
`--config.task.sample_options.use_text=false` draws from the embedding alone.

`:quick` is a fifth of it, an hour on one core; configs/README.md says what it
draws beside `decoder_text.py:quick`. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.shapes import clip, data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = common.base()
  upstream = clip.get_config(common.size(arg))
  config.name = "decoder"
  config.data = data.shapes(
    smoke=arg.smoke,
    image_size=32,
    clip_image_size=upstream.model.image_size,
  )
  config.frozen.clip = dict(path="runs/shapes/clip")

  config.task_name = "unclip_jax.tasks.decoder"
  config.task = dict(
    # As configs/emoji/decoder.py, which says why.
    process=dict(
      schedule="cosine",
      snr_scale=0.2,
      prediction="x_start",
      variance="fixed_small",
    ),
    embedding_space="mean_std",
    image_embed_drop_prob=0.1,  # section 2.1
    text_drop_prob=0.5,  # section 2.1
    sample_options=dict(
      sampler="ddim", num_sample_steps=30, guidance_scale=1.0
    ),
  )
  config.model_name = "unclip_jax.models.unet"
  config.model = dict(
    image_size=32,
    patch_size=2,
    out_channels=3,
    channels=64,
    channel_mult=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(8,),
    head_channels=32,
    image_embed_dim=upstream.model.embed_dim,
    num_image_embed_tokens=4,
    text_encoder=dict(
      vocab_size=data.VOCAB_SIZE,
      context_length=data.CONTEXT_LENGTH,
      width=128,
      depth=3,
      num_heads=4,
    ),
    dropout=0.0,
  )

  config.num_steps = 20_000
  config.batch_size = 32
  config.ema_decay = 0.999
  config.optim.learning_rate = 5e-4
  config.evals = data.on_every_split(
    type="unclip_jax.evaluators.scenes",
    pred="sample",
    max_examples=128,
    num_grid=16,
  )
  config.evals.loss = dict(
    type="unclip_jax.evaluators.mean", pred="loss", max_examples=256
  )

  if arg.quick:
    config.num_steps = 4000
    config.ema_decay = 0.998
    config.optim.learning_rate = 1e-3
    config.eval_every_steps = 1000
    config.checkpoint.every_steps = 500
  if arg.smoke:
    config.model.channels = 16
    config.model.num_res_blocks = 1
    config.model.head_channels = 8
    config.model.text_encoder.width = 16
    config.model.text_encoder.depth = 1
    config.model.text_encoder.num_heads = 2
    config.task.sample_options.num_sample_steps = 2
    config.frozen.clip = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
