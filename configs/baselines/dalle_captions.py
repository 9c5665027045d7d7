"""Captions for pictures: the encoder-decoder of DALL-E turned round.

  unclip train --config configs/baselines/dalle_captions.py \
    --workdir runs/baselines/dalle_captions \
    --config.frozen.tokenizer.path=runs/baselines/dvae

The network of configs/baselines/dalle_encoder_decoder.py reads a picture's
codes and writes its caption. `:smoke` trains two steps.
"""

from __future__ import annotations

import ml_collections

from configs.baselines import dalle_encoder_decoder


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  config = dalle_encoder_decoder.get_config(arg)
  config.name = "dalle_captions"
  config.model.direction = "image_to_text"
  config.task.text_drop_prob = 0.0  # the caption is no condition
  config.task.sample_options = dict(temperature=0.0)
  del config.evals.samples  # of pictures
  size = (
    dict(max_examples=8, batch_size=8)
    if "smoke" in (arg or "")
    else dict(max_examples=256)
  )
  config.evals.likelihood = dict(
    type="unclip_jax.evaluators.mean", pred="log_likelihood", **size
  )
  config.evals.captions = dict(
    type="unclip_jax.evaluators.captions", pred="sample", **size
  )
  return config
