"""A bidirectional transformer that fills in what is masked of a picture.

Three uses of one trunk, whose blocks have the same names in all of them:

  masked image modelling   patches of pixels are masked; their pixels (MAE, He
                           et al. 2022, arXiv 2111.06377) or their codes (BEiT,
                           Bao et al. 2022, arXiv 2106.08254) are predicted
  masked generation        codes are masked and predicted: MaskGIT (Chang et
                           al. 2022, arXiv 2202.04200)
  ... from a caption       with cross-attention to a text encoder's states:
                           Muse (Chang et al. 2023, arXiv 2301.00704)

Before the transformer of pixels stands a convolutional residual stem with
attention (Xiao et al. 2021, arXiv 2106.14881, for stems). Convolutions see
beyond a patch, so pixels are masked before them, as in SimMIM (Xie et al. 2022,
arXiv 2111.09886), and a channel says which. Both halves of MAE's
encoder-decoder, which leaves masked patches out of the encoder, would need that
no layer looks across patches.

Cross-attention ends in a zero-initialised layer: a trunk that has been trained
without captions is, at the start with them, the same function.
"""

from __future__ import annotations

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import (
  attention,
  cross_attention,
  linear,
  norms,
  resnet,
  text_encoder,
  transformer,
)
from unclip_jax.utils import errors

INPUTS = ("image", "tokens")
# Keys and values of the text's states, of each block.
Text = tuple[cross_attention.Prefix, ...]


def to_patches(image: jax.Array, patch_size: int) -> jax.Array:
  """[B, S, S, 3] -> [B, P, patch_size^2 * 3], in raster order."""
  return einops.rearrange(
    image, "b (h i) (w j) c -> b (h w) (i j c)", i=patch_size, j=patch_size
  )


def to_image(patches: jax.Array, patch_size: int) -> jax.Array:
  """The inverse of `to_patches`; pictures are square."""
  return einops.rearrange(
    patches,
    "b (h w) (i j c) -> b (h i) (w j) c",
    h=round(patches.shape[1] ** 0.5),
    i=patch_size,
    j=patch_size,
  )


class Stem(nn.Module):
  """Pixels to patches: residual blocks that halve the picture, attention.

  Attributes:
    patch_size: pixels of a patch's side, a power of 2.
    width: of the result.
    channels: of the first convolution; doubled by each halving.
    attention_resolutions: sizes, in pixels, at which attention stands.
    num_heads: of the attention.
    dtype: compute dtype.
  """

  patch_size: int
  width: int
  channels: int
  attention_resolutions: tuple[int, ...]
  num_heads: int
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array, is_masked: jax.Array) -> jax.Array:
    """[B, S, S, 3] in [-1, 1] and [B, P] bool -> [B, P, width]."""
    if self.patch_size & (self.patch_size - 1):
      raise errors.UserError(
        f"patch_size {self.patch_size} must be a power of 2: the stem halves "
        "the picture"
      )
    S, p = image.shape[1], self.patch_size
    mask = einops.repeat(
      is_masked, "b (h w) -> b (h i) (w j) 1", h=S // p, i=p, j=p
    )
    fill = self.param("mask_pixel", nn.initializers.normal(0.02), (3,))
    x = jnp.where(mask, fill, image)
    x = jnp.concatenate([x, mask.astype(x.dtype)], axis=-1)
    x = resnet.conv3x3(self.channels, dtype=self.dtype, name="conv_in")(x)
    for level in range(p.bit_length() - 1):
      x = resnet.ResBlock(
        self.channels << (level + 1),
        resample="down",
        dtype=self.dtype,
        name=f"down_{level}",
      )(x, None)
      if x.shape[1] in self.attention_resolutions:
        y = norms.GroupNorm(dtype=self.dtype, name=f"attn_norm_{level}")(x)
        y, _ = attention.SelfAttention(
          x.shape[-1], self.num_heads, dtype=self.dtype, name=f"attn_{level}"
        )(einops.rearrange(y, "b h w c -> b (h w) c"))
        x = x + y.reshape(x.shape)
    x = nn.silu(norms.GroupNorm(dtype=self.dtype, name="norm_out")(x))
    x = linear.Dense(self.width, dtype=self.dtype, name="proj")(x)
    return einops.rearrange(x, "b h w d -> b (h w) d")


