"""The released CLIP of OpenAI: one file, and the list of merges beside it.

The file is a TorchScript archive (torchscript.py reads its tensors and runs
nothing) or a plain dictionary of tensors. It states no sizes: they are read off
the shapes, as in the released code (clip/model.py), where every attention head
has 64 channels, an MLP 4 widths, and the activation is quick_gelu.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from unclip_jax.interop import clip as clip_parts
from unclip_jax.interop import correspondence, parts, torchscript
from unclip_jax.interop.correspondence import (
  Pair,
  conv,
  dense,
  fused_dense,
  norm,
  same,
)
from unclip_jax.models import clip
from unclip_jax.tensor_files import LazyArray
from unclip_jax.utils import errors

HEAD_CHANNELS = 64
PAD_TOKEN = "!"  # its id is 0, with which the released code fills up
# Sizes that the archive holds as tensors.
_IGNORED = r"input_resolution|context_length|vocab_size"


def convert_in(src: str, out: str) -> None:
  """Writes the part of a released file."""
  parts.write(out, read(src))


def read(path: str) -> parts.Part:
  """The CLIP of a file, with the tokenizer that lies beside it.

  Raises:
    UserError: the file holds something else, such as a CLIP with a ResNet; or
      there is no tokenizer.
  """
  if torchscript.is_archive(path):
    tensors = torchscript.read(path)
  else:
    tensors = correspondence.read(path)
  fields = _fields(tensors, path)
  assets = clip_parts.tokenizer_assets(
    os.path.dirname(path) or ".",
    vocab_size=fields["vocab_size"],
    pad_token=PAD_TOKEN,
  )
  return clip_parts.make_part(
    fields, tensors, assets, pairs=pairs, where=path, ignored=_IGNORED
  )


def _fields(tensors: Mapping[str, LazyArray], where: str) -> dict[str, Any]:
  """The fields of models.clip.Model that the shapes tell."""
  if "visual.attnpool.positional_embedding" in tensors:
    raise errors.UserError(
      f"the picture tower of {where} is a ResNet: take one of the ViTs"
    )

  def shape(name: str, ndim: int) -> tuple[int, ...]:
    found = tensors[name].shape if name in tensors else ()
    if len(found) != ndim or not all(found):
      raise errors.UserError(
        f"{where} is no CLIP of OpenAI: it lacks the tensor {name}, or has it"
        " in another shape"
      )
    return found

  def depth(prefix: str) -> int:
    pattern = rf"{prefix}transformer\.resblocks\.(\d+)\.ln_1\.weight"
    return sum(bool(re.fullmatch(pattern, name)) for name in tensors)

  vision_width, _, _, patch_size = shape("visual.conv1.weight", 4)
  num_positions, _ = shape("visual.positional_embedding", 2)
  vocab_size, text_width = shape("token_embedding.weight", 2)
  _, embed_dim = shape("text_projection", 2)
  return dict(
    image_size=patch_size * round((num_positions - 1) ** 0.5),
    patch_size=patch_size,
    vision_width=vision_width,
    vision_depth=depth(r"visual\."),
    vision_num_heads=vision_width // HEAD_CHANNELS,
    vocab_size=vocab_size,
    context_length=shape("positional_embedding", 2)[0],
    text_width=text_width,
    text_depth=depth(""),
    text_num_heads=text_width // HEAD_CHANNELS,
    embed_dim=embed_dim,
    activation="quick_gelu",
    image_mean=clip_parts.IMAGE_MEAN,
    image_std=clip_parts.IMAGE_STD,
  )


def pairs(model: clip.Model) -> list[Pair]:
  """The released names beside ours."""
  text, vision = "params.text", "params.vision"
  found = [
    same("token_embedding.weight", f"{text}.token_embed.embedding"),
    same("positional_embedding", f"{text}.position"),
    *_blocks("transformer", text, model.text_depth),
    *norm("ln_final", f"{text}.ln_final"),
    same("text_projection", f"{text}.projection.kernel"),
    *conv("visual.conv1", f"{vision}.patch_embed", bias=False),
    same("visual.class_embedding", f"{vision}.class_token"),
    same("visual.positional_embedding", f"{vision}.position"),
    *norm("visual.ln_pre", f"{vision}.ln_pre"),
    *_blocks("visual.transformer", vision, model.vision_depth),
    *norm("visual.ln_post", f"{vision}.ln_post"),
    same("visual.proj", f"{vision}.projection.kernel"),
    same("logit_scale", "params.logit_scale"),
  ]
  if model.logit_bias_init is not None:
    found.append(same("logit_bias", "params.logit_bias"))
  return found


def _blocks(theirs: str, ours: str, depth: int) -> list[Pair]:
  found = []
  for i in range(depth):
    layer, block = f"{theirs}.resblocks.{i}", f"{ours}.block_{i}"
    found += [
      *norm(f"{layer}.ln_1", f"{block}.norm_1"),
      *fused_dense(
        (f"{layer}.attn.in_proj_weight", f"{layer}.attn.in_proj_bias"),
        [f"{block}.attn.{name}" for name in ("query", "key", "value")],
      ),
      *dense(f"{layer}.attn.out_proj", f"{block}.attn.out"),
      *norm(f"{layer}.ln_2", f"{block}.norm_2"),
      *dense(f"{layer}.mlp.c_fc", f"{block}.mlp.dense_1"),
      *dense(f"{layer}.mlp.c_proj", f"{block}.mlp.dense_2"),
    ]
  return found
