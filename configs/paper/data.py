"""The paper's pairs of pictures and captions, for which emoji stand in.

The 250M pairs of DALL-E's dataset (Appendix C) are not public. `source_name`
and `source` below are what another dataset replaces.
"""

from __future__ import annotations

# Of the stages' text encoders (Table 3, "Text enc. context"). The CLIP's own
# context may be shorter: it then sees the first tokens.
CONTEXT_LENGTH = 256
VOCAB_SIZE = 49_408  # of CLIP's tokenizer; the paper gives none


def pairs(*, smoke: bool, image_size: int, **preprocess) -> dict:
  """`config.data`.

  Args:
    smoke: synthetic pictures in place of emoji; nothing is prepared.
    image_size: pixels of a side, also of the stored pictures.
    **preprocess: further fields of unclip_jax.data.preprocess.Preprocess.
  """
  config = dict(
    source_name="unclip_jax.data.emoji",
    source=dict(
      data_dir=None,
      image_size=max(image_size, preprocess.get("clip_image_size", 0)),
      groups=None,
      holdout=10.0,
    ),
    preprocess=dict(
      image_size=image_size, context_length=CONTEXT_LENGTH, **preprocess
    ),
    tokenizer=None,
    max_broken=0.05,
    stored_arrays=True,
  )
  if smoke:
    config.update(
      source_name="unclip_jax.data.synthetic", source=dict(image_size=64)
    )
    config["preprocess"]["context_length"] = 32
  return config
