"""Captioning: P(caption | picture), a token after the other.

Maximum likelihood of the captions (Vinyals et al. 2015, arXiv 1411.4555,
equation 1), with label smoothing as an option (Szegedy et al. 2016, arXiv
1512.00567, section 7). A caption is drawn, or searched for with beams
(decoding.py).

The picture is seen by a frozen CLIP (`config.frozen.clip`), or by a tower that
is a part of the model and starts as a CLIP's: `config.init_from` with
names="^params\\.vision\\.". config.optim.rules may slow or freeze it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from unclip_jax import decoding
from unclip_jax.diffusion import draws
from unclip_jax.tasks import base
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Captions the pictures `image` of the CLIP's, or the tower's, size.

  Attributes:
    label_smoothing: share of the target that is spread over all tokens, in
      training only.
    begin_token, end_token, pad_token: ids as the data's tokenizer writes them.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  label_smoothing: float = 0.0
  begin_token: int = 2
  end_token: int = 3
  pad_token: int = 0
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False
  direction = "image_to_text"

  def __post_init__(self) -> None:
    if ("clip" in self.upstream) != (self.model.vision_tower is None):
      raise errors.UserError(
        "a captioner sees by config.frozen.clip or by a tower of its own,"
        " config.model.vision_tower: set one of them"
      )
    if not 0.0 <= self.label_smoothing < 1.0:
      raise errors.UserError(
        "config.task.label_smoothing must be in [0, 1), not"
        f" {self.label_smoothing}"
      )

  @property
  def image_size(self) -> int:
    """Pixels of a side of the pictures that are captioned."""
    if self.model.vision_tower is None:
      return self.upstream["clip"].image_size
    return self.model.vision_tower["image_size"]

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    return self.model.init(
      rng, batch["text_tokens"], **self._picture(frozen, batch)
    )

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    del frozen, batches
    return {}

  def _picture(
    self, frozen: base.Frozen, batch: base.Batch
  ) -> dict[str, jax.Array]:
    """What the network sees of the pictures."""
    if self.model.vision_tower is not None:
      return {"image": batch["image"]}
    clip = self.upstream["clip"].model
    image_embed, out = clip.apply(
      frozen["clip"], batch["image"], method=clip.encode_image
    )
    encodings = out["image_encodings"]
    return {"image_embed": image_embed, "image_encodings": encodings}

  def loss(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    step: jax.Array,
    train: bool,
  ) -> base.LossOutput:
    """Mean cross-entropy of a caption's real tokens, in nats per token.

    The begin is given and not counted, the end is counted.
    """
    del step
    text_tokens, text_mask = batch["text_tokens"], batch["text_mask"]
    logits, _ = self.model.apply(
      variables,
      text_tokens,
      **self._picture(frozen, batch),
      train=train,
      rngs={"dropout": draws.first(rng)},
    )
    targets, is_real = text_tokens[:, 1:-1], text_mask[:, 1:-1]
    labels = jax.nn.one_hot(targets, logits.shape[-1])
    if train:
      labels = optax.smooth_labels(labels, self.label_smoothing)
    is_right = jnp.argmax(logits, axis=-1) == targets

    def mean(x: jax.Array) -> jax.Array:
      return jnp.sum(jnp.where(is_real, x, 0.0), 1) / jnp.sum(is_real, 1)

    metrics = {
      "accuracy": mean(is_right),
      "log_prob": log_prob(logits, text_tokens, text_mask),
    }
    loss = mean(optax.softmax_cross_entropy(logits, labels))
    return base.LossOutput(loss, metrics, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 0.0,
    on_step: decoding.OnStep | None = None,
  ) -> dict[str, jax.Array]:
    """Captions for `image` [B, S, S, 3] of the batch.

    Args:
      rng: one key, or one key per picture, [B].
      temperature, top_k, top_p, on_step: as in decoding.sample.
      num_beams: 1 draws; more give the best caption of a beam search, which
        draws nothing.
      length_penalty: as in decoding.beam_search.

    Returns:
      `text_tokens` [B, L] int32 and `text_mask` [B, L] bool as a tokenizer
      writes them, and `log_prob` [B], the natural logarithm of the probability
      that the network gives the caption (at temperature 1, of all tokens).

    Raises:
      UserError: an option out of its range, or that a beam search has not.
    """
    picture = self._picture(frozen, batch)
    apply = functools.partial(self.model.apply, variables)
    begin = jnp.full(batch["image"].shape[0], self.begin_token, jnp.int32)
    logits, cache = apply(begin, **picture, method=self.model.prefill)
    decode_fn = functools.partial(apply, method=self.model.decode_step)
    num_tokens = self.model.context_length - 2
    if num_beams == 1:
      tokens = decoding.sample(
        decode_fn,
        logits,
        cache,
        rng,
        num_tokens=num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        on_step=on_step,
      )
    else:
      if (temperature, top_k, top_p) != (1.0, None, None):
        raise errors.UserError(
          "a beam search draws nothing: leave out temperature, top_k and top_p,"
          " or set num_beams to 1"
        )
      tokens = decoding.beam_search(
        decode_fn,
        logits,
        cache,
        num_beams=num_beams,
        num_tokens=num_tokens,
        end_token=self.end_token,
        pad_token=self.pad_token,
        length_penalty=length_penalty,
        on_step=on_step,
      ).tokens[:, 0]
    text_tokens, text_mask = self._caption(begin, tokens)
    logits, _ = apply(text_tokens, **picture)
    return {
      "text_tokens": text_tokens,
      "text_mask": text_mask,
      "log_prob": log_prob(logits, text_tokens, text_mask),
    }

  def _caption(
    self, begin: jax.Array, tokens: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """text_tokens and text_mask [B, L] of tokens [B, L - 2].

    Up to the first end, or with one behind them.
    """
    end = jnp.full_like(begin, self.end_token)
    whole = jnp.concatenate([begin[:, None], tokens, end[:, None]], axis=1)
    return decoding.up_to_end(whole, self.end_token, self.pad_token)

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
    }


def log_prob(
  logits: jax.Array, text_tokens: jax.Array, text_mask: jax.Array
) -> jax.Array:
  """log P(caption | picture) [B], in nats.

  Args:
    logits: [B, L - 2, V] of text_tokens[:, 1:-1].
    text_tokens, text_mask: [B, L].
  """
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, text_tokens[:, 1:-1]
  )
  return -jnp.sum(jnp.where(text_mask[:, 1:-1], losses, 0.0), axis=1)
