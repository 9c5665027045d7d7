"""BERT as an upstream model: it encodes texts, and is trained by others.

Its weights are converted (interop/bert_hf.py). Tasks that read text take it as
`config.frozen.text`, or its arrays by `config.init_from`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from unclip_jax.tasks import base


@dataclasses.dataclass(frozen=True)
class Task:
  """Encodes texts; the hooks of training it has not."""

  model: nn.Module
  upstream: Mapping[str, Any]

  def encode_text(
    self,
    variables: base.Variables,
    text_tokens: jax.Array,
    text_mask: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """`text_embed` [B, D] and `text_encodings` [B, L, D].

    The pooled first state; without a pooler the first state itself.
    """
    text_encodings, out = self.model.apply(variables, text_tokens, text_mask)
    return out.get("text_embed", text_encodings[:, 0]), text_encodings

  def predict_fns(self) -> dict[str, base.PredictFn]:
    def embed(
      variables: base.Variables,
      frozen: base.Frozen,
      batch: base.Batch,
      rng: jax.Array,
    ) -> dict[str, jax.Array]:
      del frozen, rng
      text_embed, text_encodings = self.encode_text(
        variables, batch["text_tokens"], batch["text_mask"]
      )
      return {"text_embed": text_embed, "text_encodings": text_encodings}

    return {"embed": embed}
