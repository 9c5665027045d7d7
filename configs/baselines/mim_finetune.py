"""A masked generative transformer on captioned emoji, from configs/.../mim.py.

  unclip train --config configs/baselines/mim_finetune.py \
    --workdir runs/baselines/mim_finetune \
    --config.frozen.tokenizer.path=runs/baselines/dvae \
    --config.init_from.path=runs/baselines/mim

MaskGIT (Chang et al. 2022, arXiv 2202.04200) with a caption, as in Muse (Chang
et al. 2023, arXiv 2301.00704). The transformer comes from masked image
modelling, of pixels or of codes; new are the embedding of codes in place of the
stem, the text encoder, the cross-attention to it and the output. AdamW at 1e-4
with layer-wise decay (configs/finetune.py); the best checkpoint by the held-out
loss is kept, and the run ends when that has not fallen five times in a row.

`:features=DIR` ends with the Frechet distance of held-out pictures in the space
of a converted Inception or of a CLIP. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import finetune
from configs.baselines import mim
from configs.emoji import data
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, features="", smoke=False)
  config = mim.get_config("smoke" if arg.smoke else None)
  config.name = "mim_finetune"
  config.init_from.path = "" if arg.smoke else "runs/baselines/mim"
  config.init_from.names = r"^params\.(block_\d+\.|ln_final\.|position$)"

  config.task_name = "unclip_jax.tasks.maskgit"
  config.task = dict(
    text_drop_prob=0.1,
    label_smoothing=0.1,
    sample_options=dict(
      guidance_scale=2.0,
      num_sample_steps=8,
      temperature=1.0,
      choice_temperature=4.5,
    ),
  )
  del config.model.channels, config.model.attention_resolutions  # of the stem
  mim.add_tokenizer(config, arg.smoke)
  config.model.update(
    inputs="tokens",
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,
    text_width=16 if arg.smoke else 192,
    text_depth=1 if arg.smoke else 2,
    text_num_heads=2 if arg.smoke else 6,
    dropout=0.1,
  )

  config.optim.learning_rate = 1e-4
  config.optim.b2 = 0.999
  config.optim.rules = finetune.layer_decay(
    config.model.depth,
    0.75,
    below=(r"^position$",),
    fresh=(r"\.(norm_cross|cross_attn)\.",),
  )
  # Few captioned pictures: the run ends when the held-out loss rises.
  config.checkpoint.best.metric = "eval/loss/loss"
  config.checkpoint.best.patience = 5
  if not arg.smoke:
    config.eval_every_steps = 250
    config.evals.samples.every_steps = 1000
  if arg.features:
    config.evals.fid = dict(
      type="unclip_jax.evaluators.fid",
      pred="sample",
      features=arg.features,
      split="validation",
      batch_size=50,
      every_steps=config.num_steps,
    )
  return config
