"""Text-conditional GAN on emoji (Reed et al. 2016, arXiv 1605.05396).

  unclip train --config configs/baselines/gan.py --workdir runs/baselines/gan

The networks are those of Miyato & Koyama 2018 (arXiv 1802.05637), trained in
the manner of StyleGAN2 (non-saturating loss, R1) with differentiable
augmentation (Zhao et al. 2020, arXiv 2006.10738), since the pictures are few.
Other losses are fields:

  hinge with spectral normalisation (Miyato et al. 2018)
    --config.task.loss_type=hinge --config.task.r1_weight=0 \
    --config.model.spectral_norm_iterations=16
  Wasserstein with gradient penalty (Gulrajani et al. 2017)
    --config.task.loss_type=wasserstein --config.task.r1_weight=0 \
    --config.task.gradient_penalty_weight=10
  guided by a CLIP
    --config.task.clip_weight=1 --config.frozen.clip.path=runs/emoji/clip

The loss is a game's and does not fall: `real_logits` above `fake_logits`, and
neither running away, is what is to be seen. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  config.name = "gan"
  size = 8 if arg.smoke else 32
  config.data = data.emoji(quick=False, smoke=arg.smoke, image_size=size)

  config.task_name = "unclip_jax.tasks.gan"
  config.task = dict(
    loss_type="nonsaturating",
    r1_weight=0.1,
    r1_every=1,  # more on accelerators
    gradient_penalty_weight=0.0,
    wrong_captions=True,
    caption_kl_weight=1.0,
    clip_weight=0.0,
    augmentation=dict(  # the strengths of Zhao et al. 2020
      brightness=0.5,
      saturation=1.0,
      contrast=0.5,
      translation=0.125,
      cutout=0.5,
    ),
    sample_options=dict(truncation=1.0),
  )
  config.model_name = "unclip_jax.models.gan"
  config.model = dict(
    image_size=size,
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,
    latent_dim=64,
    generator_channels=(256, 128, 64, 32),
    discriminator_channels=(32, 64, 128, 256),
    text_width=128,
    text_depth=2,
    text_num_heads=4,
    caption_dim=128,
    caption_augmentation=False,
    spectral_norm_iterations=0,
  )

  config.num_steps = 8000
  config.batch_size = 32
  config.ema_decay = 0.999
  # Adam without momentum, as StyleGAN2, and two rates (Heusel et al. 2017,
  # arXiv 1706.08500): the discriminator's is the larger one.
  config.optim.learning_rate = 2e-4
  config.optim.b1 = 0.0
  config.optim.b2 = 0.99
  config.optim.schedule = "constant"
  config.optim.clip_norm = None
  config.optim.groups = ((r"^discriminator\.", dict(learning_rate=4e-4)),)
  config.evals = common.diffusion_evals(("true", "drawn"))

  if arg.smoke:
    config.model.generator_channels = (16, 8)
    config.model.discriminator_channels = (8, 16)
    config.model.text_width = config.model.caption_dim = 16
    config.model.text_depth = 1
    config.model.text_num_heads = 2
    # All parts, so that tests go through them.
    config.task.r1_every = 2
    config.task.gradient_penalty_weight = 1.0
    config.model.caption_augmentation = True
    config.model.spectral_norm_iterations = 2
    common.smoke(config)
  return config
