r"""Adapters (LoRA) on a trained model of any kind, in place of all its weights.

  unclip train --config configs/lora.py:base=models/x/decoder,pictures=DIR \
    --workdir runs/lora
  unclip convert --from lora --src runs/lora --out models/mine/decoder

`base` is a run folder or a part of a released model, whose own config gives the
task. `pictures` is a folder of yours with captions (unclip_jax/data/folder.py);
without it the base's own data are taken. The run's checkpoints hold the
adapters alone. The second command adds them to the base: with OUT in a copy of
a released model they take the place of that part. More kernels are adapted by
`--config.model.pattern='\.kernel$'`, as a network without attention needs.
"""

from __future__ import annotations

import os

import ml_collections

from configs import common
from configs.emoji import decoder
from unclip_jax import run_folder
from unclip_jax.models import lora
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, base="", pictures="", smoke=False)
  if arg.smoke:
    base = decoder.get_config("smoke")
  elif arg.base:
    base = run_folder.load_config(arg.base).unlock()
  else:
    raise errors.UserError(
      "name the model to adapt: --config configs/lora.py:base=FOLDER"
    )
  config = common.base()
  config.name = "lora"
  config.data = data(base, arg.base, arg.pictures)
  config.evals = base.get("evals") or dict(
    loss=dict(type="unclip_jax.evaluators.mean", pred="loss", max_examples=256)
  )
  if arg.pictures:
    common.evaluate_on(config, "train")  # nothing is held out
  config.frozen.base = dict(path=arg.base)

  config.task_name = "unclip_jax.tasks.lora"
  config.task = ml_collections.ConfigDict()
  config.model_name = "unclip_jax.models.lora"
  config.model = dict(rank=8, alpha=8.0, pattern=lora.Model.pattern)

  config.num_steps = 1000
  config.batch_size = 16
  config.ema_decay = 0.99
  config.optim.schedule = "constant"
  config.eval_every_steps = 500
  config.checkpoint.every_steps = 500
  if arg.smoke:
    config.frozen.base.untrained = base
    common.smoke(config)
  return config


def data(
  base: ml_collections.ConfigDict, folder: str, pictures: str
) -> ml_collections.ConfigDict:
  """`config.data`: the base's own, or the pictures as the base takes them.

  Args:
    base: config of the model in `folder`.
    pictures: a folder; "" = the base's own data.
  """
  if not pictures and "data" in base:
    return base.data
  if not pictures:
    raise errors.UserError(
      f"'{folder}' was converted, and names no data: give yours, as in "
      f"--config FILE:...,pictures=FOLDER"
    )
  preprocess = base.data.preprocess if "data" in base else _sizes(base, folder)
  return ml_collections.ConfigDict(
    dict(
      source_name="unclip_jax.data.folder",
      source=dict(folder=pictures, holdout=0.0, flippable=False),
      preprocess=preprocess,
      tokenizer=None,
      max_broken=0.05,
      stored_arrays=True,
    )
  )


def _sizes(base: ml_collections.ConfigDict, folder: str) -> dict[str, int]:
  """Fields of Preprocess for a converted model, told by the networks' own."""
  if "clip" in base.frozen:
    path = os.path.join(folder, base.frozen.clip.path)
    clip = run_folder.load_config(path).model
    return dict(
      image_size=base.model.get("image_size", clip.image_size),
      clip_image_size=clip.image_size,
      context_length=clip.context_length,
    )
  size = base.model.image_size
  if "context_length" in base.model:  # a CLIP
    return dict(image_size=size, context_length=base.model.context_length)
  return dict(image_size=size, low_res_size=size // base.task.get("scale", 4))
