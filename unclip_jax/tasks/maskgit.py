"""A masked generative transformer draws a picture from a caption.

MaskGIT (Chang et al. 2022, arXiv 2202.04200), and from captions Muse (Chang et
al. 2023, arXiv 2301.00704). Training (MaskGIT, section 3.1): a random share of
a picture's codes is masked, cos(pi/2 u) of them with u uniform, and predicted
from the others and the caption. Drawing (section 3.2): all codes are masked at
first; in each of a few steps all masked ones are drawn at once, the most
probable are kept and the others masked again, so that after step i of T the
share cos(pi/2 i / T) is left (`decode_parallel`).

Guidance is that of the logits (Muse, section 2.7): a share of captions is
dropped in training.

Deviations: Muse trains a second network for a finer grid, and guides ever more
from step to step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import decoding
from unclip_jax.diffusion import draws
from unclip_jax.tasks import base, image_tokens, mim, priors
from unclip_jax.utils import errors

# (tokens [B, P] int32, is_masked [B, P] bool) -> logits [B, P, V]
LogitsFn = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
  """Predicts masked codes of a picture from the others and a caption.

  Attributes:
    text_drop_prob: share of captions dropped in training; 0.1 in Muse.
    label_smoothing: in training; 0.1 in MaskGIT.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  text_drop_prob: float = 0.1
  label_smoothing: float = 0.1
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False
  direction = "text_to_image"

  def __post_init__(self) -> None:
    if self.model.inputs != "tokens" or self.model.vocab_size is None:
      raise errors.UserError(
        "this task needs a network of tokens with captions: set "
        "config.model.inputs to 'tokens', and vocab_size"
      )
    image_tokens.check_tokenizer(self)

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    del frozen
    shape = (len(batch["text_tokens"]), self.model.num_patches)
    return self.model.init(
      rng,
      jnp.zeros(shape, jnp.int32),
      jnp.zeros(shape, bool),
      batch["text_tokens"],
      batch["text_mask"],
    )

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
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
    """Nats per masked code (MaskGIT, equation 1)."""
    del step
    drop_rng, share_rng, mask_rng, dropout_rng = draws.split(rng, 4)
    tokens = image_tokens.encode(self, frozen, batch)
    B, P = tokens.shape
    u = draws.draw(jax.random.uniform, share_rng, (B, 1))
    num_masked = jnp.maximum(1, jnp.ceil(jnp.cos(0.5 * jnp.pi * u) * P))
    is_masked = mim.draw_masks(mask_rng, (B, P), num_masked)
    text_mask = batch["text_mask"]
    if train:
      drop = draws.bernoulli(drop_rng, self.text_drop_prob, (B, 1))
      text_mask = text_mask & ~drop
    logits, _ = self.model.apply(
      variables,
      tokens,
      is_masked,
      batch["text_tokens"],
      text_mask,
      train=train,
      rngs={"dropout": draws.first(dropout_rng)},
    )
    smoothing = self.label_smoothing if train else 0.0
    return mim.token_loss(logits, tokens, is_masked, smoothing)

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
    *,
    guidance_scale: float = 1.0,
    num_sample_steps: int = 8,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    known: jax.Array | None = None,
    is_known: jax.Array | None = None,
    on_step: decoding.OnStep | None = None,
  ) -> dict[str, jax.Array]:
    """Draws pictures for `text_tokens`, `text_mask` of the batch.

    The text runs once, whatever the number of steps.

    Args:
      rng: one key, or one key per caption, [B].
      guidance_scale: uncond + scale (cond - uncond) of the logits; 1 is off.
      num_sample_steps, temperature, choice_temperature, known, is_known,
        on_step: as in `decode_parallel`.

    Returns:
      `image` [B, S, S, 3] in [-1, 1] and `image_tokens` [B, P] int32.

    Raises:
      UserError: an option out of its range.
    """
    is_guided = guidance_scale != 1.0
    text = priors.encode_rows(
      functools.partial(
        self.model.apply, variables, method=self.model.encode_text
      ),
      base.text(batch),
      priors.null_row(batch) if is_guided else None,
    )

    def logits_fn(tokens: jax.Array, is_masked: jax.Array) -> jax.Array:
      if is_guided:
        tokens, is_masked = (
          jnp.concatenate([x, x]) for x in (tokens, is_masked)
        )
      logits = self.model.apply(
        variables, tokens, is_masked, text, method=self.model.predict
      )
      return decoding.guide(logits, guidance_scale) if is_guided else logits

    shape = (len(batch["text_tokens"]), self.model.num_patches)
    tokens, _ = decode_parallel(
      logits_fn,
      rng,
      shape,
      num_sample_steps=num_sample_steps,
      temperature=temperature,
      choice_temperature=choice_temperature,
      known=known,
      is_known=is_known,
      on_step=on_step,
    )
    image = image_tokens.decode(self, frozen, tokens)
    return {"image": image, "image_tokens": tokens}

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
    }


