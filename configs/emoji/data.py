"""The emoji dataset as the four stages read it (unclip_jax/data/emoji.py)."""

from __future__ import annotations

# What `make quickstart` trains on: 300 to 400 pictures.
QUICK_GROUPS = ("animals", "nature", "food")

CONTEXT_LENGTH = 26  # tokens; the longest plain caption has as many
VOCAB_SIZE = 1024


def emoji(*, quick: bool, smoke: bool, **preprocess) -> dict:
  """`config.data`.

  Args:
    quick: only QUICK_GROUPS, and no picture held out.
    smoke: synthetic pictures in place of emoji; nothing is prepared.
    **preprocess: fields of unclip_jax.data.preprocess.Preprocess.
  """
  preprocess = dict(context_length=CONTEXT_LENGTH, **preprocess)
  if smoke:
    return dict(
      source_name="unclip_jax.data.synthetic",
      source=dict(image_size=64),
      preprocess=preprocess,
      tokenizer=None,
      max_broken=0.05,  # share of broken records; more of them stop the run
      stored_arrays=True,  # embeddings and the like, where records have them
    )
  source = dict(data_dir=None, image_size=64, groups=None, holdout=10.0)
  if quick:
    source.update(groups=QUICK_GROUPS, holdout=0.0)
  return dict(
    source_name="unclip_jax.data.emoji",
    source=source,
    preprocess=preprocess,
    tokenizer=None,
    max_broken=0.05,  # share of broken records; more of them stop the run
    stored_arrays=True,  # embeddings and the like, where records have them
  )
