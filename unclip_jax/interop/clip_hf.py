"""CLIP in the folders of transformers, both ways.

Read are CLIPModel, and CLIPTextModelWithProjection and its vision counterpart
(transformers/models/clip): config.json, model.safetensors or pytorch_model.bin,
whole or in parts, and the tokenizer. Karlo's text_encoder/ and image_encoder/
are the latter two; together they make one CLIP. What is written is read by
`from_pretrained`, with the tensors that came in, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from absl import logging

from unclip_jax import model_folder, tensor_files
from unclip_jax.data import tokenizers
from unclip_jax.interop import clip as clip_parts
from unclip_jax.interop import correspondence, parts
from unclip_jax.interop.correspondence import Pair, conv, dense, norm, same
from unclip_jax.models import clip
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors

# Towers by the "model_type" of a config.json, in the order of `write`.
_TOWERS = {
  "clip": ("text", "vision"),
  "clip_text_model": ("text",),
  "clip_vision_model": ("vision",),
}
_CLASSES = {
  "clip": "CLIPModel",
  "clip_text_model": "CLIPTextModelWithProjection",
  "clip_vision_model": "CLIPVisionModelWithProjection",
}
# Our sizes by their names, in the towers' configs.
_SIZES = {
  "text": {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "text_width": "hidden_size",
    "text_depth": "num_hidden_layers",
    "text_num_heads": "num_attention_heads",
    "embed_dim": "projection_dim",
  },
  "vision": {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vision_width": "hidden_size",
    "vision_depth": "num_hidden_layers",
    "vision_num_heads": "num_attention_heads",
    "embed_dim": "projection_dim",
  },
}
# What a config.json means that leaves a field out.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "text": dict(
    vocab_size=49408,
    max_position_embeddings=77,
    hidden_size=512,
    num_hidden_layers=12,
    num_attention_heads=8,
    intermediate_size=2048,
    projection_dim=512,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
  ),
  "vision": dict(
    image_size=224,
    patch_size=32,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    projection_dim=512,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
  ),
}
_IGNORED = r"(text|vision)_model\.embeddings\.position_ids"


def convert_in(src: str, out: str) -> None:
  """Writes the part of a folder of transformers."""
  parts.write(out, read(src))


def convert_out(model: str, out: str) -> None:
  """Writes the CLIP of a run or a model folder as CLIPModel.

  Raises:
    UserError: it is no CLIP, or no folder of transformers can hold it.
  """
  write(model_folder.open_model(model), out)


def read(*folders: str, tokenizer: str | None = None) -> parts.Part:
  """One CLIP out of the towers that the folders hold.

  Args:
    folders: one for the whole, or one for each tower.
    tokenizer: folder of the tokenizer; None: that of the text tower.

  Raises:
    UserError: a folder holds something else, or is not whole.
  """
  towers: dict[str, dict[str, Any]] = {}
  homes: dict[str, str] = {}
  tensors: dict[str, tensor_files.LazyArray] = {}
  for folder in folders:
    found = _read_config(folder)
    if found.keys() & towers.keys():
      raise errors.UserError(
        f"{' and '.join(folders)} hold the same tower of CLIP: give one of them"
      )
    towers |= found
    homes |= dict.fromkeys(found, folder)
    tensors |= correspondence.find_tensors(folder, ("model", "pytorch_model"))
  where = " and ".join(folders)
  fields = _fields(towers, where)
  assets = {}
  if "vision" in towers:
    fields |= _standardisation(homes["vision"])
  if "text" in towers:
    folder = tokenizer or homes["text"]
    assets = clip_parts.tokenizer_assets(
      folder, vocab_size=fields["vocab_size"], pad_token=_pad_token(folder)
    )
  if len(set(homes.values())) == len(towers):  # towers have no scale
    fields["logit_scale_init"] = None
  return clip_parts.make_part(
    fields, tensors, assets, pairs=pairs, where=where, ignored=_IGNORED
  )


def _read_config(folder: str) -> dict[str, dict[str, Any]]:
  """Tower -> its fields, of a nested or a flat config.json."""
  config = correspondence.read_json(os.path.join(folder, "config.json"))
  kind = config.get("model_type")
  if kind not in _TOWERS:
    raise errors.UserError(
      f"{folder} holds a model of the type {kind!r}, not a CLIP of transformers"
      f" ({', '.join(_TOWERS)})"
    )
  towers = {}
  for tower in _TOWERS[kind]:
    fields = [config]
    if kind == "clip":
      # The last one is of old files, and wins over the one before.
      names = (f"{tower}_config", f"{tower}_config_dict")
      fields = [config.get(name) or {} for name in names]
      fields.append({"projection_dim": config.get("projection_dim", 512)})
    towers[tower] = dict(_DEFAULTS[tower])
    for more in fields:
      if not isinstance(more, Mapping):
        raise errors.UserError(f"{folder}/config.json is damaged: {more!r}")
      towers[tower] |= {k: v for k, v in more.items() if v is not None}
  return towers


def _fields(
  towers: Mapping[str, Mapping[str, Any]], where: str
) -> dict[str, Any]:
  """The fields of models.clip.Model, but for the standardisation."""
  fields: dict[str, Any] = {}
  for tower, given in towers.items():
    found: dict[str, Any] = {
      ours: clip_parts.size(given, theirs, where)
      for ours, theirs in _SIZES[tower].items()
    }
    hidden = clip_parts.size(given, "intermediate_size", where)
    found[f"{tower}_mlp_ratio"] = hidden / found[f"{tower}_width"]
    found["activation"] = given["hidden_act"]
    if found["activation"] not in ("gelu", "quick_gelu"):
      raise errors.UserError(
        f"{where} has hidden_act {found['activation']!r}, and only gelu and"
        " quick_gelu are known here"
      )
    if given["layer_norm_eps"] != 1e-5:
      raise errors.UserError(
        f"{where} has layer_norm_eps {given['layer_norm_eps']!r}, and only 1e-5"
        " is known here"
      )
    for name in found.keys() & fields.keys():
      if found[name] != fields[name]:
        raise errors.UserError(
          f"{where}: the towers have {name} {fields[name]!r} and"
          f" {found[name]!r}: they are not of one CLIP"
        )
    fields |= found
  return fields


def _standardisation(folder: str) -> dict[str, Any]:
  """`image_mean` and `image_std`, as the folder's image processor has them."""
  mean, std = clip_parts.IMAGE_MEAN, clip_parts.IMAGE_STD
  fields: Any = {}
  for name in ("preprocessor_config.json", "processor_config.json"):
    path = os.path.join(folder, name)
    if os.path.isfile(path):
      fields = correspondence.read_json(path)
      fields = fields.get("image_processor", fields)
      break
  else:
    logging.info("%s has no %s: OpenAI's is meant", folder, name)
  return {
    "image_mean": clip_parts.channels(fields, "image_mean", path, mean),
    "image_std": clip_parts.channels(fields, "image_std", path, std),
  }


