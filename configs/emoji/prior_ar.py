"""The autoregressive prior on emoji, over the CLIP of configs/emoji/clip.py.

  unclip train --config configs/emoji/prior_ar.py \
    --workdir runs/emoji/prior_ar --config.frozen.clip.path=runs/emoji/clip

Data, CLIP and evaluators are those of configs/emoji/prior.py, with which it is
to be compared. `:quick` takes the CLIP of `make quickstart`; `:smoke` trains
two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import prior
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, quick=False, smoke=False)
  config = prior.get_config(common.size(arg))
  model = config.model
  config.name = "prior_ar"

  config.task_name = "unclip_jax.tasks.prior_ar"
  config.task = dict(
    buckets="uniform",
    text_drop_prob=0.1,
    sample_options=dict(
      guidance_scale=1.0,
      num_candidates=1,
      dot_quantile=0.5,
      temperature=1.0,
      top_k=None,
      top_p=None,
    ),
  )
  config.model_name = "unclip_jax.models.prior_ar"
  config.model = dict(
    embed_dim=model.embed_dim,
    text_width=model.text_width,
    context_length=model.context_length,
    num_codes=64,
    num_buckets=64,  # few pictures: most of 1,024 would never be seen
    num_dot_buckets=20,
    encoder_width=model.width,
    encoder_depth=2,
    encoder_num_heads=model.num_heads,
    width=model.width,
    depth=model.depth,
    num_heads=model.num_heads,
    dropout=0.0,
  )
  config.optim.weight_decay = 0.04  # PAPER: Table 3 of Ramesh et al. 2022
  config.optim.b2 = 0.91
  config.optim.eps = 1e-10

  if arg.quick:
    # Of 128: 0.04 % of the variance of the quickstart's embeddings is left.
    config.model.num_codes = 32
  if arg.smoke:
    config.model.num_codes = 6
    config.model.num_buckets = 8
    config.model.num_dot_buckets = 4
    config.model.encoder_depth = 1
  return config
