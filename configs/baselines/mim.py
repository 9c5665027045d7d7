"""Masked image modelling on emoji, of pixels or of codes.

  unclip train --config configs/baselines/mim.py --workdir runs/baselines/mim
  unclip train --config configs/baselines/mim.py:target=token \
    --workdir runs/baselines/mim_token

target=pixel: the normalised pixels of masked patches, as in MAE (He et al.
2022, arXiv 2111.06377). target=token: their codes in the tokenizer of
configs/baselines/dvae.py, as in BEiT (Bao et al. 2022, arXiv 2106.08254). The
first of two stages; the second is configs/baselines/mim_finetune.py. `:smoke`
trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.baselines import dvae
from configs.emoji import data
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

TARGETS = ("pixel", "token")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, target="pixel", smoke=False)
  check_target(arg.target)
  has_tokens = arg.target == "token"
  config = common.base()
  config.name = "mim"
  config.data = data.emoji(
    quick=False, smoke=arg.smoke, image_size=32, random_flip=True
  )

  config.task_name = "unclip_jax.tasks.mim"
  config.task = dict(
    # As in the sources: codes tell less of their neighbours.
    mask_ratio=0.4 if has_tokens else 0.75,
    normalize_target=True,
  )
  config.model_name = "unclip_jax.models.mim"
  config.model = dict(
    image_size=32,
    patch_size=4,
    width=192,
    depth=6,
    num_heads=6,
    num_codes=None,
    inputs="image",
    channels=24,
    attention_resolutions=(16,),
    dropout=0.0,
  )
  if has_tokens:
    add_tokenizer(config, arg.smoke)

  config.num_steps = 6000
  config.batch_size = 32
  config.ema_decay = 0.999
  config.optim.learning_rate = 5e-4
  config.optim.weight_decay = 0.05  # MAE, table 8
  config.optim.b2 = 0.95
  config.evals = common.diffusion_evals(("true", "drawn"))

  if arg.smoke:
    smoke(config)
  return config


def check_target(target: str) -> None:
  """Raises UserError unless it is one of TARGETS."""
  if target not in TARGETS:
    raise errors.UserError(
      f"target={target} is not one of {', '.join(TARGETS)}: choose one"
    )


def add_tokenizer(config: ml_collections.ConfigDict, is_smoke: bool) -> None:
  """The dVAE whose codes a model predicts."""
  upstream = dvae.get_config("smoke" if is_smoke else None)
  config.frozen.tokenizer = dict(path="runs/baselines/dvae")
  if is_smoke:
    config.frozen.tokenizer = dict(path="", untrained=upstream)
  config.model.num_codes = upstream.model.num_codes


def smoke(config: ml_collections.ConfigDict) -> None:
  """Two steps of a small transformer."""
  config.model.width = 16
  config.model.depth = 2
  config.model.num_heads = 2
  if "channels" in config.model:
    config.model.channels = 8
    config.model.attention_resolutions = (16,)
  common.smoke(config)
