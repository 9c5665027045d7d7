"""DALL-E on emoji (Ramesh et al. 2021, arXiv 2102.12092), its second stage.

  unclip train --config configs/baselines/dalle.py \
    --workdir runs/baselines/dalle \
    --config.frozen.tokenizer.path=runs/baselines/dvae

A transformer over the caption and the codes of configs/baselines/dvae.py, or of
a VQGAN with as many. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.baselines import dvae
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  upstream = dvae.get_config("smoke" if arg.smoke else None)
  config.name = "dalle"
  config.data = data.emoji(
    quick=False,
    smoke=arg.smoke,
    image_size=upstream.model.image_size,
  )
  config.frozen.tokenizer = dict(path="runs/baselines/dvae")

  config.task_name = "unclip_jax.tasks.tokens"
  config.task = dict(
    text_drop_prob=0.1,
    text_loss_weight=1 / 8,  # section 2.2
    sample_options=dict(
      guidance_scale=2.0,
      temperature=1.0,
      top_k=None,
      top_p=None,
      num_known_rows=0,
    ),
  )
  config.model_name = "unclip_jax.models.token_transformer"
  config.model = dict(
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,
    num_codes=upstream.model.num_codes,
    grid_size=8,
    image_size=upstream.model.image_size,
    width=192,
    depth=6,
    num_heads=6,
    # Appendix B.1, where the kernel is 11 of a grid of 32.
    attention_types=("row", "column", "row", "row"),
    last_attention_type="convolution",
    kernel_size=5,
    dropout=0.1,
  )

  config.num_steps = 5000  # of about 1 s of one core each
  config.batch_size = 16
  config.ema_decay = 0.995
  config.optim.learning_rate = 5e-4  # 4.5e-4 in appendix B.2, as what follows
  config.optim.b2 = 0.96
  config.optim.weight_decay = 0.045
  config.optim.clip_norm = 4.0
  config.evals = common.diffusion_evals(("true", "drawn"))

  if arg.smoke:
    config.model.width = 16
    config.model.depth = 4
    config.model.num_heads = 2
    config.model.kernel_size = 3
    config.frozen.tokenizer = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
