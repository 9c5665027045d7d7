"""The ADM U-Net (Dhariwal & Nichol 2021) with the conditions of unCLIP.

Structure and parameters are those of guided-diffusion and of Karlo's decoder.
Conditions, each optional (Ramesh et al. 2022, section 2.1):

  image_embed     projected and added to the timestep embedding; projected to a
                  few extra context tokens
  text_encodings  the last valid state (or, with a text_embed_dim, text_embed)
                  projected and added to the timestep embedding; all states
                  projected, normalised, context tokens
  text_tokens     in their place, encoded by the network's own text encoder
                  (GLIDE, Nichol et al. 2021, section 4): the last state added,
                  all states context tokens as they are
  low_res         a smaller picture, enlarged, beside x_t's channels
  known, is_known the known part of the picture and where it is, beside them too
                  (GLIDE's network for inpainting)
  x_start         as the network itself predicted it last, beside them too
                  (self-conditioning, Chen et al. 2022, arXiv 2208.04202)

In each attention block the context's keys and values stand before those of the
picture, in one softmax. None of this depends on the timestep:
`encode_condition` computes it once, `denoise` uses it at every step.

Deviations from the sources: without attention_resolutions the middle has no
attention either (as Karlo's upsamplers); dropped text_encodings become one
learned row at every position (Karlo's network, without learned_null_text, is
given the empty text instead), dropped text_tokens an empty caption. Without
attention the network is fully convolutional: it runs on any height and width
that are multiples of patch_size * 2^(levels - 1). With patch_size > 1 the
network sees squares of pixels as channels (Hoogeboom et al. 2023, "simple
diffusion", section 3.4): most of a U-Net's work on small machines is at the
first level, for which that divides the pixels.

Sizes (table 3): decoder 64: channels 512, mult 1,2,3,4, 3 ResBlocks, attention
32,16,8, text encoder 2048 x 24, 32 heads, context 256; 64 -> 256: 320, 1,2,3,4,
3; 256 -> 1024: 192, 1,1,2,2,4,4, 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import (
  attention,
  embeddings,
  linear,
  norms,
  remat,
  resnet,
  text_encoder,
)
from unclip_jax.utils import axes, errors


class Condition(NamedTuple):
  """What all diffusion steps share; None or empty where there is none."""

  emb: jax.Array | None  # [B, D], added to the timestep embedding
  context: Mapping[str, attention.KeyValue]  # attending unit -> its prefix
  mask: jax.Array | None  # [B, M] bool, of the context


class Unit(nn.Module):
  """One step of the U-Net: a ResBlock, or a resampler, then attention.

  Attributes:
    out_channels: channels of the result.
    num_heads: of the attention; 0: no attention.
    has_context: whether the attention takes a context.
    resample: None, "down" or "up".
    resblock_updown: resample in a ResBlock, not by a lone convolution.
    scale_shift_norm, max_groups, dropout, dtype: as in the ResBlock.
  """

  out_channels: int
  num_heads: int
  has_context: bool
  resample: str | None
  resblock_updown: bool
  scale_shift_norm: bool
  max_groups: int
  dropout: float
  dtype: DTypeLike

  def setup(self) -> None:
    if self.resample is not None and not self.resblock_updown:
      self.conv = resnet.Resample(
        self.out_channels, self.resample, dtype=self.dtype
      )
    else:
      self.res = resnet.ResBlock(
        self.out_channels,
        resample=self.resample,
        scale_shift_norm=self.scale_shift_norm,
        max_groups=self.max_groups,
        dropout=self.dropout,
        dtype=self.dtype,
      )
    if self.num_heads:
      self.attn_norm = norms.GroupNorm(self.max_groups, dtype=self.dtype)
      self.attn = attention.SelfAttention(
        self.out_channels,
        self.num_heads,
        has_context=self.has_context,
        dtype=self.dtype,
      )

  def encode_context(self, context: jax.Array) -> attention.KeyValue:
    """The prefix for `__call__` that context tokens [B, M, any size] give."""
    return self.attn.encode_context(context)

  def __call__(
    self,
    x: jax.Array,
    emb: jax.Array,
    prefix: attention.KeyValue | None = None,
    prefix_mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> jax.Array:
    """[B, H, W, C], emb [B, D], prefix_mask [B, M] -> [B, H', W', C']."""
    if self.resample is not None and not self.resblock_updown:
      x = self.conv(x)
    else:
      x = self.res(x, emb, train=train)
    x = _constrain(x)
    if not self.num_heads:
      return x
    _, H, W, _ = x.shape
    mask = None
    if prefix is not None and prefix_mask is not None:
      mask = jnp.pad(prefix_mask, ((0, 0), (0, H * W)), constant_values=True)
      mask = mask[:, None, None, :]
    y = einops.rearrange(self.attn_norm(x), "b h w c -> b (h w) c")
    y, _ = self.attn(y, mask, prefix=prefix)
    return _constrain(x + einops.rearrange(y, "b (h w) c -> b h w c", h=H))


class Model(nn.Module):
  """The U-Net.

  Attributes:
    image_size: of the pictures trained on, in pixels; places the attention.
    out_channels: of the output (6 for RGB with learned variance).
    channels: of the first level.
    channel_mult: channels of each level, in `channels`.
    num_res_blocks: per level on the way down; one more on the way up.
    attention_resolutions: levels with attention, by their height at
      image_size, in patches; () = none, also not in the middle.
    head_channels: size of an attention head.
    image_embed_dim: size of image_embed; None: not conditioned on it.
    num_image_embed_tokens: context tokens made of image_embed.
    learned_null_image_embed: a dropped image_embed becomes a learned vector;
      False: zero. The paper allows both (section 2.1).
    text_width: size of the text states; None: not conditioned on them.
    text_embed_dim: size of a text_embed that is added to the timestep embedding
      in place of the last valid text state; None: that state.
    learned_null_text: whether there is a null state for text_encodings that are
      dropped.
    text_encoder: fields of layers.text_encoder.TextEncoder (vocab_size,
      context_length, width, depth, num_heads), which encodes text_tokens in
      place of text states; None: there is none.
    context_width: size of the context tokens; None: of the timestep embedding,
      or, with a text_encoder, of its states.
    inpainting: whether the network sees known and is_known.
    self_conditioning: whether the network sees its estimate of x_start.
    patch_size: side of the squares of pixels that become one position.
    dropout: rate in the ResBlocks, when training.
    scale_shift_norm: see ResBlock.
    max_groups: of the norms (layers.norms.num_groups).
    low_res_resize: "bilinear" or "bicubic", how low_res is enlarged.
    resblock_updown: resample in ResBlocks, not by lone convolutions.
    remat: what the backward pass keeps of each unit (layers/remat.py).
    dtype: compute dtype; parameters are float32.
  """

  image_size: int
  out_channels: int
  channels: int
  channel_mult: tuple[int, ...]
  num_res_blocks: int
  attention_resolutions: tuple[int, ...]
  head_channels: int = 64
  image_embed_dim: int | None = None
  num_image_embed_tokens: int = 4
  learned_null_image_embed: bool = True
  text_width: int | None = None
  text_embed_dim: int | None = None
  learned_null_text: bool = True
  text_encoder: Mapping[str, Any] | None = None
  context_width: int | None = None
  inpainting: bool = False
  self_conditioning: bool = False
  patch_size: int = 1
  dropout: float = 0.0
  scale_shift_norm: bool = True
  max_groups: int = 32
  low_res_resize: str = "bilinear"
  resblock_updown: bool = True
  remat: bool | str = False
  dtype: DTypeLike = jnp.float32

  @property
  def context_length(self) -> int | None:
    """Tokens that the network's own text encoder reads; None: it has none."""
    return self.text_encoder and self.text_encoder["context_length"]

  def setup(self) -> None:
    self._check_fields()
    self._setup_conditions()
    self.conv_in = resnet.conv3x3(self.channels, dtype=self.dtype)
    self.time_embed = embeddings.TimestepEmbedding(
      self.channels, 4 * self.channels, dtype=self.dtype
    )
    # Parameters are named level by level: down_0_0, ..., mid_1, up_0_0, ...
    last = len(self.channel_mult) - 1
    self.down = [
      [self._unit(level) for _ in range(self.num_res_blocks)]
      + ([self._unit(level, resample="down")] if level < last else [])
      for level in range(last + 1)
    ]
    self.mid = [
      self._unit(last, attend=bool(self.attention_resolutions)),
      self._unit(last, attend=False),
    ]
    self.up = [
      [self._unit(level) for _ in range(self.num_res_blocks + 1)]
      + ([self._unit(level, resample="up")] if level > 0 else [])
      for level in range(last + 1)
    ]
    self.norm_out = norms.GroupNorm(self.max_groups, dtype=self.dtype)
    # Zero: a new network predicts 0.
    self.conv_out = resnet.conv3x3(
      self.out_channels * self.patch_size**2,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
    )

  def __call__(
    self,
    x_t: jax.Array,
    timesteps: jax.Array,
    *,
    image_embed: jax.Array | None = None,
    text_embed: jax.Array | None = None,
    text_encodings: jax.Array | None = None,
    text_tokens: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    low_res: jax.Array | None = None,
    known: jax.Array | None = None,
    is_known: jax.Array | None = None,
    x_start: jax.Array | None = None,
    image_embed_drop: jax.Array | None = None,
    text_drop: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts from a noised picture and its conditions.

    Args:
      x_t: [B, H, W, C], noised.
      timesteps: [B] int32 of the full schedule, 0 = least noise.
      image_embed: [B, image_embed_dim].
      text_embed: [B, text_embed_dim].
      text_encodings: [B, L, text_width].
      text_tokens: [B, L] int32.
      text_mask: [B, L] bool, True = real token; None: all are.
      low_res: [B, h, w, C] in [-1, 1].
      known: [B, H, W, C] in [-1, 1], of which the network sees what is known;
        None: nothing is.
      is_known: [B, H, W, 1] bool, goes with `known`.
      x_start: [B, H, W, C], the estimate; None: zeros.
      image_embed_drop: [B] bool, True = as if there were no image_embed.
      text_drop: [B] bool, True = as if there were no text.
      train: whether dropout is on.

    Returns:
      model_output [B, H, W, out_channels] float32, and {"mid": the state at
      the lowest resolution}.

    Raises:
      UserError: a condition is missing or unknown to this network, or the
        picture's size does not fit its levels.
    """
    condition = self.encode_condition(
      image_embed=image_embed,
      text_embed=text_embed,
      text_encodings=text_encodings,
      text_tokens=text_tokens,
      text_mask=text_mask,
      image_embed_drop=image_embed_drop,
      text_drop=text_drop,
    )
    x = self._stack(x_t, low_res, known, is_known, x_start)
    return self._run(x, timesteps, condition, train)

  def encode_condition(
    self,
    *,
    image_embed: jax.Array | None = None,
    text_embed: jax.Array | None = None,
    text_encodings: jax.Array | None = None,
    text_tokens: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    image_embed_drop: jax.Array | None = None,
    text_drop: jax.Array | None = None,
  ) -> Condition:
    """What `denoise` needs of the conditions; arguments as in `__call__`."""
    _check_condition("image_embed", image_embed, self.image_embed_dim)
    _check_condition("text_embed", text_embed, self.text_embed_dim)
    _check_condition("text_encodings", text_encodings, self.text_width)
    _check_condition("text_tokens", text_tokens, self.text_encoder)
    embs, tokens, masks = [], [], []

    if image_embed is not None:
      image_embed = embeddings.replace_dropped(
        image_embed, self.null_image_embed, image_embed_drop
      )
      embs.append(self.image_embed_time_proj(image_embed))
      if self.attention_resolutions:
        image_tokens = einops.rearrange(
          self.image_embed_tokens_proj(image_embed),
          "b (m d) -> b m d",
          m=self.num_image_embed_tokens,
        )
        tokens.append(image_tokens)
        masks.append(jnp.ones(image_tokens.shape[:2], bool))

    if text_encodings is not None:
      if text_mask is None:
        text_mask = jnp.ones(text_encodings.shape[:2], bool)
      if text_drop is not None:
        text_mask = text_mask | text_drop[:, None]
      text_encodings = embeddings.replace_dropped(
        text_encodings, self.null_text_encodings, text_drop
      )
      if text_embed is None:
        text_embed = embeddings.pool_last_valid(text_encodings, text_mask)
      embs.append(self.text_time_proj(text_embed))
      if self.attention_resolutions:
        tokens.append(self.text_ln(self.text_tokens_proj(text_encodings)))
        masks.append(text_mask)

    if text_tokens is not None:
      if text_mask is None:
        text_mask = jnp.ones(text_tokens.shape, bool)
      if text_drop is not None:
        text_mask = text_mask & ~text_drop[:, None]
      encodings = self.text(text_tokens, text_mask)
      embs.append(self.text_time_proj(encodings[:, -1]))
      if self.attention_resolutions:
        tokens.append(encodings)
        masks.append(jnp.ones(text_tokens.shape, bool))

    if not tokens:
      return Condition(sum(embs) if embs else None, {}, None)
    context = jnp.concatenate(tokens, axis=1)
    context = axes.constrain(context, "batch", "length", "width")
    return Condition(
      emb=sum(embs),
      context={
        unit.name: unit.encode_context(context)
        for unit in self._units()
        if unit.num_heads
      },
      mask=jnp.concatenate(masks, axis=1),
    )

  def denoise(
    self,
    x_t: jax.Array,
    timesteps: jax.Array,
    condition: Condition,
    *,
    low_res: jax.Array | None = None,
    known: jax.Array | None = None,
    is_known: jax.Array | None = None,
    x_start: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """The output of `__call__`, given what `encode_condition` returned."""
    x = self._stack(x_t, low_res, known, is_known, x_start)
    return self._run(x, timesteps, condition, train)[0]

  def _stack(
    self,
    x_t: jax.Array,
    low_res: jax.Array | None,
    known: jax.Array | None,
    is_known: jax.Array | None,
    x_start: jax.Array | None,
  ) -> jax.Array:
    """x_t and what the network sees beside it, along the channels."""
    B, H, W, _ = x_t.shape
    channels = [x_t]
    if low_res is not None:
      size = (B, H, W, low_res.shape[-1])
      channels.append(jax.image.resize(low_res, size, self.low_res_resize))
    if known is not None and not self.inpainting:
      raise errors.UserError(
        "this U-Net was not built for inpainting: do not pass known, or set "
        "inpainting in the model's config"
      )
    if self.inpainting:
      if known is None:
        known, is_known = jnp.zeros_like(x_t), jnp.zeros((B, H, W, 1), bool)
      channels += [jnp.where(is_known, known, 0.0), is_known]
    if self.self_conditioning:
      channels.append(jnp.zeros_like(x_t) if x_start is None else x_start)
    return jnp.concatenate([x.astype(self.dtype) for x in channels], axis=-1)

  def _run(
    self,
    x: jax.Array,
    timesteps: jax.Array,
    condition: Condition,
    train: bool,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The network proper, on what `_stack` returned."""
    _, H, W, _ = x.shape
    p = self.patch_size
    multiple = p * 2 ** (len(self.channel_mult) - 1)
    if H % multiple or W % multiple:
      raise errors.UserError(
        f"a U-Net of {len(self.channel_mult)} levels takes heights and widths "
        f"that are multiples of {multiple}, not {H} x {W}"
      )
    emb = self.time_embed(timesteps)
    if condition.emb is not None:
      emb = emb + condition.emb

    def call(
      unit: Unit, x: jax.Array, emb: jax.Array, condition: Condition
    ) -> jax.Array:
      prefix = condition.context.get(unit.name)
      return unit(x, emb, prefix, condition.mask, train=train)

    call = remat.checkpoint(call, self.remat, nn.remat)

    x = einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
    x = _constrain(self.conv_in(x))
    skips = [x]
    for level in self.down:
      for unit in level:
        x = call(unit, x, emb, condition)
        skips.append(x)
    for unit in self.mid:
      x = call(unit, x, emb, condition)
    out = {"mid": x}
    for level in reversed(self.up):
      for unit in level:
        if unit.resample is None:
          x = jnp.concatenate([x, skips.pop()], axis=-1)
        x = call(unit, x, emb, condition)
    x = self.conv_out(nn.silu(self.norm_out(x)))
    x = einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=p, q=p)
    return x.astype(jnp.float32), out

  def _units(self) -> Iterator[Unit]:
    for level in self.down:
      yield from level
    yield from self.mid
    for level in self.up:
      yield from level

  def _unit(
    self, level: int, *, attend: bool | None = None, resample: str | None = None
  ) -> Unit:
    """A unit of a level; `attend` overrides attention_resolutions."""
    channels = self.channels * self.channel_mult[level]
    if attend is None:
      attend = (
        resample is None and self._height(level) in self.attention_resolutions
      )
    if attend and channels % self.head_channels:
      raise errors.UserError(
        f"{channels} channels attend at level {level}, which is not a "
        f"multiple of head_channels {self.head_channels}: change one of them"
      )
    return Unit(
      out_channels=channels,
      num_heads=channels // self.head_channels if attend else 0,
      has_context=self._is_conditioned,
      resample=resample,
      resblock_updown=self.resblock_updown,
      scale_shift_norm=self.scale_shift_norm,
      max_groups=self.max_groups,
      dropout=self.dropout,
      dtype=self.dtype,
    )

  def _height(self, level: int) -> int:
    """Of a level, in patches, at image_size."""
    return self.image_size // self.patch_size // 2**level

  @property
  def _is_conditioned(self) -> bool:
    conditions = (self.image_embed_dim, self.text_width, self.text_encoder)
    return any(condition is not None for condition in conditions)

  def _setup_conditions(self) -> None:
    """Null embeddings, projections and the encoder of the conditions."""
    normal = nn.initializers.normal(0.02)
    time_width = 4 * self.channels
    context_width = self.context_width or time_width
    if self.text_encoder is not None:
      context_width = self.text_encoder["width"]
      self.text = text_encoder.TextEncoder(
        **self.text_encoder, remat=self.remat, dtype=self.dtype
      )
      self.text_time_proj = linear.Dense(time_width, dtype=self.dtype)
    if self.image_embed_dim is not None:
      null_shape = (self.image_embed_dim,)
      if self.learned_null_image_embed:
        self.null_image_embed = self.param(
          "null_image_embed", normal, null_shape
        )
      else:
        self.null_image_embed = jnp.zeros(null_shape)
      self.image_embed_time_proj = linear.Dense(time_width, dtype=self.dtype)
      self.image_embed_tokens_proj = linear.Dense(
        self.num_image_embed_tokens * context_width, dtype=self.dtype
      )
    if self.text_width is not None:
      self.null_text_encodings = None
      if self.learned_null_text:
        self.null_text_encodings = self.param(
          "null_text_encodings", normal, (self.text_width,)
        )
      self.text_time_proj = linear.Dense(time_width, dtype=self.dtype)
      self.text_tokens_proj = linear.Dense(context_width, dtype=self.dtype)
      self.text_ln = norms.LayerNorm(dtype=self.dtype)

  def _check_fields(self) -> None:
    sizes = [self._height(i) for i in range(len(self.channel_mult))]
    unknown = set(self.attention_resolutions) - set(sizes)
    if unknown:
      raise errors.UserError(
        f"attention_resolutions {sorted(unknown)} are no level of this U-Net: "
        f"at image_size {self.image_size} its levels are {sizes}"
      )
    if self.text_encoder is not None and (
      self.text_width is not None or self.context_width is not None
    ):
      raise errors.UserError(
        "a U-Net with a text_encoder of its own takes no text states, and its "
        "context is as wide as that: leave out text_width and context_width"
      )
    if self.text_embed_dim is not None and (
      self.text_width is None or self.learned_null_text
    ):
      raise errors.UserError(
        "a U-Net takes a text_embed beside text states whose null is that of "
        "the empty text: set text_width, and learned_null_text to False"
      )


def _constrain(x: jax.Array) -> jax.Array:
  """[B, H, W, C], in its place on the mesh."""
  return axes.constrain(x, "batch", "height", None, None)


def _check_condition(name: str, value: jax.Array | None, field: Any) -> None:
  """A network that was built for a condition gets it, and no other does.

  Args:
    field: of the model, which is None where it was not built for it.
  """
  if (value is None) == (field is None):
    return
  if value is None:
    raise errors.UserError(
      f"this U-Net is conditioned on {name}: pass it (dropped, if unknown)"
    )
  raise errors.UserError(
    f"this U-Net is not conditioned on {name}: do not pass it, or change the "
    f"model's config"
  )
