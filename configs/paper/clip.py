"""The paper's CLIP (Ramesh et al. 2022, arXiv 2204.06125, Appendix C).

  unclip train --config configs/paper/clip.py --config.mesh.fsdp=8 \
    --workdir runs/paper/clip

986 million parameters: 632 of the vision tower, 354 of the text tower. What
the appendix does not say is "the same as Radford et al. 2021" (arXiv
2103.00020, their table 18), marked CLIP below; what neither says is our choice.

The 650 million captioned pictures (CLIP's and DALL-E's data, equally often) are
not public: emoji at the paper's size stand in for them. `data.source_name` is
the line that puts another source in their place. `:smoke` trains two steps of
a tiny one.
"""

from __future__ import annotations

import math

import ml_collections

from configs import common
from configs.emoji import data
from unclip_jax.utils import config as config_lib

NUM_PICTURES = 650_000_000  # "~650M images"
EPOCHS = 32  # CLIP
VOCAB_SIZE = 49_408  # CLIP: BPE
CONTEXT_LENGTH = 77  # CLIP's code; not stated by the paper


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  config.name = "clip"
  config.data = data.emoji(quick=False, smoke=arg.smoke, image_size=256)
  config.data.source.image_size = 256
  config.data.preprocess.context_length = CONTEXT_LENGTH

  config.task_name = "unclip_jax.tasks.clip"
  config.task = dict(
    loss_type="softmax",
    max_logit_scale=100.0,  # CLIP, section 2.5
  )
  config.model_name = "unclip_jax.models.clip"
  config.model = dict(
    image_size=256,  # "ViT-H/16 @ 256x256"
    patch_size=16,
    vision_width=1280,  # "width 1280"
    vision_depth=32,  # "32 blocks"
    vision_num_heads=16,  # our choice: ViT-H (Dosovitskiy et al. 2020)
    vocab_size=VOCAB_SIZE,
    context_length=CONTEXT_LENGTH,
    text_width=1024,  # "width 1024"
    text_depth=24,  # "24 blocks"
    text_num_heads=16,  # our choice: heads of 64, as in CLIP
    embed_dim=1024,  # section 2.2: "319 ... out of the original 1,024"
    activation="quick_gelu",  # CLIP's code
    logit_scale_init=math.log(1 / 0.07),  # CLIP
    remat="full",
    scan=True,
    dtype="bfloat16",
  )

  config.batch_size = 32_768  # CLIP
  config.num_steps = EPOCHS * NUM_PICTURES // config.batch_size
  config.ema_decay = 0.0  # none: evaluated are the parameters themselves
  config.eval_every_steps = 10_000

  config.optim.learning_rate = 3e-4  # "lr 3e-4"
  config.optim.warmup_steps = 2000  # CLIP
  config.optim.schedule = "cosine"  # CLIP
  config.optim.weight_decay = 0.2  # CLIP
  config.optim.b1 = 0.9  # CLIP
  config.optim.b2 = 0.98  # CLIP
  config.optim.eps = 1e-6  # CLIP
  config.optim.clip_norm = None  # none is stated
  # "SAM rho = 0.1, perturbation applied independently by each replica, replica
  # batch 64". A device sees its replicas one after another, so that there are
  # no other microbatches; without SAM, set config.num_microbatches.
  config.optim.sam_rho = 0.1
  config.optim.sam_replica_batch = 64
  # Our choice: with SAM from step 0 small ones of ours do not begin to learn
  # (ablations/clip_sam.py).
  config.optim.sam_start_step = config.optim.warmup_steps

  config.evals = dict(
    retrieval=dict(
      type="unclip_jax.evaluators.retrieval", pred="embed", max_examples=512
    ),
    zero_shot=dict(
      type="unclip_jax.evaluators.zero_shot", pred="embed", max_examples=512
    ),
  )
  if arg.smoke:
    config.data.source.image_size = config.data.preprocess.image_size = 32
    config.model.image_size = 32
    config.model.vision_width = config.model.text_width = 16
    config.model.vision_depth = config.model.text_depth = 1
    config.model.vision_num_heads = config.model.text_num_heads = 2
    config.model.vocab_size = 1024
    config.model.embed_dim = 16
    config.optim.sam_replica_batch = 2
    config.optim.sam_start_step = 1
    common.smoke(config)
  return config
