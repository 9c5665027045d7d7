"""The five styles as the stages read them (unclip_jax/data/emoji_styles.py)."""

from __future__ import annotations

import ml_collections

CONTEXT_LENGTH = 36  # tokens; the longest plain caption has 35
UNSEEN = "unseen_styles"


def use(config: ml_collections.ConfigDict, *, smoke: bool) -> None:
  """Lets a config of configs/emoji read this dataset.

  What of `config.evals` is named *_unseen sees the split UNSEEN, which the
  synthetic pictures of smoke runs do not have.
  """
  config.data.preprocess.context_length = CONTEXT_LENGTH
  unseen = [name for name in config.evals if name.endswith("_unseen")]
  if smoke:
    for name in unseen:
      del config.evals[name]
    return
  config.data.source_name = "unclip_jax.data.emoji_styles"
  config.data.source.update(styles=None, holdout_styles=10.0, npm_dir=None)
  for name in unseen:
    config.evals[name].split = UNSEEN
