"""CLIP (Radford et al. 2021): a ViT and a causal text transformer.

The towers are those of the released code and weights: a class token, learned
positions, pre-LN blocks, a LayerNorm before and after the vision blocks,
bias-free projections; text is pooled at its last real token.

Deviations: every residual branch starts at zero (layers/transformer.py), and
padded text positions are masked as keys. Causality already hides right padding
from real tokens, so with foreign weights only the states at padded positions,
which nobody may read, differ.

A model may lack one of the towers: Karlo's text-to-image weights hold the text
tower alone.

Sizes (Radford et al. 2021, table 20; OpenCLIP's from H/14 on; unCLIP's from its
Appendix C, heads and context our choice). An MLP is 4 widths but where a width
is given:

                image patch | vision: width depth heads MLP | text: w  d  h
  ViT-B/32        224    32 |           768    12    12      |   512 12  8
  ViT-B/16        224    16 |           768    12    12      |   512 12  8
  ViT-L/14    224/336    14 |          1024    24    16      |   768 12 12
  ViT-H/14        224    14 |          1280    32    16      |  1024 24 16
  ViT-g/14        224    14 |          1408    40    16 6144 |  1024 24 16
  ViT-bigG/14     224    14 |          1664    48    16 8192 |  1280 32 20
  unCLIP          256    16 |          1280    32    16      |  1024 24 16
"""

from __future__ import annotations

import math
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from unclip_jax.layers import attention, embeddings, linear, norms, transformer
from unclip_jax.utils import errors


