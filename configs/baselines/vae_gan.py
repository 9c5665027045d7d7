"""VAE-GAN from captions on emoji: BERT-style text encoder, learned prior.

  unclip train --config configs/baselines/vae_gan.py \
    --workdir runs/baselines/vae_gan

Larsen et al. 2016 (arXiv 1512.09300) with VQGAN's convolutions, discriminator
and adaptive weight (Esser et al. 2021), conditioned on a caption as a
conditional VAE is (unclip_jax/tasks/vae_gan.py). The discriminator sets in
after 2,000 steps. A BERT of transformers, converted, reads the captions frozen
in place of the encoder trained here, with a tokenizer and a width of its own:

  --config.frozen="{'text': {'path': 'models/bert'}}" \
  --config.model.vocab_size=None --config.model.text_width=768 \
  --config.data.tokenizer=models/bert

`:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.baselines import vqgan
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = vqgan.get_config("smoke" if arg.smoke else None)
  autoencoder = config.model
  config.name = "vae_gan"

  config.task_name = "unclip_jax.tasks.vae_gan"
  config.task = dict(
    objective=config.task.objective,
    # Nats of 3,072 pixel values: less than 1, so that z says what pictures
    # with the same caption differ in.
    kl_weight=0.1,
    sample_options=dict(temperature=1.0, return_maps=False),
  )
  config.model_name = "unclip_jax.models.vae_gan"
  config.model = dict(
    image_size=32,
    context_length=data.CONTEXT_LENGTH,
    vocab_size=data.VOCAB_SIZE,
    text_width=128,
    text_depth=3,
    text_num_heads=4,
    code_dim=8,
    prior_width=128,
    prior_depth=3,
    **{
      name: autoencoder[name]
      for name in (
        *("channels", "channel_mult", "num_res_blocks", "num_heads"),
        *("discriminator_channels", "discriminator_layers", "dropout"),
      )
    },
  )
  config.num_steps = 5000
  config.evals = common.diffusion_evals(("true", "drawn"))

  if arg.smoke:
    config.model.code_dim = 4
    config.model.text_width = config.model.prior_width = 16
    config.model.text_depth = config.model.prior_depth = 1
    config.model.text_num_heads = 2
    common.smoke(config)
  return config
