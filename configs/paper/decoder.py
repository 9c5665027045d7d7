"""The paper's 64 px decoder, 3.6 billion parameters.

  unclip train --config configs/paper/decoder.py \
    --workdir runs/paper/decoder --config.frozen.clip.path=runs/paper/clip

Quoted are the rows of Table 3 (Ramesh et al. 2022), column "64". Its "Model
size 3.5B" is a U-Net of 2,238,164,486 parameters, a text encoder of 1.2 billion
and the tokens' embeddings. Emoji stand in for the data: configs/paper/data.py.

On many devices: `--config.mesh.fsdp=16`. `:mxu` has heads of 128, the size of a
TPU's matrix unit, in place of 64. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import clip
from configs.paper import data, stage
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False, mxu=False)
  config = stage.base()
  config.name = "decoder"
  config.data = data.pairs(
    smoke=arg.smoke,
    image_size=16 if arg.smoke else 64,
    clip_image_size=32 if arg.smoke else 256,
  )
  config.frozen.clip = stage.clip()

  config.task_name = "unclip_jax.tasks.decoder"
  config.task = dict(
    process=dict(
      num_timesteps=1000,  # "Diffusion steps"
      schedule="cosine",  # "Noise schedule"
      prediction="eps",  # as GLIDE
      variance="learned_range",  # "Sampling variance" learned
      clip_x_start=1.0,  # as GLIDE
    ),
    embedding_space="scaled",  # as the prior's
    image_embed_drop_prob=0.1,  # section 2.1
    text_drop_prob=0.5,  # section 2.1
    sample_options=dict(
      sampler="ddpm",
      num_sample_steps=250,  # "Sampling steps"
      guidance_scale=1.25,  # of the FID in section 5.3
    ),
  )
  config.model_name = "unclip_jax.models.unet"
  config.model = dict(
    image_size=64,
    out_channels=6,
    channels=512,  # "Channels"
    num_res_blocks=3,  # "Depth"
    channel_mult=(1, 2, 3, 4),  # "Channels multiple"
    head_channels=64,  # "Heads channels"
    attention_resolutions=(32, 16, 8),  # "Attention resolution"
    image_embed_dim=1024,  # section 2.2
    num_image_embed_tokens=4,  # section 2.1
    text_encoder=dict(
      vocab_size=data.VOCAB_SIZE,
      context_length=data.CONTEXT_LENGTH,  # "Text enc. context" 256
      width=2048,  # "Text enc. width"
      depth=24,  # "Text enc. depth"
      num_heads=32,  # "Text enc. heads"
      scan=True,
    ),
    dropout=0.1,  # "Dropout"
    remat="full",
    dtype="bfloat16",
  )

  if arg.mxu:
    config.model.head_channels = 128
    config.model.text_encoder.num_heads = 16

  config.num_steps = 800_000  # "Iterations" 800K
  config.batch_size = 2048  # "Batch size"
  config.ema_decay = 0.9999  # "EMA decay"
  config.optim.learning_rate = 1.2e-4  # "Learning rate"
  config.optim.weight_decay = 0.0  # "Weight decay" -
  config.optim.b2 = 0.999  # "Adam b2"
  config.optim.eps = 1e-8  # "Adam eps"
  config.evals = common.diffusion_evals(("true", "drawn"))

  if arg.smoke:
    upstream = clip.get_config("smoke")
    config.model.image_size = config.data.preprocess.image_size
    config.model.channels = 16
    config.model.num_res_blocks = 1
    config.model.channel_mult = (1, 2)
    config.model.head_channels = 8
    config.model.attention_resolutions = (8,)
    config.model.image_embed_dim = upstream.model.embed_dim
    config.model.text_encoder = dict(
      vocab_size=1024,
      context_length=config.data.preprocess.context_length,
      width=16,
      depth=1,
      num_heads=2,
    )
    config.task.sample_options.num_sample_steps = 2
    config.frozen.clip = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
