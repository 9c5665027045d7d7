"""What the configs of this folder share: one converted part, trained on.

`:scratch` trains a network of Karlo's sizes anew, as the paper's configs train
theirs (configs/paper).

Karlo's own training: 115 million pairs, a million steps, dropout 0.1 in the
decoder; captions dropped with 0.2 (prior) and 0.3 (decoder), embeddings with
0.1, which the converted part says. Step size and steps are for some hundreds
to thousands of pictures.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import ml_collections

from configs import common, lora
from configs.paper import clip as paper_clip
from unclip_jax import run_folder
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors


def fine_tune(
  arg: str | None,
  part: str,
  smoke: Callable[[], ml_collections.ConfigDict],
  scratch: Callable[[str | None], ml_collections.ConfigDict],
) -> ml_collections.ConfigDict:
  """The config of a run.

  Args:
    arg: of the config's own `get_config`.
    part: folder of the part in a converted model.
    smoke: gives the config of `:smoke`.
    scratch: gives the config of `:scratch`, from the argument of the paper's.
  """
  args = config_lib.parse_arg(
    arg,
    model="",
    pictures="",
    lora=False,
    smoke=False,
    scratch=False,
    mxu=False,
  )
  if args.smoke:
    return smoke()
  if args.scratch:
    return scratch("mxu" if args.mxu else None)
  if not args.model:
    raise errors.UserError(
      "name the converted model and your pictures: --config FILE:model=DIR,"
      "pictures=FOLDER"
    )
  folder = os.path.join(args.model, part)
  if args.lora:
    return lora.get_config(f"base={folder},pictures={args.pictures}")
  base = run_folder.load_config(folder).unlock()
  config = common.base()
  config.name = part
  config.data = lora.data(base, folder, args.pictures)
  config.init_from.path = folder
  for name in ("task_name", "task", "model_name", "model"):
    config[name] = base[name]
  if "clip" in base.frozen:
    config.frozen.clip = dict(path=os.path.join(args.model, "clip"))
  config.model.remat = "full"
  config.num_steps = 2000
  config.batch_size = 32
  config.ema_decay = 0.999
  config.optim.learning_rate = 1e-5
  config.optim.weight_decay = 0.0
  config.eval_every_steps = 500
  config.checkpoint.every_steps = 500
  config.evals = dict(
    loss=dict(
      type="unclip_jax.evaluators.mean",
      pred="loss",
      split="train",  # nothing is held out
      max_examples=256,
    )
  )
  return config


def clip() -> dict:
  """`config.frozen.clip`: a ViT-L/14; before there is one, its shapes."""
  config = paper_clip.get_config()
  config.model.update(
    image_size=224,
    patch_size=14,
    vision_width=1024,
    vision_depth=24,
    vision_num_heads=16,
    text_width=768,
    text_depth=12,
    text_num_heads=12,
    embed_dim=768,
  )
  config.data.preprocess.image_size = 224
  return dict(path="models/karlo/clip", untrained=config)
