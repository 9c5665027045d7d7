"""The decoder: P(x | z_i, caption) (Ramesh et al. 2022, section 2.1).

A U-Net in the manner of GLIDE draws a small picture from a CLIP image
embedding, which is added to the timestep embedding and gives extra context
tokens, and from the caption: the CLIP's text states or, for a network with a
text encoder of its own, tokens. The embedding and the caption are dropped
independently, with 10 % and 50 % in the paper, for classifier-free guidance.
The variance is learned (hybrid loss, Nichol & Dhariwal 2021).

A network without `image_embed_dim` that encodes tokens itself stands on no
CLIP: it is GLIDE (Nichol et al. 2021, arXiv 2112.10741), which unCLIP's decoder
extends, and draws from P(x | caption).

A network for inpainting is shown a random part of the picture in training
(GLIDE, Nichol et al. 2021, section 4.3), and where nothing is known it is a
plain decoder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unclip_jax.diffusion import draws, samplers
from unclip_jax.diffusion import process as process_lib
from unclip_jax.tasks import base, prior_diffusion, priors
from unclip_jax.tasks import clip as clip_task
from unclip_jax.utils import embedding_space, errors


@dataclasses.dataclass(frozen=True)
class Task:
  """Draws a picture from a CLIP image embedding, a caption, or both.

  What the network takes says the model; there is a `clip` in `upstream` where
  any of it comes from one.

  Attributes:
    process: fields of diffusion.process.Process.
    condition_on: "image_embed", or "text_embed": the CLIP's embedding of the
      caption takes its place in training, and no prior is needed (section
      5.1); wherever an `image_embed` is spoken of, it is that.
    embedding_space: kind of standardisation (utils.embedding_space).
    image_embed_drop_prob: share of embeddings replaced by the null embedding.
    text_drop_prob: share of captions replaced by the null caption.
    known_prob: share of training pictures of which a part is shown to the
      network, where it is one for inpainting.
    sample_options: defaults of `sample`.
  """

  model: nn.Module
  upstream: Mapping[str, Any]
  process: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  condition_on: str = "image_embed"
  embedding_space: str = "mean_std"
  image_embed_drop_prob: float = 0.1
  text_drop_prob: float = 0.5
  known_prob: float = 0.5
  sample_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  batch_coupled = False

  def __post_init__(self) -> None:
    if self.condition_on not in ("image_embed", "text_embed"):
      raise errors.UserError(
        f"config.task.condition_on '{self.condition_on}' is not image_embed or"
        " text_embed"
      )
    is_glide = self.model.image_embed_dim is None and self.model.text_encoder
    if not is_glide and "clip" not in self.upstream:
      raise errors.UserError(
        "this decoder stands on a CLIP's embedding or text states: set"
        " config.frozen.clip, or in the model's config a text_encoder and no"
        " image_embed_dim"
      )

  @property
  def direction(self) -> str | None:
    """See base.StandaloneTask; None: it needs a CLIP, and most a prior."""
    return None if "clip" in self.upstream else "text_to_image"

  @functools.cached_property
  def diffusion(self) -> process_lib.Process:
    return process_lib.Process(
      **{"variance": "learned_range", "clip_x_start": 1.0, **self.process}
    )

  def init(
    self, rng: jax.Array, batch: base.Batch, frozen: base.Frozen
  ) -> base.Variables:
    timesteps = jnp.zeros(batch["image"].shape[:1], jnp.int32)
    return self.model.init(
      rng,
      batch["image"],
      timesteps,
      **self._image(frozen, batch),
      **self._text(frozen, batch),
    )

  def prepare(
    self, frozen: base.Frozen, batches: Iterable[base.Batch]
  ) -> dict[str, base.PyTree]:
    if self.model.image_embed_dim is None:
      return {}
    return prior_diffusion.fit_embedding_space(
      self.embedding_space,
      self.upstream["clip"],
      frozen["clip"],
      batches,
      of=self.condition_on,
    )

  def _image_embed(self, frozen: base.Frozen, batch: base.Batch) -> jax.Array:
    """The condition, standardised.

    A given `image_embed` goes before all, unless it comes from data that have
    `text_embed` too, and that is what the decoder stands on.
    """
    clip, variables = self.upstream["clip"], frozen["clip"]
    if self.condition_on == "text_embed" and (
      "text_embed" in batch or "image_embed" not in batch
    ):
      image_embed, _ = clip_task.text_states(clip, variables, batch)
    else:
      image_embed = clip_task.image_embed(clip, variables, batch)
    return embedding_space.encode(frozen["embedding_space"], image_embed)

  def _image(
    self,
    frozen: base.Frozen,
    batch: base.Batch,
    drop: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """The embedding as the network takes it; {} if it takes none."""
    if self.model.image_embed_dim is None:
      return {}
    image = {"image_embed": self._image_embed(frozen, batch)}
    if drop is not None:
      image["image_embed_drop"] = drop
    return image

  def _text(
    self,
    frozen: base.Frozen,
    batch: base.Batch,
    drop: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    text = clip_task.caption(
      self.upstream.get("clip"),
      frozen.get("clip"),
      batch,
      drop=drop,
      learned_null=self.model.learned_null_text,
      as_tokens=self.model.text_encoder is not None,
    )
    if self.model.text_embed_dim is None:
      text.pop("text_embed", None)
    return text

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
    del step
    image_rng, text_rng, diffusion_rng, dropout_rng, known_rng = draws.split(
      rng, 5
    )
    x_start = batch["image"]
    condition, image_drop, text_drop = {}, None, None
    if train:
      rows = x_start.shape[:1]
      image_drop = draws.bernoulli(image_rng, self.image_embed_drop_prob, rows)
      text_drop = draws.bernoulli(text_rng, self.text_drop_prob, rows)
      if self.model.inpainting:
        condition["known"] = x_start
        condition["is_known"] = draw_is_known(
          known_rng, x_start.shape, self.known_prob
        )
    condition |= self._image(frozen, batch, image_drop)
    condition |= self._text(frozen, batch, text_drop)

    def denoise(
      x_t: jax.Array, timesteps: jax.Array, x_start: jax.Array | None = None
    ) -> jax.Array:
      model_output, _ = self.model.apply(
        variables,
        x_t,
        timesteps,
        x_start=x_start,
        **condition,
        train=train,
        rngs={"dropout": draws.first(dropout_rng)},
      )
      return model_output

    losses = self.diffusion.loss(
      self._as_denoise_fn(denoise),
      x_start,
      diffusion_rng,
      batch.get("timesteps"),
    )
    return base.LossOutput(losses.pop("loss"), losses, {})

  def sample(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array | None,
    *,
    guidance_scale: float = 1.0,
    text_guidance_scale: float | None = None,
    use_image_embed: bool = True,
    use_text: bool = True,
    num_sample_steps: int = 250,
    sampler: str = "ddpm",
    known: jax.Array | None = None,
    is_known: jax.Array | None = None,
    **options: Any,
  ) -> dict[str, jax.Array]:
    """Draws `image` [B, S, S, 3] in [-1, 1].

    The batch gives `text_tokens`, `text_mask`, and for a network that takes it
    either `image_embed` [B, D] in the CLIP's own space or `clip_image`. The
    timestep-independent work (keys and values of the context) runs once.

    Args:
      text_guidance_scale: guides the text by its own scale, and
        `guidance_scale` is the image embedding's (guidance.two_conditions).
      use_image_embed, use_text: False draws as in training when it is dropped.
      known: [B, S, S, 3] in [-1, 1], kept where is_known; a network for
        inpainting sees that part too.
      is_known: [B, S, S, 1] bool.
      **options: of diffusion.process.Process.sample.
    """
    B = len(batch["text_tokens"])
    kept = [(use_image_embed, use_text)]
    if text_guidance_scale is not None:
      kept += [(use_image_embed, False), (False, False)]
    elif guidance_scale != 1.0:
      kept += [(False, False)]
    encoded = self._encode(variables, frozen, batch, kept)
    shown = {}
    if known is not None and self.model.inpainting:
      shown = {"known": known, "is_known": is_known}
      shown = {k: jnp.concatenate([v] * len(kept)) for k, v in shown.items()}

    size = self.model.image_size
    x_0 = self.diffusion.sample(
      self._denoise_fn(variables, encoded, **shown),
      (B, size, size, 3),
      rng,
      sampler=sampler,
      num_sample_steps=num_sample_steps,
      guidance_scale=guidance_scale,
      x_start_mse=frozen.get("x_start_mse"),
      text_guidance_scale=text_guidance_scale,
      known=known,
      is_known=is_known,
      **options,
    )
    return {"image": jnp.clip(x_0, -1.0, 1.0)}

  def invert(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    *,
    use_text: bool = True,
    num_sample_steps: int = 250,
    **options: Any,
  ) -> jax.Array:
    """x_T [B, S, S, 3] from which DDIM draws `batch["image"]` back.

    With the same steps, eta 0 and guidance_scale 1 (section 3.1: the second
    half of the picture's bipartite latent, beside z_i). Other options are
    those of diffusion.process.Process.invert.
    """
    encoded = self._encode(variables, frozen, batch, [(True, use_text)])
    return self.diffusion.invert(
      self._denoise_fn(variables, encoded),
      batch["image"],
      num_sample_steps=num_sample_steps,
      **options,
    )

  def vlb(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    rng: jax.Array,
  ) -> dict[str, jax.Array]:
    """Parts of the bound on -log2 p(x | z_i, caption), as likelihood.Vlb.

    Bits per dimension of pictures of 8-bit levels.
    """
    encoded = self._encode(variables, frozen, batch, [(True, True)])
    bound = self.diffusion.vlb(
      self._denoise_fn(variables, encoded),
      batch["image"],
      rng,
      discrete=True,
      x_start_mse=frozen.get("x_start_mse"),
    )
    return bound._asdict()

  def _denoise_fn(
    self, variables: base.Variables, encoded: base.PyTree, **shown: jax.Array
  ) -> samplers.DenoiseFn:
    """The network, given what `_encode` returned."""

    def denoise(
      x_t: jax.Array, timesteps: jax.Array, x_start: jax.Array | None = None
    ) -> jax.Array:
      return self.model.apply(
        variables,
        x_t,
        timesteps,
        encoded,
        x_start=x_start,
        **shown,
        method=self.model.denoise,
      )

    return self._as_denoise_fn(denoise)

  def _as_denoise_fn(self, denoise: samplers.DenoiseFn) -> samplers.DenoiseFn:
    if self.model.self_conditioning:
      return samplers.SelfConditioned(denoise)
    return denoise

  def _encode(
    self,
    variables: base.Variables,
    frozen: base.Frozen,
    batch: base.Batch,
    kept: Sequence[tuple[bool, bool]],
  ) -> base.PyTree:
    """`encode_condition` of B rows for every (image embedding, text) kept.

    Where neither is kept all rows are equal: one is computed and repeated.
    """
    image = self._image(frozen, batch)
    B = len(batch["text_tokens"])
    parts = []
    for image_embed_kept, text_kept in kept:
      rows = B if image_embed_kept or text_kept else 1
      if text_kept:
        text = self._text(frozen, batch)
      else:
        first = priors.first_row(batch)
        text = _to_rows(rows, self._text(frozen, first, jnp.ones(1, bool)))
      given = {name: x[:rows] for name, x in image.items()}
      if given:
        given["image_embed_drop"] = jnp.full(rows, not image_embed_kept)
      encoded = self.model.apply(
        variables,
        **given,
        **text,
        method=self.model.encode_condition,
      )
      parts.append(_to_rows(B, encoded))
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  def predict_fns(self) -> dict[str, base.PredictFn]:
    return {
      "loss": base.loss_predict_fn(self),
      "sample": functools.partial(self.sample, **self.sample_options),
      "vlb": self.vlb,
    }


def _to_rows(rows: int, tree: base.PyTree) -> base.PyTree:
  """Arrays [1, ...] or [rows, ...] as [rows, ...]."""
  return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:])), tree)


def draw_is_known(
  rng: jax.Array, shape: Sequence[int], known_prob: float
) -> jax.Array:
  """Which pixels of pictures are known: bool [B, H, W, 1].

  Of a share `known_prob` of the pictures a part: with even chances all but a
  rectangle, or nothing but one. Of the others nothing.

  Args:
    shape: of the pictures, [B, H, W, C].
  """
  some_rng, inside_rng, bounds_rng = draws.split(rng, 3)
  B, H, W, _ = shape
  some = draws.bernoulli(some_rng, known_prob, (B, 1, 1, 1))
  inside = draws.bernoulli(inside_rng, 0.5, (B, 1, 1, 1))
  bounds = jnp.sort(draws.draw(jax.random.uniform, bounds_rng, (B, 2, 2)))

  def between(first: jax.Array, last: jax.Array, length: int) -> jax.Array:
    centres = (jnp.arange(length) + 0.5) / length
    return (first < centres) & (centres < last)

  first, last = bounds[..., :1], bounds[..., 1:]
  rows = between(first[:, 0], last[:, 0], H)[:, :, None, None]
  columns = between(first[:, 1], last[:, 1], W)[:, None, :, None]
  return some & ((rows & columns) == inside)
