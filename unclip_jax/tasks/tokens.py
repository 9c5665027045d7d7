"""A transformer over text tokens and the tokens of a picture: DALL-E's stage 2.

Ramesh et al. 2021 (arXiv 2102.12092), section 2.2. A frozen tokenizer, any
task with `encode_tokens`, `decode_tokens`, `num_codes` and `grid_size`
(tasks/dvae.py is DALL-E's), turns pictures into codes; a network learns to
predict them one after another, given the caption:

  models/token_transformer.py       text and picture in one sequence; it models
                                    both, with weights 1/8 and 7/8
  models/token_encoder_decoder.py   P(picture | caption), or turned round
                                    P(caption | picture): a captioner

The text part of the loss counts real tokens from the second on: neither the
first, which begins every caption, nor padding. For classifier-free guidance,
which came later (Nichol et al. 2021, GLIDE, section 3.1), a share of captions
is replaced by the null caption, which has no tokens.

Deviation: the source divides the sums of text and image losses by the number of
tokens of each kind in the batch; here an example's losses are divided by its
own, so that examples do not depend on each other.
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
from unclip_jax.tasks import base, priors
from unclip_jax.tasks import image_tokens as image_tokens_lib
from unclip_jax.utils import errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Predicts image tokens from a caption, or a caption from image tokens.

  Attributes:
    text_drop_prob: share of captions dropped in training, where they are the
      condition; makes guidance possible.
    text_loss_weight: of the text's cross-entropy where the network models the
      text too; the picture's has the rest of 1. 1/8 in the paper.
    begin_token, end_token: of a caption; read where captions are drawn.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  text_drop_prob: float = 0.1
  text_loss_weight: float = 1 / 8
  begin_token: int = 2
  end_token: int = 3
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False

  def __post_init__(self) -> None:
    image_tokens_lib.check_tokenizer(self)
    for name in ("text_drop_prob", "text_loss_weight"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise errors.UserError(
          f"config.task.{name} {getattr(self, name)} must be in [0, 1]"
        )

  @property
  def direction(self) -> str:
    """ "text_to_image" or "image_to_text", as the network says."""
    return self.model.direction

  @property
  def _draws_image(self) -> bool:
    return self.direction == "text_to_image"

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    B = len(batch["text_tokens"])
    image_tokens = jnp.zeros((B, self.model.grid_size**2), jnp.int32)
    return self.model.init(
      rng, batch["text_tokens"], batch["text_mask"], image_tokens
    )

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    del frozen, batches
    return {}

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
    """Mean cross-entropy in nats per token, of both kinds where both are there.

    Metrics: `image_loss` and `image_accuracy`, `text_loss` and
    `text_accuracy`, of the kinds that the network predicts.
    """
    del step
    drop_rng, dropout_rng = draws.split(rng)
    text_mask = batch["text_mask"]
    if train and self._draws_image:
      drop = draws.bernoulli(drop_rng, self.text_drop_prob, (len(text_mask),))
      text_mask = text_mask & ~drop[:, None]
    parts = self._cross_entropies(
      variables,
      {**batch, "text_mask": text_mask},
      image_tokens_lib.encode(self, frozen, batch),
      train=train,
      rngs={"dropout": draws.first(dropout_rng)},
    )
    metrics, losses = {}, {}
    for kind, (loss, hits, is_real) in parts.items():
      count = jnp.maximum(is_real.sum(axis=-1), 1)
      losses[kind] = (loss * is_real).sum(axis=-1) / count
      metrics[f"{kind}_loss"] = losses[kind]
      metrics[f"{kind}_accuracy"] = (hits * is_real).sum(axis=-1) / count
    if len(losses) == 2:
      w = self.text_loss_weight
      total = w * losses["text"] + (1 - w) * losses["image"]
    else:
      (total,) = losses.values()
    return base.LossOutput(total, metrics, {})

  def _cross_entropies(
    self,
    variables: base.Variables,
    batch: base.Batch,
    image_tokens: jax.Array,
    **options: Any,
  ) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """Kind -> (nats, whether right, whether it counts), [B, tokens] each."""
    text_tokens, text_mask = batch["text_tokens"], batch["text_mask"]
    logits, out = self.model.apply(
      variables, text_tokens, text_mask, image_tokens, **options
    )
    by_kind = {"image" if self._draws_image else "text": logits}
    if "text_logits" in out:
      by_kind["text"] = out["text_logits"]
    targets = {
      "image": (image_tokens, jnp.ones_like(image_tokens, bool)),
      "text": (text_tokens[:, 1:], text_mask[:, 1:]),
    }
    parts = {}
    for kind, logits in by_kind.items():
      tokens, is_real = targets[kind]
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
      parts[kind] = (loss, jnp.argmax(logits, axis=-1) == tokens, is_real)
    return parts

  def log_likelihood(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """`log_likelihood` [B] in nats: ln P(image tokens | caption).

    Of a captioner ln P(caption | image tokens). Its probabilities are those of
    all tokens of an example together.
    """
    del rng
    image_tokens = image_tokens_lib.encode(self, frozen, batch)
    parts = self._cross_entropies(variables, batch, image_tokens)
    loss, _, is_real = parts["image" if self._draws_image else "text"]
    return {"log_likelihood": -(loss * is_real).sum(axis=-1)}

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    image_tokens: jax.Array | None = None,
    num_known_rows: int = 0,
    on_step: decoding.OnStep | None = None,
  ) -> dict[str, jax.Array]:
    """Draws pictures for captions, or captions for pictures.

    Args:
      batch: `text_tokens`, `text_mask` [B, L]; for captions or where rows are
        known `image` [B, S, S, 3], unless `image_tokens` are given.
      rng: one key, or one key per example, [B].
      guidance_scale: of the caption; 1 is off.
      temperature, top_k, top_p, on_step: as in decoding.sample.
      image_tokens: [B, K] int32, in place of the codes of `image`.
      num_known_rows: image completion (figure 6 of the source): the first rows
        of the grid are kept as they are.

    Returns:
      `image` [B, S, S, 3] in [-1, 1] and `image_tokens` [B, K] int32; or
      `text_tokens` [B, L] int32 and `text_mask` [B, L] bool, which begin with
      `begin_token` and end with `end_token`, zeros behind it.

    Raises:
      UserError: an option out of its range, or of the other direction.
    """
    if image_tokens is not None:
      batch = {**batch, "image_tokens": image_tokens}
    draw = functools.partial(
      decoding.sample,
      functools.partial(
        self.model.apply, variables, method=self.model.decode_step
      ),
      rng=rng,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      on_step=on_step,
    )
    if self._draws_image:
      known = self._known(frozen, batch, num_known_rows)
      logits, cache = priors.encode_rows(
        functools.partial(
          self.model.apply, variables, method=self.model.prefill
        ),
        base.text(batch),
        priors.null_row(batch) if guidance_scale != 1.0 else None,
      )
      tokens = draw(
        logits,
        cache,
        num_tokens=self.model.grid_size**2,
        guidance_scale=guidance_scale,
        **known,
      )
      return {
        "image": image_tokens_lib.decode(self, frozen, tokens),
        "image_tokens": tokens,
      }
    if guidance_scale != 1.0 or num_known_rows:
      raise errors.UserError(
        "guidance_scale and num_known_rows are options of drawing pictures: "
        "leave them out where captions are drawn"
      )
    image_tokens = image_tokens_lib.encode(self, frozen, batch)
    first = jnp.full(len(image_tokens), self.begin_token, jnp.int32)
    logits, cache = self.model.apply(
      variables, image_tokens, first, method=self.model.prefill_text
    )
    tokens = draw(logits, cache, num_tokens=self.model.context_length - 1)
    text_tokens, text_mask = decoding.up_to_end(
      jnp.concatenate([first[:, None], tokens], axis=1), self.end_token
    )
    return {"text_tokens": text_tokens, "text_mask": text_mask}

  def _known(
    self, frozen: base.Frozen, batch: base.Batch, num_rows: int
  ) -> dict[str, jax.Array]:
    """`known` and `is_known` of decoding.sample; nothing where none is."""
    S = self.model.grid_size
    if not 0 <= num_rows <= S:
      raise errors.UserError(
        f"num_known_rows {num_rows} must be in [0, {S}], rows of image tokens"
      )
    if num_rows == 0:
      return {}
    if not {"image", "image_tokens"} & set(batch):
      raise errors.UserError(
        "num_known_rows needs the picture that is to be completed: give "
        "image_tokens, or `image` in the batch"
      )
    return {
      "known": image_tokens_lib.encode(self, frozen, batch),
      "is_known": jnp.arange(S * S) < num_rows * S,
    }

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
      "log_likelihood": self.log_likelihood,
    }
