"""CLIP in the folders of OpenCLIP, as its hub holds them.

open_clip_config.json states the sizes, and the tensors have the names of
OpenAI's release. OpenCLIP can build many other models (its model.py): what is
not a ViT with a class token beside a causal text transformer pooled at its end
of text is refused by the name of the field that says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from unclip_jax.interop import clip as clip_parts
from unclip_jax.interop import clip_openai, correspondence, parts
from unclip_jax.utils import errors

_CONFIG = "open_clip_config.json"
_STEMS = ("open_clip_model", "open_clip_pytorch_model")
# Of each group of fields: what is read. Then what says as much as nothing.
_READ = {
  "model_cfg": "embed_dim vision_cfg text_cfg quick_gelu output_dict "
  "init_logit_scale init_logit_bias",
  "vision_cfg": "image_size layers width patch_size head_width mlp_ratio "
  "patch_dropout",
  "text_cfg": "context_length vocab_size width heads layers mlp_ratio pad_id",
  "preprocess_cfg": "mean std size fill_color",
}
_NEUTRAL = {
  "pool_type": ("tok", "argmax"),
  "pos_embed_type": ("learnable",),
  "proj_type": ("linear",),
  "mode": ("RGB",),
  "interpolation": ("bicubic",),
  "resize_mode": ("shortest",),
}


def convert_in(src: str, out: str) -> None:
  """Writes the part of a folder of OpenCLIP."""
  parts.write(out, read(src))


def read(folder: str) -> parts.Part:
  """The CLIP of a folder, with the tokenizer that lies in it.

  Raises:
    UserError: the folder holds something else, is not whole, or holds a model
      that is no CLIP of this kind.
  """
  path = os.path.join(folder, _CONFIG)
  config = correspondence.read_json(path)
  model = _group(config, "model_cfg", path)
  tensors = correspondence.find_tensors(folder, _STEMS)
  if all(name.startswith("module.") for name in tensors):  # of a training run
    tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
  fields = {
    **_vision_fields(_group(model, "vision_cfg", path), path),
    **_text_fields(_group(model, "text_cfg", path), path),
    **_standardisation(_group(config, "preprocess_cfg", path), path),
    "embed_dim": clip_parts.size(model, "embed_dim", path),
    "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
  }
  if "logit_bias" in tensors:
    fields["logit_bias_init"] = float(model.get("init_logit_bias") or 0)
  assets = clip_parts.tokenizer_assets(
    folder,
    vocab_size=fields["vocab_size"],
    pad_token=clip_openai.PAD_TOKEN,
  )
  return clip_parts.make_part(
    fields, tensors, assets, pairs=clip_openai.pairs, where=folder
  )


def _group(parent: Mapping[str, Any], name: str, path: str) -> dict[str, Any]:
  """A group of fields, of which every one has a place here.

  Raises:
    UserError: one has none; the message names it.
  """
  fields = parent.get(name) or {}
  if not isinstance(fields, Mapping):
    raise errors.UserError(f"{path} is damaged: {name} is {fields!r}")
  for key, value in fields.items():
    is_off = value is None or value is False or value in _NEUTRAL.get(key, ())
    if key not in _READ[name].split() and not is_off:
      raise errors.UserError(
        f"{path}: {name}.{key} {value!r} has no place here, where a CLIP is a"
        " ViT with a class token and a causal text transformer"
      )
  return dict(fields)


def _vision_fields(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
  width = clip_parts.size(fields, "width", path, 768)
  return dict(
    image_size=clip_parts.size(fields, "image_size", path, 224),
    patch_size=clip_parts.size(fields, "patch_size", path, 16),
    vision_width=width,
    vision_depth=clip_parts.size(fields, "layers", path, 12),
    vision_num_heads=width // clip_parts.size(fields, "head_width", path, 64),
    vision_mlp_ratio=_mlp_ratio(fields, width),
  )


def _text_fields(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
  width = clip_parts.size(fields, "width", path, 512)
  return dict(
    vocab_size=clip_parts.size(fields, "vocab_size", path, 49408),
    context_length=clip_parts.size(fields, "context_length", path, 77),
    text_width=width,
    text_depth=clip_parts.size(fields, "layers", path, 12),
    text_num_heads=clip_parts.size(fields, "heads", path, 8),
    text_mlp_ratio=_mlp_ratio(fields, width),
  )


def _mlp_ratio(fields: Mapping[str, Any], width: int) -> float:
  # "4.9231" stands for 8192 / 1664: the hidden width is rounded down.
  return int(width * float(fields.get("mlp_ratio") or 4)) / width


def _standardisation(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
  return dict(
    image_mean=clip_parts.channels(fields, "mean", path, clip_parts.IMAGE_MEAN),
    image_std=clip_parts.channels(fields, "std", path, clip_parts.IMAGE_STD),
  )