class VisionTower(nn.Module):
  """ViT (Dosovitskiy et al. 2020) in CLIP's variant; fields as in `Model`."""

  image_size: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  embed_dim: int
  mlp_ratio: float = 4
  activation: str = "gelu"
  image_mean: tuple[float, ...] | None = None
  image_std: tuple[float, ...] | None = None
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    if self.image_size % self.patch_size:
      raise errors.UserError(
        f"CLIP's image_size {self.image_size} is not a multiple of its "
        f"patch_size {self.patch_size}: change one of them"
      )
    num_patches = (self.image_size // self.patch_size) ** 2
    # Positions and class token start at width^-1/2, as in the released code.
    normal = nn.initializers.normal(self.width**-0.5)
    self.patch_embed = nn.Conv(
      self.width,
      (self.patch_size, self.patch_size),
      strides=self.patch_size,
      padding="VALID",
      use_bias=False,
      kernel_init=linear.lecun_normal,
      dtype=self.dtype,
    )
    self.class_token = self.param("class_token", normal, (self.width,))
    self.position = self.param(
      "position", normal, (1 + num_patches, self.width)
    )
    self.ln_pre = norms.LayerNorm(dtype=self.dtype)
    self.block = [
      transformer.Block(
        self.width,
        self.num_heads,
        self.mlp_ratio,
        self.activation,
        dtype=self.dtype,
      )
      for _ in range(self.depth)
    ]
    self.ln_post = norms.LayerNorm(dtype=self.dtype)
    self.projection = linear.Dense(
      self.embed_dim, use_bias=False, dtype=self.dtype
    )

  def __call__(
    self, image: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[B, S, S, 3] -> image_embed [B, embed_dim], {"image_encodings"}."""
    B, H, W, _ = image.shape
    if self.image_size != H or self.image_size != W:
      raise errors.UserError(
        f"CLIP takes pictures of {self.image_size} x {self.image_size} pixels, "
        f"not {H} x {W}: resize them, or change the model's image_size"
      )
    if self.image_mean is not None:
      mean, std = jnp.asarray(self.image_mean), jnp.asarray(self.image_std)
      image = (image.astype(jnp.float32) / 2 + 0.5 - mean) / std
    x = einops.rearrange(self.patch_embed(image), "b h w d -> b (h w) d")
    class_token = jnp.broadcast_to(
      self.class_token.astype(x.dtype), (B, 1, self.width)
    )
    x = jnp.concatenate([class_token, x], axis=1)
    x = self.ln_pre(x + self.position.astype(x.dtype))
    x, _ = transformer.run(
      self.block, x, train=train, remat=self.remat, scan=self.scan
    )
    image_embed = self.projection(self.ln_post(x[:, 0]))
    return image_embed.astype(jnp.float32), {"image_encodings": x}


class TextTower(nn.Module):
  """Causal text transformer (Radford et al. 2019); fields as in `Model`."""

  vocab_size: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  embed_dim: int
  mlp_ratio: float
  activation: str
  remat: bool | str
  scan: bool
  dtype: DTypeLike

  def setup(self) -> None:
    # Standard deviations of the released code.
    self.token_embed = nn.Embed(
      self.vocab_size,
      self.width,
      embedding_init=nn.initializers.normal(0.02),
      dtype=self.dtype,
    )
    self.position = self.param(
      "position",
      nn.initializers.normal(0.01),
      (self.context_length, self.width),
    )
    self.block = [
      transformer.Block(
        self.width,
        self.num_heads,
        self.mlp_ratio,
        self.activation,
        dtype=self.dtype,
      )
      for _ in range(self.depth)
    ]
    self.ln_final = norms.LayerNorm(dtype=self.dtype)
    self.projection = linear.Dense(
      self.embed_dim, use_bias=False, dtype=self.dtype
    )

  def __call__(
    self, text_tokens: jax.Array, text_mask: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[B, L] -> text_embed [B, embed_dim], {"text_encodings": [B, L, D]}."""
    L = text_tokens.shape[1]
    if self.context_length < L:
      raise errors.UserError(
        f"CLIP takes at most {self.context_length} text tokens, not {L}: "
        f"set the tokenizer's context_length to that of the model"
      )
    x = self.token_embed(text_tokens)
    x = x + self.position[:L].astype(x.dtype)
    mask = attention.causal_mask(L) & text_mask[:, None, None, :]
    x, _ = transformer.run(
      self.block, x, mask, train=train, remat=self.remat, scan=self.scan
    )
    x = self.ln_final(x)
    text_embed = self.projection(embeddings.pool_last_valid(x, text_mask))
    return text_embed.astype(jnp.float32), {"text_encodings": x}


class Model(nn.Module):
  """CLIP.

  Attributes:
    image_size: S, height and width of the pictures, in pixels.
    patch_size: side of a patch, in pixels; divides image_size.
    vision_width, vision_depth, vision_num_heads: the ViT. vision_width None:
      there is no vision tower, and nothing about pictures is read.
    vocab_size: text tokens are 0 to vocab_size - 1.
    context_length: the longest text, in tokens.
    text_width, text_depth, text_num_heads: the text transformer. text_width
      None: there is no text tower, and nothing about texts is read.
    embed_dim: size of image_embed and text_embed.
    mlp_ratio: hidden width of the MLPs, in widths.
    vision_mlp_ratio, text_mlp_ratio: those of one tower; None: mlp_ratio.
    activation: "gelu" (exact) or "quick_gelu" (OpenAI's weights).
    image_mean, image_std: RGB means and standard deviations of pictures in
      [0, 1], by which the ViT standardises its own; None: they enter in
      [-1, 1], as they come.
    logit_scale_init: initial log of the scale of the cosines; None: no such
      parameter (Karlo's weights have none).
    logit_bias_init: initial bias of the logits (the sigmoid loss: Zhai et al.
      2023 start at -10); None: no such parameter.
    remat: what the backward pass keeps of each block (layers/remat.py).
    scan: compile one block for the whole stack (layers/transformer.py).
    dtype: compute dtype; parameters are float32.
  """

  image_size: int | None
  patch_size: int | None
  vision_width: int | None
  vision_depth: int | None
  vision_num_heads: int | None
  vocab_size: int | None
  context_length: int | None
  text_width: int | None
  text_depth: int | None
  text_num_heads: int | None
  embed_dim: int
  mlp_ratio: float = 4
  vision_mlp_ratio: float | None = None
  text_mlp_ratio: float | None = None
  activation: str = "gelu"
  image_mean: tuple[float, ...] | None = None
  image_std: tuple[float, ...] | None = None
  logit_scale_init: float | None = math.log(1 / 0.07)
  logit_bias_init: float | None = None
  remat: bool | str = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  def setup(self) -> None:
    if (self.image_mean is None) != (self.image_std is None):
      raise errors.UserError(
        "CLIP's image_mean and image_std go together: set both or neither"
      )
    if self.vision_width is not None:
      self.vision = VisionTower(
        image_size=self.image_size,
        patch_size=self.patch_size,
        width=self.vision_width,
        depth=self.vision_depth,
        num_heads=self.vision_num_heads,
        embed_dim=self.embed_dim,
        mlp_ratio=self.vision_mlp_ratio or self.mlp_ratio,
        activation=self.activation,
        image_mean=self.image_mean,
        image_std=self.image_std,
        remat=self.remat,
        scan=self.scan,
        dtype=self.dtype,
      )
    if self.text_width is not None:
      self.text = TextTower(
        vocab_size=self.vocab_size,
        context_length=self.context_length,
        width=self.text_width,
        depth=self.text_depth,
        num_heads=self.text_num_heads,
        embed_dim=self.embed_dim,
        mlp_ratio=self.text_mlp_ratio or self.mlp_ratio,
        activation=self.activation,
        remat=self.remat,
        scan=self.scan,
        dtype=self.dtype,
      )
    if self.logit_scale_init is not None:
      self.logit_scale = self.param(
        "logit_scale", nn.initializers.constant(self.logit_scale_init), ()
      )
    if self.logit_bias_init is not None:
      self.logit_bias = self.param(
        "logit_bias", nn.initializers.constant(self.logit_bias_init), ()
      )

  def __call__(
    self,
    image: jax.Array,
    text_tokens: jax.Array,
    text_mask: jax.Array,
    *,
    train: bool = False,
  ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Embeds pictures and texts.

    Args:
      image: [B, S, S, 3] in [-1, 1].
      text_tokens: [B, L] int32, L up to context_length.
      text_mask: [B, L] bool, True = real token.
      train: whether this is a training step.

    Returns:
      {"image_embed", "text_embed": [B, embed_dim] float32, not normalised;
      "logit_scale": [], the log; "logit_bias": []}, and the intermediates
      "image_encodings" [B, 1 + P, D] and "text_encodings"; those of them for
      which there are parameters.
    """
    output, out = {}, {}
    if self.vision_width is not None:
      output["image_embed"], image_out = self.encode_image(image, train=train)
      out |= image_out
    if self.text_width is not None:
      output["text_embed"], text_out = self.encode_text(
        text_tokens, text_mask, train=train
      )
      out |= text_out
    if self.logit_scale_init is not None:
      output["logit_scale"] = self.logit_scale
    if self.logit_bias_init is not None:
      output["logit_bias"] = self.logit_bias
    return output, out

  def encode_image(
    self, image: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """image_embed [B, embed_dim], and "image_encodings" before ln_post.

    Raises:
      UserError: there is no vision tower, or pictures of another size.
    """
    self.check_vision()
    return self.vision(image, train=train)

  def encode_text(
    self, text_tokens: jax.Array, text_mask: jax.Array, *, train: bool = False
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """text_embed [B, embed_dim], and "text_encodings" after the final LN.

    Raises:
      UserError: there is no text tower, or texts that are too long.
    """
    if self.text_width is None:
      raise errors.UserError(
        "this CLIP has no text tower: convert a folder that holds both"
      )
    return self.text(text_tokens, text_mask, train=train)

  def check_vision(self) -> None:
    """Raises UserError where there is no vision tower."""
    if self.vision_width is None:
      raise errors.UserError(
        "this CLIP has no vision tower: convert it again with one (unclip "
        "convert --from karlo --image_encoder DIR), or use texts alone"
      )
