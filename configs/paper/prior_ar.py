"""The autoregressive prior of the paper (Ramesh et al. 2022, table 3, 2.2).

  unclip train --config configs/paper/prior_ar.py \
    --workdir runs/paper/prior_ar --config.frozen.clip.path=runs/paper/clip \
    --config.mesh.fsdp=8

Parameters: 1,310,316,544 in the text encoder, of which 101,187,584 embed the
tokens, and 967,305,216 in the latent decoder, of which 163,657,728 give the
keys and values of the text in its 24 layers. The table says 1B, which its own
widths and depths exceed. FID on MS-COCO with the paper's decoder: 10.63 (table
1).

Emoji stand in for the data: configs/paper/data.py. What the paper does not
state is marked "ours". `:smoke` trains two steps of a tiny model.
"""

from __future__ import annotations

import ml_collections

from configs.emoji import prior_ar
from configs.paper import clip, data, stage
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = prior_ar.get_config("smoke" if arg.smoke else None)
  config.name = "paper_prior_ar"
  config.task.text_drop_prob = 0.1  # section 2.2
  config.task.sample_options.dot_quantile = 0.5  # the top half, section 2.2

  # Table 3, column "AR prior"; b1 is that of all models.
  config.optim.learning_rate = 1.6e-4  # Learning rate 1.6e-4
  config.optim.weight_decay = 4.0e-2  # Weight decay 4.0e-2
  config.optim.b1 = 0.9
  config.optim.b2 = 0.91  # Adam b2 0.91
  config.optim.eps = 1e-10  # Adam eps 1e-10
  config.ema_decay = 0.999  # EMA decay 0.999
  config.optim.schedule = "constant"  # ours, with the warm-up and clip_norm 1
  if arg.smoke:
    config.model.text_width = None
    config.model.vocab_size = 1024
    return config

  config.num_steps = 1_000_000  # Iterations 1M
  config.batch_size = 4096  # Batch size 4096
  config.optim.warmup_steps = 1000
  upstream = clip.get_config()
  config.model = dict(
    embed_dim=upstream.model.embed_dim,
    text_width=None,
    vocab_size=data.VOCAB_SIZE,
    # Text encoder context/width/depth/heads 256/2048/24/32
    context_length=data.CONTEXT_LENGTH,
    encoder_width=2048,
    encoder_depth=24,
    encoder_num_heads=32,
    # Latent decoder context/width/depth/heads 384/1664/24/26: of the 384
    # positions 320 are used (z_t, the dot product, codes but the last).
    width=1664,
    depth=24,
    num_heads=26,
    num_codes=319,  # section 2.2: "319 principal components out of the 1,024"
    num_buckets=1024,  # section 2.2: "into 1,024 discrete buckets"
    num_dot_buckets=20,  # ours
    dropout=0.0,
    remat="full",  # ours: fits a batch of 4096 in less memory
    scan=True,
    dtype="bfloat16",  # ours
  )
  config.data = data.pairs(
    smoke=False,
    image_size=64,
    clip_image_size=upstream.model.image_size,
  )
  config.frozen.clip = stage.clip()
  config.prepare_examples = 65_536  # ours: 64 for each dimension of the PCA
  config.checkpoint.every_steps = 5000
  config.eval_every_steps = 5000
  return config