def _pad_token(folder: str) -> str:
  """What transformers' tokenizer in a folder pads with."""
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    path = os.path.join(folder, name)
    if os.path.isfile(path):
      token = correspondence.read_json(path).get("pad_token")
      if isinstance(token, Mapping):
        token = token.get("content")
      if token:
        return str(token)
  return tokenizers.BPE_END


def write(
  model: model_folder.OpenModel, folder: str, kind: str = "clip"
) -> None:
  """Writes a CLIP, or a tower of it, for transformers' `from_pretrained`.

  A tokenizer of SentencePiece is copied too, but no CLIPTokenizer reads it.

  Args:
    kind: "clip" (CLIPModel), "clip_text_model" or "clip_vision_model" (with
      their projections).

  Raises:
    UserError: the model is no CLIP, lacks a tower, or has a parameter for which
      transformers has no place.
  """
  if model.config.model_name != "unclip_jax.models.clip":
    raise errors.UserError(
      f"this is a model of {model.config.model_name}, not a CLIP: give the"
      " folder of the CLIP, such as MODEL/clip"
    )
  network = config_lib.construct(
    clip.Model, model.config.model, where="config.model"
  )
  towers = _TOWERS[kind]
  for tower in towers:
    if getattr(network, f"{tower}_width") is None:
      raise errors.UserError(f"this CLIP has no {tower} tower to write")
  if kind == "clip" and network.logit_scale_init is None:
    raise errors.UserError(
      "this CLIP has no logit_scale, without which there is no CLIPModel"
    )
  arrays = model.arrays
  if kind != "clip":
    others = {f"{t}_width": None for t in _SIZES if t not in towers}
    network = dataclasses.replace(network, logit_scale_init=None, **others)
    prefix = f"params.{towers[0]}."
    arrays = {k: v for k, v in arrays.items() if k.startswith(prefix)}
  tensors = correspondence.to_theirs(pairs(network), arrays, where="this CLIP")

  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  if "text" in towers:
    for name, asset in tokenizers.load(model.assets_dir).assets().items():
      shutil.copyfile(asset, path / name)
  if "vision" in towers:
    _write_json(path / "preprocessor_config.json", _processor(network))
  tensor_files.write_safetensors(
    path / "model.safetensors", tensors, {"format": "pt"}
  )
  # Last: a folder without it is no model.
  configs = {
    tower: _config(network, tower, model.assets_dir) for tower in towers
  }
  config = {"architectures": [_CLASSES[kind]], "model_type": kind}
  if kind == "clip":
    config["projection_dim"] = network.embed_dim
    config |= {f"{tower}_config": fields for tower, fields in configs.items()}
  else:
    config |= configs[towers[0]]
  _write_json(path / "config.json", config)


