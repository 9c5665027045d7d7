"""A captioner of emoji, over the CLIP of configs/emoji/clip.py.

  unclip train --config configs/baselines/captioner.py \
    --workdir runs/baselines/captioner --config.frozen.clip.path=runs/emoji/clip

A causal transformer that attends to the patch states of the frozen CLIP (Show
and Tell, Vinyals et al. 2015, with a transformer for the LSTM). Evaluated by
BLEU and CIDEr-D of the captions that a beam search finds, on pictures seen and
held out. 2.5 million parameters. `captioner_tuned.py` trains the tower
on; `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs import common
from configs.emoji import clip, data
from unclip_jax.data import tokenizers
from unclip_jax.utils import config as config_lib


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  arg = config_lib.parse_arg(arg, smoke=False)
  config = common.base()
  upstream = clip.get_config("smoke" if arg.smoke else None)
  config.name = "captioner"
  config.data = data.emoji(
    quick=False,
    smoke=arg.smoke,
    image_size=upstream.model.image_size,
    random_flip=True,
  )
  config.frozen.clip = dict(path="runs/emoji/clip")

  config.task_name = "unclip_jax.tasks.caption"
  config.task = dict(
    label_smoothing=0.1,
    begin_token=tokenizers.BOS,
    end_token=tokenizers.EOS,
    pad_token=tokenizers.PAD,
    sample_options=dict(
      temperature=1.0,
      top_k=None,
      top_p=None,
      num_beams=4,
      length_penalty=0.6,  # Wu et al. 2016, section 7: 0.6 to 0.7
    ),
  )
  config.model_name = "unclip_jax.models.captioner"
  config.model = dict(
    vocab_size=data.VOCAB_SIZE,
    context_length=data.CONTEXT_LENGTH,
    width=192,
    depth=4,
    num_heads=4,
    vision_tower=None,
    dropout=0.1,
  )

  config.num_steps = 4000
  config.batch_size = 64
  config.ema_decay = 0.999
  config.optim.learning_rate = 5e-4
  config.optim.weight_decay = 0.05
  config.optim.b2 = 0.98
  captions = dict(
    type="unclip_jax.evaluators.captions", pred="sample", max_examples=256
  )
  config.evals = dict(
    loss=dict(type="unclip_jax.evaluators.mean", pred="loss", max_examples=256),
    captions=captions,
    captions_train=dict(captions, split="train"),
  )

  if arg.smoke:
    config.model.width = 16
    config.model.depth = 1
    config.model.num_heads = 2
    config.task.sample_options.num_beams = 2
    config.frozen.clip = dict(path="", untrained=upstream)
    common.smoke(config)
  return config
