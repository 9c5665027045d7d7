"""Does sharpness-aware minimisation lower the rank of CLIP's embeddings?

  unclip train --config configs/ablations/clip_sam.py \
    --workdir runs/ablations/clip_sam

Appendix C and section 2.2 of the paper: with SAM (rho 0.1, each replica of 64
examples perturbed by itself) the rank of the embedding space falls
"drastically" while the evaluations improve slightly. Compare `rho=0`, and
`replicas=1` for one perturbation of the whole batch: eval/retrieval, and the
spectrum of the covariance of `image_embed` from the task's "embed".

SAM sets in after `start` steps: from step 0 `:quick` did not leave the loss of
a guess, ln 128, at rho 0.1. On synthetic pictures, a CLIP of width 32 with SAM
for 400 steps after 200 without had the effective rank 3.1 at rho 0.1, 4.0 at
0.02 and 4.7 without (the exponential of the spectrum's entropy), and a loss of
0.61, 0.20 and 0.06 (one seed). A step is five forward and three backward
passes in place of one and one.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_collections

from configs import common
from configs.emoji import clip
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(
    arg, rho=0.1, replicas=2, start=200, quick=False, smoke=False
  )
  config = clip.get_config(common.size(arg))
  config.optim.sam_rho = arg.rho
  config.optim.sam_replica_batch = config.batch_size // arg.replicas
  config.optim.sam_start_step = arg.start
  return config


def sweep(add: Callable[..., None]) -> None:
  add(rho=0.0)
  add(rho=0.1, replicas=1)
  add(rho=0.1, replicas=2)
