"""Does sharpness-aware minimisation lower the rank of CLIP's embeddings?

  unclip train --config configs/ablations/clip_sam.py \
    --workdir runs/ablations/clip_sam

Section 2.2 and Appendix C of the paper: with SAM (rho 0.1, each replica of 64
examples perturbed by itself) the rank of the embedding space falls
"drastically" while the evaluations improve slightly. Compare `rho=0`, and
`replicas=1` for one perturbation of the whole batch: eval/retrieval, and the
spectrum of the covariance of `image_embed` from the task's "embed". A step
costs three to four of the base's.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import clip
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, rho=0.1, replicas=2, quick=False, smoke=False)
  config = clip.get_config(common.size(arg))
  config.optim.sam_rho = arg.rho
  config.optim.sam_replica_batch = config.batch_size // arg.replicas
  return config