def _config(network: clip.Model, tower: str, assets_dir: str) -> dict[str, Any]:
  """A tower's fields in transformers' words."""
  fields = {
    theirs: getattr(network, ours) for ours, theirs in _SIZES[tower].items()
  }
  ratio = getattr(network, f"{tower}_mlp_ratio") or network.mlp_ratio
  fields |= {
    "model_type": f"clip_{tower}_model",
    "intermediate_size": round(fields["hidden_size"] * ratio),
    "hidden_act": network.activation,
    "layer_norm_eps": 1e-5,
  }
  if tower == "text":
    tokenizer = tokenizers.load(assets_dir)
    # The text is pooled at the first eos_token_id.
    fields |= {
      "bos_token_id": tokenizer.bos_id,
      "eos_token_id": tokenizer.eos_id,
      "pad_token_id": tokenizer.pad_id,
    }
  return fields


def _processor(network: clip.Model) -> dict[str, Any]:
  """The image processor that does what our data and the ViT do."""
  size = network.image_size
  half = (0.5,) * 3  # [0, 1] to [-1, 1]
  return {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "size": {"shortest_edge": size},
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(network.image_mean or half),
    "image_std": list(network.image_std or half),
  }


def _write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def pairs(model: clip.Model) -> list[Pair]:
  """transformers' names beside ours, of the towers that there are."""
  found = []
  if model.text_width is not None:
    theirs, ours = "text_model", "params.text"
    embeddings = f"{theirs}.embeddings"
    found += [
      same(
        f"{embeddings}.token_embedding.weight", f"{ours}.token_embed.embedding"
      ),
      same(f"{embeddings}.position_embedding.weight", f"{ours}.position"),
      *_blocks(theirs, ours, model.text_depth),
      *norm(f"{theirs}.final_layer_norm", f"{ours}.ln_final"),
      *dense("text_projection", f"{ours}.projection", bias=False),
    ]
  if model.vision_width is not None:
    theirs, ours = "vision_model", "params.vision"
    embeddings = f"{theirs}.embeddings"
    found += [
      same(f"{embeddings}.class_embedding", f"{ours}.class_token"),
      same(f"{embeddings}.position_embedding.weight", f"{ours}.position"),
      *conv(f"{embeddings}.patch_embedding", f"{ours}.patch_embed", bias=False),
      *norm(f"{theirs}.pre_layrnorm", f"{ours}.ln_pre"),
      *_blocks(theirs, ours, model.vision_depth),
      *norm(f"{theirs}.post_layernorm", f"{ours}.ln_post"),
      *dense("visual_projection", f"{ours}.projection", bias=False),
    ]
  if model.logit_scale_init is not None:
    found.append(same("logit_scale", "params.logit_scale"))
  return found


def _blocks(theirs: str, ours: str, depth: int) -> list[Pair]:
  layers = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
  }
  found = []
  for i in range(depth):
    layer, block = f"{theirs}.encoder.layers.{i}", f"{ours}.block_{i}"
    found += [
      *norm(f"{layer}.layer_norm1", f"{block}.norm_1"),
      *norm(f"{layer}.layer_norm2", f"{block}.norm_2"),
      *dense(f"{layer}.mlp.fc1", f"{block}.mlp.dense_1"),
      *dense(f"{layer}.mlp.fc2", f"{block}.mlp.dense_2"),
    ]
    for their_name, our_name in layers.items():
      found += dense(
        f"{layer}.self_attn.{their_name}", f"{block}.attn.{our_name}"
      )
  return found