class Model(nn.Module):
  """The trunk with what stands before and behind it.

  Attributes:
    image_size: S, pixels of a side.
    patch_size: pixels of a side that a patch or a code stands for.
    width, depth, num_heads: of the transformer.
    num_codes: codes are 0 to num_codes - 1, and what is predicted are codes;
      None: pixels.
    inputs: "image", whose patches are masked, or "tokens": codes.
    channels, attention_resolutions: of the stem, where the input is a picture.
    vocab_size: text tokens are 0 to vocab_size - 1; None: no captions.
    context_length: the longest text, in tokens.
    text_width, text_depth, text_num_heads: of the text encoder.
    mlp_ratio: hidden width of the MLPs, in widths.
    dropout: rate in the residual branches, when training.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  num_codes: int | None = None
  inputs: str = "image"
  channels: int = 32
  attention_resolutions: tuple[int, ...] = ()
  vocab_size: int | None = None
  context_length: int = 0
  text_width: int = 0
  text_depth: int = 0
  text_num_heads: int = 1
  mlp_ratio: float = 4
  dropout: float = 0.0
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  @property
  def grid_size(self) -> int:
    """Patches of a side."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    """P."""
    return self.grid_size**2

  def setup(self) -> None:
    if self.image_size % self.patch_size:
      raise errors.UserError(
        f"image_size {self.image_size} is not a multiple of patch_size "
        f"{self.patch_size}: change one of them"
      )
    if self.inputs not in INPUTS:
      raise errors.UserError(
        f"config.model.inputs '{self.inputs}' is not one of {', '.join(INPUTS)}"
      )
    if self.inputs == "tokens" and self.num_codes is None:
      raise errors.UserError(
        "a network of tokens needs config.model.num_codes: that of the "
        "tokenizer"
      )
    normal = nn.initializers.normal(0.02)
    if self.inputs == "image":
      self.stem = Stem(
        self.patch_size,
        self.width,
        self.channels,
        self.attention_resolutions,
        self.num_heads,
        dtype=self.dtype,
      )
    else:
      # The last row stands for "masked".
      self.code_embed = nn.Embed(
        self.num_codes + 1, self.width, embedding_init=normal, dtype=self.dtype
      )
    self.position = self.param(
      "position", normal, (self.num_patches, self.width)
    )
    block = transformer.Block
    if self.vocab_size is not None:
      block = cross_attention.CrossBlock
      self.text_encoder = text_encoder.TextEncoder(
        self.vocab_size,
        self.context_length,
        self.text_width,
        self.text_depth,
        self.text_num_heads,
        dtype=self.dtype,
      )
    self.block = [
      block(
        self.width,
        self.num_heads,
        self.mlp_ratio,
        dropout=self.dropout,
        dtype=self.dtype,
      )
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)
    # Zero: a new network predicts grey, or every code with one probability.
    self.output = linear.Dense(
      self.num_codes or self.patch_size**2 * 3,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
    )

  def __call__(
    self,
    x: jax.Array,
    is_masked: jax.Array,
    text_tokens: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    *,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Predicts all patches from those that are not masked, in one pass.

    Args:
      x: [B, S, S, 3] in [-1, 1], or tokens [B, P] int32; what is masked of it
        has no influence.
      is_masked: [B, P] bool.
      text_tokens: [B, L] int32, where there is a vocab_size.
      text_mask: [B, L] bool, True = real token; a caption without any is the
        null caption.
      train: whether dropout is on.

    Returns:
      Logits [B, P, num_codes], or pixels [B, P, patch_size^2 * 3], float32,
      and the final states {"encodings": [B, P, D]}.
    """
    context = None
    if self.vocab_size is not None:
      context = self.text_encoder(text_tokens, text_mask)
    return self._run(x, is_masked, context=context, train=train)

  def encode_text(self, text_tokens: jax.Array, text_mask: jax.Array) -> Text:
    """What `predict` needs of the text; arguments as in `__call__`."""
    context = self.text_encoder(text_tokens, text_mask)
    return tuple(
      cross_attention.Prefix(None, block.encode_context(context))
      for block in self.block
    )

  def predict(
    self, x: jax.Array, is_masked: jax.Array, text: Text | None = None
  ) -> jax.Array:
    """`__call__` with the text from `encode_text`, without the states."""
    return self._run(x, is_masked, prefixes=text)[0]

  def _run(
    self,
    x: jax.Array,
    is_masked: jax.Array,
    *,
    prefixes: Text | None = None,
    context: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    if self.inputs == "image":
      x = self.stem(x, is_masked)
    else:
      x = self.code_embed(jnp.where(is_masked, self.num_codes, x))
    x = x + self.position.astype(x.dtype)
    x, _ = transformer.run(
      self.block,
      x,
      prefixes=prefixes,
      context=context,
      train=train,
      remat=self.remat,
      scan=self.scan,
    )
    x = self.ln_final(x)
    return self.output(x).astype(jnp.float32), {"encodings": x}
