"""VQGAN on emoji: 8 x 8 codes a picture (Esser et al. 2021, arXiv 2012.09841).

  unclip train --config configs/baselines/vqgan.py \
    --workdir runs/baselines/vqgan

It reconstructs and draws nothing by itself: a transformer is trained over its
codes. The discriminator sets in after 2,000 steps. With `bottleneck="kl"` it is
the first stage of latent diffusion (Rombach et al. 2021, arXiv 2112.10752):

  --config.model.bottleneck=kl --config.model.code_dim=4

and with a perceptual loss, here a CLIP's, as LPIPS's own weights are the user's
to bring:

  --config.frozen="{'perceptual': {'path': 'runs/emoji/clip'}}" \
  --config.task.objective.perceptual_weight=0.1

`:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  config.name = "vqgan"
  config.data = data.emoji(quick=False, smoke=arg.smoke, image_size=32)

  config.task_name = "unclip_jax.tasks.vqgan"
  config.task = dict(
    objective=dict(
      reconstruction="l1",
      perceptual_weight=0.0,
      adversarial="hinge",
      adversarial_weight=0.8,
      adaptive=True,
      start_step=2000,
    ),
    commitment_weight=0.25,
    kl_weight=0.01,  # of bottleneck="kl"
  )
  config.model_name = "unclip_jax.models.vqgan"
  config.model = dict(
    image_size=32,
    bottleneck="vq",
    num_codes=512,
    code_dim=64,
    channels=32,
    channel_mult=(1, 2, 4),
    num_res_blocks=1,
    num_heads=4,
    decay=0.99,
    restart_below=0.03,  # of the average code's use
    discriminator_channels=32,
    discriminator_layers=2,  # a logit sees 34 pixels
    dropout=0.0,
  )

  config.num_steps = 6000
  config.batch_size = 16
  config.ema_decay = 0.999
  config.optim.learning_rate = 3e-4
  config.optim.b1 = 0.5  # of both players, as in the released code
  config.optim.b2 = 0.9
  config.optim.groups = (
    (r"^discriminator\.", dict(learning_rate=2e-4, clip_norm=None)),
  )
  config.evals = dict(
    loss=dict(type="unclip_jax.evaluators.mean", pred="loss", max_examples=256),
    samples=dict(
      type="unclip_jax.evaluators.sample_grid",
      pred="reconstruct",
      max_examples=16,
      batch_size=16,
      parts=("true", "drawn"),
    ),
  )

  if arg.smoke:
    config.task.objective.start_step = 1
    config.model.num_codes = 32
    config.model.code_dim = 8
    config.model.channels = 8
    config.model.channel_mult = (1, 2)
    config.model.discriminator_channels = 8
    config.model.num_heads = 2
    common.smoke(config)
  return config