def decode_parallel(
  logits_fn: LogitsFn,
  rng: jax.Array,
  shape: tuple[int, int],
  *,
  num_sample_steps: int,
  temperature: float = 1.0,
  choice_temperature: float = 4.5,
  known: jax.Array | None = None,
  is_known: jax.Array | None = None,
  on_step: decoding.OnStep | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Iterative parallel decoding with the cosine schedule (MaskGIT, 3.2).

  Args:
    logits_fn: the network.
    rng: typed key, or keys [B], one per row.
    shape: (B, P).
    num_sample_steps: T, network calls.
    temperature: divides the logits; 0 takes the most probable code.
    choice_temperature: of the Gumbel noise that is added to the log
      probabilities by which codes are kept, less and less from step to step;
      4.5 in the released code.
    known: [B, P] int32, codes that are given and not drawn.
    is_known: bool, broadcastable to [B, P]: where `known` counts.
    on_step: called on the host with T after every step.

  Returns:
    Codes [B, P] int32, and is_masked [T, B, P] bool: what was still masked
    after each step.

  Raises:
    UserError: an option out of its range.
  """
  T = num_sample_steps
  if T < 1:
    raise errors.UserError(f"num_sample_steps must be 1 or more, not {T}")
  if temperature < 0 or choice_temperature < 0:
    raise errors.UserError(
      f"temperature {temperature} and choice_temperature {choice_temperature} "
      "must be 0 or more"
    )
  is_masked = jnp.ones(shape, bool)
  tokens = jnp.zeros(shape, jnp.int32)
  if known is not None:
    is_masked = ~jnp.broadcast_to(is_known, shape)
    tokens = jnp.where(is_masked, tokens, known)
  num_unknown = is_masked.sum(axis=-1)
  done = np.arange(1, T + 1) / T
  shares = np.cos(0.5 * math.pi * done).astype(np.float32)
  shares[-1] = 0.0  # which rounding may miss

  def body(
    carried: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, ...]
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    tokens, is_masked = carried
    i, share, left_to_do = xs
    token_rng, choice_rng = draws.split(draws.fold_in(rng, i))
    logits = logits_fn(tokens, is_masked).astype(jnp.float32)
    scores = logits
    if temperature > 0:
      noise = draws.draw(jax.random.gumbel, token_rng, logits.shape)
      scores = logits / temperature + noise
    drawn = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    tokens = jnp.where(is_masked, drawn, tokens)

    logp = jnp.take_along_axis(
      jax.nn.log_softmax(logits), tokens[..., None], axis=-1
    )[..., 0]
    noise = draws.draw(jax.random.gumbel, choice_rng, logp.shape)
    confidence = logp + choice_temperature * left_to_do * noise
    confidence = jnp.where(is_masked, confidence, jnp.inf)
    # At least one more is kept in each step.
    left = jnp.minimum(
      jnp.floor(share * num_unknown), is_masked.sum(axis=-1) - 1
    )
    is_masked = mim.ranks(confidence) < left[:, None]
    if on_step is not None:
      jax.debug.callback(lambda _: on_step(T), tokens[0, 0])
    return (tokens, is_masked), is_masked

  (tokens, _), trace = jax.lax.scan(
    body,
    (tokens, is_masked),
    (jnp.arange(T), shares, np.float32(1 - done)),
  )
  return tokens, trace
