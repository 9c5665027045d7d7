"""Karlo, the public unCLIP weights (kakaobrain, 2022), both ways.

Two layouts are read. The one of diffusers (`kakaobrain/karlo-v1-alpha` and
`...-image-variations`): a folder for each network with config.json and weights,
and the schedulers' configs. And the original one: three .ckpt files, whose
attention keeps the queries, keys and values of each head together, and
ViT-L-14_stats.th. The first is also written.

A model becomes the parts `clip` (interop/clip_hf.py), `prior`, `decoder` (with
text_proj, the projections of its conditions) and `upsampler_256` (both
super-resolution networks: `first` are its parameters, `last` its collection
`last`). They are run as the project's own, by Karlo's rules: 25 + 25 + 7 steps
of ddpm, guidance 4 and 8, the empty caption in place of a dropped one.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from unclip_jax import model_folder, tensor_files
from unclip_jax.data import tokenizers
from unclip_jax.interop import clip_hf, clip_openai, parts
from unclip_jax.interop import correspondence as corr
from unclip_jax.models import prior as prior_model
from unclip_jax.models import unet as unet_model
from unclip_jax.tensor_files import LazyArray
from unclip_jax.utils import errors, trees

Config = ml_collections.ConfigDict
Arrays = dict[str, LazyArray]

_STEMS = ("diffusion_pytorch_model",)
_TABLE = "tables.embedding_space."
_CLIP = {"clip": {"path": "../clip"}}


# --- Folders ------------------------------------------------------------------


def convert_in(
  src: str, out: str, *, image_encoder: str | None = None
) -> list[str]:
  """Writes every part that a folder in either layout holds.

  Args:
    image_encoder: folder of the CLIP's image tower, such as that of the image
      variations; None: SRC's own, if it has one.

  Returns:
    Names of the parts, in their order.

  Raises:
    UserError: a file is missing or damaged, or is not Karlo's.
  """
  if not os.path.isdir(src):
    raise errors.UserError(f"there is no folder '{src}'")
  if glob.glob(os.path.join(glob.escape(src), "*.ckpt")):
    clip, others = _read_original_clip(src), read_original(src)
  else:
    clip = _read_clip(src, image_encoder)
    readers = {"prior": read_prior, "decoder": read_decoder}
    others = {
      name: read(src)
      for name, read in readers.items()
      # The repository of image variations has no prior.
      if name != "prior" or os.path.isdir(os.path.join(src, name))
    }
    upsampler = read_upsampler(src)
    others[upsampler.config.name] = upsampler
  _check_clip(clip, others)
  fingerprint = parts.write(os.path.join(out, "clip"), clip)
  for name, part in others.items():
    if "clip" in part.config.frozen:
      part.config.frozen.clip.fingerprint = fingerprint
    parts.write(os.path.join(out, name), part)
  return ["clip", *others]


def _read_clip(src: str, image_encoder: str | None) -> parts.Part:
  own = os.path.join(src, "image_encoder")
  if image_encoder is None and os.path.isdir(own):
    image_encoder = own
  towers = [os.path.join(src, "text_encoder")]
  if image_encoder is not None:
    towers.append(image_encoder)
  return clip_hf.read(*towers, tokenizer=os.path.join(src, "tokenizer"))


def _read_original_clip(src: str) -> parts.Part:
  return clip_openai.read(find(src, "ViT-*.pt"))


def _check_clip(clip: parts.Part, others: Mapping[str, parts.Part]) -> None:
  found = (clip.config.model.text_width, clip.config.model.embed_dim)
  for name, part in others.items():
    expected = part.config.model.get("text_width")
    if expected is not None and found != (expected, expected):
      raise errors.UserError(
        f"the {name} takes text states and embeddings of {expected} numbers, "
        f"but this CLIP gives {found[0]} and {found[1]}: it belongs to another "
        "model"
      )


def convert_out(model: str, out: str) -> None:
  """Writes a model folder as diffusers' UnCLIPPipeline reads it.

  With an image tower of the CLIP, also what its image variations need.

  Raises:
    UserError: there is no model, or it is not of Karlo's kind.
  """
  names = [
    name
    for name in sorted(os.listdir(model) if os.path.isdir(model) else [])
    if os.path.isfile(os.path.join(model, name, "config.json"))
  ]
  if not {"clip", "decoder"} <= set(names):
    raise errors.UserError(
      f"there is no whole model in '{model}': it needs the folders clip and "
      "decoder"
    )
  index: dict[str, Any] = {"_class_name": "UnCLIPPipeline"}
  for name in names:
    stored = model_folder.open_model(os.path.join(model, name))
    if name == "clip":
      index |= _write_clip(stored, out)
      continue
    for folder, written in export(name, stored.config, stored.arrays).items():
      path = os.path.join(out, folder)
      os.makedirs(path, exist_ok=True)
      is_scheduler = folder.endswith("_scheduler")
      file = "scheduler_config.json" if is_scheduler else "config.json"
      _write_json(os.path.join(path, file), written.config)
      if written.tensors:
        tensor_files.write_safetensors(
          os.path.join(path, f"{_STEMS[0]}.safetensors"),
          written.tensors,
          {"format": "pt"},
        )
      library = "unclip" if folder == "text_proj" else "diffusers"
      index[folder] = [library, written.class_name]
  if "prior" not in names:
    index["_class_name"] = "UnCLIPImageVariationPipeline"
  _write_json(os.path.join(out, "model_index.json"), index)


def _write_clip(stored: model_folder.OpenModel, out: str) -> dict[str, Any]:
  """Both towers and the tokenizer; entries of the index."""
  text = os.path.join(out, "text_encoder")
  clip_hf.write(stored, text, "clip_text_model")
  index = {
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
  }
  tokenizer = os.path.join(out, "tokenizer")
  os.makedirs(tokenizer, exist_ok=True)
  for file in tokenizers.load(stored.assets_dir).assets():
    os.replace(os.path.join(text, file), os.path.join(tokenizer, file))
  _write_json(
    os.path.join(tokenizer, "tokenizer_config.json"),
    {
      "tokenizer_class": "CLIPTokenizer",
      "model_max_length": stored.config.model.context_length,
      "pad_token": "!",
      "bos_token": tokenizers.BPE_BEGIN,
      "eos_token": tokenizers.BPE_END,
      "unk_token": tokenizers.BPE_END,
    },
  )
  if stored.config.model.vision_width is None:
    return index
  images = os.path.join(out, "image_encoder")
  clip_hf.write(stored, images, "clip_vision_model")
  processor = os.path.join(out, "feature_extractor")
  os.makedirs(processor, exist_ok=True)
  file = "preprocessor_config.json"
  os.replace(os.path.join(images, file), os.path.join(processor, file))
  return index | {
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
  }


def _write_json(path: str, fields: Mapping[str, Any]) -> None:
  with open(path, "w", encoding="utf-8") as f:
    json.dump(fields, f, indent=2)


# --- In -----------------------------------------------------------------------


def read_prior(src: str) -> parts.Part:
  """The prior of a folder in the layout of diffusers.

  Raises:
    UserError: a file is missing or damaged, or it is another kind of prior.
  """
  fields = _read_config(src, "prior", _PRIOR_FIXED)
  width = fields.get("num_attention_heads", 32) * fields.get(
    "attention_head_dim", 64
  )
  embed_dim = fields.get("embedding_dim", 768)
  model = dict(
    embed_dim=embed_dim,
    text_width=embed_dim,
    context_length=fields.get("num_embeddings", 77),
    width=width,
    depth=fields.get("num_layers", 20),
    num_heads=fields.get("num_attention_heads", 32),
    dropout=fields.get("dropout", 0.0),
    learned_null_text=False,
  )
  return _prior(
    model,
    _read_process(src, "prior", prediction="sample", variance=_FIXED),
    _tensors(src, "prior"),
    _DIFFUSERS,
    src,
  )


def read_decoder(src: str) -> parts.Part:
  """The decoder and text_proj of a folder in the layout of diffusers."""
  fields = _read_config(src, "decoder", _DECODER_FIXED)
  projections = _read_config(src, "text_proj", {})
  model = _unet_fields(src, "decoder", fields)
  embed_dim = projections.get("clip_embeddings_dim", 768)
  model |= dict(
    out_channels=fields.get("out_channels", 6),
    head_channels=fields["attention_head_dim"],
    image_embed_dim=embed_dim,
    num_image_embed_tokens=projections.get("clip_extra_context_tokens", 4),
    text_width=embed_dim,
    text_embed_dim=embed_dim,
    context_width=fields["cross_attention_dim"],
    learned_null_text=False,
    scale_shift_norm=True,
  )
  return _decoder(
    model,
    _read_process(src, "decoder", prediction="epsilon", variance=_LEARNED),
    _tensors(src, "decoder", "text_proj"),
    _DIFFUSERS,
    src,
  )


def read_upsampler(src: str) -> parts.Part:
  """Both super-resolution networks of a folder in the layout of diffusers."""
  first = _read_config(src, "super_res_first", _UPSAMPLER_FIXED)
  last = _read_config(src, "super_res_last", _UPSAMPLER_FIXED)
  model = _unet_fields(src, "super_res_first", first)
  if model != _unet_fields(src, "super_res_last", last):
    raise errors.UserError(
      f"super_res_first and super_res_last in {src} are of different shapes: "
      "they must be one network with two sets of weights"
    )
  model |= dict(
    out_channels=first.get("out_channels", 3),
    scale_shift_norm=False,
    low_res_resize="bicubic",
  )
  drawn = corr.read_json(os.path.join(src, "decoder", "config.json"))
  return _upsampler(
    model,
    first["sample_size"] // drawn["sample_size"],
    _read_process(src, "super_res", prediction="epsilon", variance=_FIXED),
    _tensors(src, "super_res_first", "super_res_last"),
    _DIFFUSERS,
    src,
  )


class OriginalShape(NamedTuple):
  """What the tensors of the original files do not say; the released values."""

  image_size: int = 64
  scale: int = 4
  channel_mult: tuple[int, ...] = (1, 2, 3, 4)
  num_res_blocks: int = 3
  attention_resolutions: tuple[int, ...] = (32, 16, 8)
  head_channels: int = 64
  num_image_embed_tokens: int = 4


def read_original(
  src: str, shape: OriginalShape | None = None
) -> dict[str, parts.Part]:
  """`prior`, `decoder`, `upsampler_256` of a folder of .ckpt files.

  Raises:
    UserError: a file is missing or damaged, or holds another model.
  """
  shape = shape or OriginalShape()
  prior = corr.read(find(src, "prior-ckpt*.ckpt"))
  stats = corr.read(find(src, "*stats.th"))
  decoder = corr.read(find(src, "decoder-ckpt*.ckpt"))
  upsampler = corr.read(find(src, "*sr-ckpt*.ckpt"))
  found = [
    _prior(
      _original_prior_fields(prior, shape, src),
      # The released sampler clips at 10, that of diffusers at 5.
      dict(clip_x_start=10.0),
      prior | _prefixed("stats", stats),
      _ORIGINAL,
      src,
    ),
    _decoder(
      _original_decoder_fields(decoder, shape, src),
      dict(clip_x_start=1.0),
      decoder,
      _ORIGINAL,
      src,
    ),
    _upsampler(
      _original_upsampler_fields(upsampler, shape, src),
      shape.scale,
      dict(clip_x_start=1.0),
      upsampler,
      _ORIGINAL,
      src,
    ),
  ]
  return {part.config.name: part for part in found}


def find(folder: str, pattern: str) -> str:
  """The one file of a folder whose name fits.

  Raises:
    UserError: there is none, or more than one.
  """
  found = glob.glob(os.path.join(glob.escape(folder), pattern))
  if len(found) != 1:
    raise errors.UserError(
      f"there is {'no' if not found else 'more than one'} file {pattern} in "
      f"{folder}: put those of one model there"
    )
  return found[0]


def _prior(
  model: dict[str, Any],
  process: dict[str, Any],
  tensors: Arrays,
  layout: str,
  where: str,
) -> parts.Part:
  task = dict(
    process=dict(
      schedule="cosine",
      prediction="x_start",
      variance="fixed_small",
      **process,
    ),
    embedding_space="mean_std",
    normalize_text_embed=False,
    text_drop_prob=0.2,
    sample_options=dict(
      sampler="ddpm",
      num_sample_steps=25,
      guidance_scale=4.0,
      num_candidates=1,
    ),
  )
  network = prior_model.Model(**model)
  D = model["embed_dim"]
  embed = jnp.zeros((1, D))
  states = jnp.zeros((1, model["context_length"], D))
  shapes = _shapes(network, embed, jnp.zeros(1, jnp.int32), embed, states)
  shapes |= {_TABLE + "mean": (D,), _TABLE + "std": (D,)}
  pairs = list(_prior_pairs(network, layout))
  arrays = corr.to_ours(pairs, tensors, shapes, where=where)
  config = parts.make_config(
    "prior",
    task_name="unclip_jax.tasks.prior_diffusion",
    task=task,
    model_name="unclip_jax.models.prior",
    model=model,
    frozen=_CLIP,
  )
  return parts.Part(config, arrays | _is_unit(), {})


def _decoder(
  model: dict[str, Any],
  process: dict[str, Any],
  tensors: Arrays,
  layout: str,
  where: str,
) -> parts.Part:
  task = dict(
    process=dict(
      schedule="cosine", prediction="eps", variance="learned_range", **process
    ),
    embedding_space="raw",
    image_embed_drop_prob=0.1,
    text_drop_prob=0.3,
    sample_options=dict(
      sampler="ddpm", num_sample_steps=25, guidance_scale=8.0
    ),
  )
  network = unet_model.Model(**model)
  D = model["image_embed_dim"]
  embed = jnp.zeros((1, D))
  shapes = _shapes(
    network,
    jnp.zeros((1, network.image_size, network.image_size, 3)),
    jnp.zeros(1, jnp.int32),
    image_embed=embed,
    text_embed=embed,
    text_encodings=embed[:, None],
  )
  pairs = list(_decoder_pairs(network, shapes, layout))
  arrays = corr.to_ours(pairs, tensors, shapes, where=where)
  config = parts.make_config(
    "decoder",
    task_name="unclip_jax.tasks.decoder",
    task=task,
    model_name="unclip_jax.models.unet",
    model=model,
    frozen=_CLIP,
  )
  return parts.Part(config, arrays | _raw_space(D), {})


def _upsampler(
  model: dict[str, Any],
  scale: int,
  process: dict[str, Any],
  tensors: Arrays,
  layout: str,
  where: str,
) -> parts.Part:
  task = dict(
    process=dict(
      schedule="cosine", prediction="eps", variance="fixed_small", **process
    ),
    scale=scale,
    separate_last_step=True,
    sample_options=dict(sampler="ddpm", num_sample_steps=7),
  )
  network = unet_model.Model(**model)
  shapes = _upsampler_shapes(network)
  pairs = list(_upsampler_pairs(network, shapes, layout))
  arrays = corr.to_ours(pairs, tensors, shapes, where=where)
  config = parts.make_config(
    f"upsampler_{network.image_size}",
    task_name="unclip_jax.tasks.upsampler",
    task=task,
    model_name="unclip_jax.models.unet",
    model=model,
  )
  return parts.Part(config, arrays, {})


def _is_unit() -> Arrays:
  return {_TABLE + "is_unit": tensor_files.lazy(np.zeros((), bool))}


def _raw_space(D: int) -> Arrays:
  """The table of embedding_space "raw"."""
  return _is_unit() | {
    _TABLE + "mean": tensor_files.lazy(np.zeros(D, np.float32)),
    _TABLE + "std": tensor_files.lazy(np.ones(D, np.float32)),
  }


def _shapes(network: Any, *args: Any, **kwargs: Any) -> dict[str, tuple]:
  variables = jax.eval_shape(network.init, jax.random.key(0), *args, **kwargs)
  return {name: x.shape for name, x in trees.flatten(variables).items()}


def _upsampler_shapes(network: unet_model.Model) -> dict[str, tuple]:
  image = jnp.zeros((1, network.image_size, network.image_size, 3))
  shapes = _shapes(network, image, jnp.zeros(1, jnp.int32), low_res=image)
  last = {f"last{k.removeprefix('params')}": v for k, v in shapes.items()}
  return shapes | last


def _tensors(src: str, *folders: str) -> Arrays:
  """Of networks in the layout of diffusers; names begin with the folder's."""
  found: Arrays = {}
  for name in folders:
    tensors = corr.find_tensors(os.path.join(src, name), _STEMS)
    found |= _prefixed(name, tensors)
  return found


def _prefixed(prefix: str, tensors: Mapping[str, LazyArray]) -> Arrays:
  return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


# --- What the configs of diffusers must say -----------------------------------

_FIXED, _LEARNED = "fixed_small_log", "learned_range"

# Field -> the one value that our networks stand for; what is absent has it.
_PRIOR_FIXED = {
  "additional_embeddings": 4,
  "time_embed_act_fn": "silu",
  "norm_in_type": None,
  "embedding_proj_norm_type": None,
  "encoder_hid_proj_type": "linear",
  "added_emb_type": "prd",
  "time_embed_dim": None,
  "embedding_proj_dim": None,
  "clip_embed_dim": None,
}
_UNET_FIXED = {
  "act_fn": "silu",
  "center_input_sample": False,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "norm_eps": 1e-5,
  "time_embedding_type": "positional",
  "time_embedding_dim": None,
  "mid_block_scale_factor": 1,
}
_DECODER_FIXED = {
  **_UNET_FIXED,
  "in_channels": 3,
  "class_embed_type": "identity",
  "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
  "resnet_time_scale_shift": "scale_shift",
  "only_cross_attention": False,
  "cross_attention_norm": None,
  "resnet_skip_time_act": False,
  "resnet_out_scale_factor": 1.0,
  "addition_embed_type": None,
  "encoder_hid_dim": None,
}
_UPSAMPLER_FIXED = {
  **_UNET_FIXED,
  "in_channels": 6,
  "add_attention": False,
  "class_embed_type": None,
  "resnet_time_scale_shift": "default",
}
_PLAIN_BLOCKS = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
_ATTENDING_BLOCKS = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D")


def _read_config(
  src: str, name: str, fixed: Mapping[str, Any]
) -> dict[str, Any]:
  path = os.path.join(src, name, "config.json")
  fields = corr.read_json(path)
  _check_fixed(fields, fixed, path)
  return fields


def _check_fixed(
  fields: Mapping[str, Any], fixed: Mapping[str, Any], path: str
) -> None:
  for field, value in fixed.items():
    if fields.get(field, value) != value:
      raise errors.UserError(
        f"{path} has {field} = {fields[field]!r}, where only {value!r} is "
        "known here: is it Karlo's?"
      )


def _read_process(
  src: str, name: str, *, prediction: str, variance: str
) -> dict[str, Any]:
  """Fields of diffusion.process.Process of a scheduler's config."""
  path = os.path.join(src, f"{name}_scheduler", "scheduler_config.json")
  fields = corr.read_json(path)
  fixed = {
    "prediction_type": prediction,
    "variance_type": variance,
    "beta_schedule": "squaredcos_cap_v2",
  }
  _check_fixed(fields, fixed, path)
  clip = fields.get("clip_sample_range", 1.0)
  return dict(
    num_timesteps=fields.get("num_train_timesteps", 1000),
    clip_x_start=float(clip) if fields.get("clip_sample", True) else None,
  )


def _unet_fields(
  src: str, name: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Fields of models.unet.Model of either kind of network."""
  path = os.path.join(src, name, "config.json")
  channels = fields["block_out_channels"]
  down, up = fields["down_block_types"], fields["up_block_types"]
  attends = [block == _ATTENDING_BLOCKS[0] for block in down]
  known = all(
    d == blocks[0] and u == blocks[1]
    for d, u, a in zip(down, reversed(up), attends)
    for blocks in [_ATTENDING_BLOCKS if a else _PLAIN_BLOCKS]
  )
  even = all(x % channels[0] == 0 for x in channels)
  depth = fields["layers_per_block"]
  if not (known and even and len(up) == len(down) and isinstance(depth, int)):
    raise errors.UserError(
      f"{path} describes a U-Net of other blocks than Karlo's: {down}, {up}, "
      f"{channels} channels, {depth} layers"
    )
  groups = fields.get("norm_num_groups", 32)
  if channels[0] < 4 * groups or channels[0] % groups:
    raise errors.UserError(
      f"{path} has norms of {groups} groups over {channels[0]} channels: a "
      "group must have 4 channels or more"
    )
  size = fields["sample_size"]
  return dict(
    image_size=size,
    channels=channels[0],
    channel_mult=tuple(x // channels[0] for x in channels),
    num_res_blocks=depth,
    attention_resolutions=tuple(size >> i for i, a in enumerate(attends) if a),
    max_groups=groups,
    dropout=fields.get("dropout", 0.0),
  )


# --- The tensors --------------------------------------------------------------

_DIFFUSERS, _ORIGINAL = 0, 1

# Kind, our layer, its name in diffusers, its original name.
_TIME_LAYERS = (
  ("dense", "time_embed.dense_1", "time_embedding.linear_1", "time_embed.0"),
  ("dense", "time_embed.dense_2", "time_embedding.linear_2", "time_embed.2"),
)
_PRIOR_LAYERS = (
  *_TIME_LAYERS,
  ("dense", "x_proj", "proj_in", "clip_img_proj"),
  ("dense", "text_embed_proj", "embedding_proj", "text_emb_proj"),
  (
    "dense",
    "text_encodings_proj",
    "encoder_hidden_states_proj",
    "text_enc_proj",
  ),
  ("norm", "ln_final", "norm_out", "final_ln"),
  ("dense", "output", "proj_to_clip_embeddings", "out_proj"),
)
_PRIOR_BLOCK = (
  ("norm", "norm_1", "norm1", "ln_1"),
  ("norm", "norm_2", "norm3", "ln_2"),
  ("dense", "attn.out", "attn1.to_out.0", "attn.c_proj"),
  ("dense", "mlp.dense_1", "ff.net.0.proj", "mlp.c_fc"),
  ("dense", "mlp.dense_2", "ff.net.2", "mlp.c_proj"),
)
_PROJECTIONS = (
  ("dense", "text_time_proj", "embedding_proj", "text_feat_proj"),
  (
    "dense",
    "image_embed_time_proj",
    "clip_image_embeddings_project_to_time_embeddings",
    "clip_emb",
  ),
  (
    "dense",
    "text_tokens_proj",
    "encoder_hidden_states_proj",
    "text_seq_proj.0",
  ),
  ("norm", "text_ln", "text_encoder_hidden_states_norm", "text_seq_proj.1"),
)
_UNET_LAYERS = (
  *_TIME_LAYERS,
  ("conv", "conv_in", "conv_in", "input_blocks.0.0"),
  ("norm", "norm_out", "conv_norm_out", "out.0"),
  ("conv", "conv_out", "conv_out", "out.2"),
)
_RES_BLOCK = (
  ("norm", "norm_1", "norm1", "in_layers.0"),
  ("conv", "conv_1", "conv1", "in_layers.2"),
  ("dense", "emb_proj", "time_emb_proj", "emb_layers.1"),
  ("norm", "norm_2", "norm2", "out_layers.0"),
  ("conv", "conv_2", "conv2", "out_layers.3"),
)
_SKIP = (("conv", "skip", "conv_shortcut", "skip_connection"),)
_QKV = ("query", "key", "value")
_KINDS = {"dense": corr.dense, "conv": corr.conv, "norm": corr.norm}

_Layers = tuple[tuple[str, str, str, str], ...]


def _layers(
  layers: _Layers, layout: int, theirs: str, ours: str
) -> Iterator[corr.Pair]:
  """Pairs of a table's layers; `theirs` and `ours` stand before the names."""
  for kind, our_name, *their_names in layers:
    yield from _KINDS[kind](theirs + their_names[layout], ours + our_name)


def _prior_pairs(
  network: prior_model.Model, layout: int
) -> Iterator[corr.Pair]:
  root = ("prior.", "model.")[layout]
  yield corr.rearranged(
    f"{root}positional_embedding", "params.position", "1 l d -> l d"
  )
  query = ("prd_embedding", "prd_emb")[layout]
  yield corr.rearranged(root + query, "params.query", "1 1 d -> d")
  for name, original in (("mean", "stats.0"), ("std", "stats.1")):
    if layout == _ORIGINAL:
      yield corr.same(original, _TABLE + name)
    else:
      yield corr.rearranged(f"{root}clip_{name}", _TABLE + name, "1 d -> d")
  yield from _layers(_PRIOR_LAYERS, layout, root, "params.")
  for i in range(network.depth):
    ours = f"params.block_{i}."
    blocks = ("transformer_blocks", "transformer.resblocks")[layout]
    theirs = f"{root}{blocks}.{i}."
    yield from _layers(_PRIOR_BLOCK, layout, theirs, ours)
    if layout == _ORIGINAL:
      yield from corr.fused_dense(
        (f"{theirs}attn.c_qkv.weight", f"{theirs}attn.c_qkv.bias"),
        [f"{ours}attn.{x}" for x in _QKV],
        num_heads=network.num_heads,
      )
    else:
      for x in _QKV:
        yield from corr.dense(f"{theirs}attn1.to_{x[0]}", f"{ours}attn.{x}")


def _decoder_pairs(
  network: unet_model.Model, shapes: Mapping[str, tuple], layout: int
) -> Iterator[corr.Pair]:
  root = ("text_proj.", "model.")[layout]
  null = ("learned_classifier_free_guidance_embeddings", "cf_param")[layout]
  yield corr.same(root + null, "params.null_image_embed")
  tokens = ("clip_extra_context_tokens_proj", "clip_tok_proj")[layout]
  # Of the numbers of all tokens, theirs keeps equal places beside each other.
  M = network.num_image_embed_tokens
  ours = "params.image_embed_tokens_proj"
  yield corr.rearranged(
    f"{root}{tokens}.weight", f"{ours}.kernel", "(d m) i -> i (m d)", m=M
  )
  yield corr.rearranged(
    f"{root}{tokens}.bias", f"{ours}.bias", "(d m) -> (m d)", m=M
  )
  yield from _layers(_PROJECTIONS, layout, root, "params.")
  root = ("decoder.", "model.")[layout]
  yield from _unet_pairs(network, shapes, layout, root, "params.")


def _upsampler_pairs(
  network: unet_model.Model, shapes: Mapping[str, tuple], layout: int
) -> Iterator[corr.Pair]:
  first = ("super_res_first.", "model_first_steps.")[layout]
  last = ("super_res_last.", "model_last_step.")[layout]
  for theirs, ours in ((first, "params."), (last, "last.")):
    yield from _unet_pairs(network, shapes, layout, theirs, ours)


def _unet_pairs(
  network: unet_model.Model,
  shapes: Mapping[str, tuple],
  layout: int,
  root: str,
  ours: str,
) -> Iterator[corr.Pair]:
  yield from _layers(_UNET_LAYERS, layout, root, ours)
  for unit, *places in _units(network):
    res, attention = places[layout]
    unit = f"{ours}{unit}."
    has_skip = f"{unit}res.skip.kernel" in shapes
    layers = _RES_BLOCK + (_SKIP if has_skip else ())
    yield from _layers(layers, layout, f"{root}{res}.", f"{unit}res.")
    if f"{unit}attn.query.kernel" in shapes:
      theirs = root + attention
      if layout == _DIFFUSERS:
        yield from _attention_pairs(theirs, unit)
      else:
        C = shapes[f"{unit}attn.query.kernel"][0]
        heads = C // network.head_channels
        yield from _original_attention_pairs(theirs, unit, heads)


_Place = tuple[str, str]  # names of the ResBlock and of the attention


def _units(network: unet_model.Model) -> Iterator[tuple[str, _Place, _Place]]:
  """Each unit: our name, its place in diffusers, its original place."""
  last = len(network.channel_mult) - 1
  depth = network.num_res_blocks
  number = 0  # of the original's blocks
  for level in range(last + 1):
    for i in range(depth + (level < last)):
      number += 1
      block = f"down_blocks.{level}."
      name = f"resnets.{i}" if i < depth else "downsamplers.0"
      yield (
        f"down_{level}_{i}",
        (block + name, f"{block}attentions.{i}"),
        (f"input_blocks.{number}.0", f"input_blocks.{number}.1"),
      )
  second = 2 if network.attention_resolutions else 1
  attention = ("mid_block.attentions.0", "middle_block.1")
  for i, original in enumerate((0, second)):
    yield (
      f"mid_{i}",
      (f"mid_block.resnets.{i}", attention[0]),
      (f"middle_block.{original}", attention[1]),
    )
  number = -1
  for level in reversed(range(last + 1)):
    attends = network.image_size >> level in network.attention_resolutions
    for i in range(depth + 1 + (level > 0)):
      block = f"up_blocks.{last - level}."
      if i <= depth:
        number += 1
        res, original = f"resnets.{i}", f"output_blocks.{number}.0"
      else:  # in the block of the ResBlock before it
        res = "upsamplers.0"
        original = f"output_blocks.{number}.{2 if attends else 1}"
      yield (
        f"up_{level}_{i}",
        (block + res, f"{block}attentions.{i}"),
        (original, f"output_blocks.{number}.1"),
      )


def _attention_pairs(theirs: str, unit: str) -> Iterator[corr.Pair]:
  yield from corr.norm(f"{theirs}.group_norm", f"{unit}attn_norm")
  for their_name, name in (
    *((f"to_{x[0]}", x) for x in _QKV),
    ("add_k_proj", "context_key"),
    ("add_v_proj", "context_value"),
    ("to_out.0", "out"),
  ):
    yield from corr.dense(f"{theirs}.{their_name}", f"{unit}attn.{name}")


def _original_attention_pairs(
  theirs: str, unit: str, num_heads: int
) -> Iterator[corr.Pair]:
  """Convolutions of one pixel, and the heads' rows in turns."""
  yield from corr.norm(f"{theirs}.norm", f"{unit}attn_norm")
  for their_name, names in (
    ("qkv", _QKV),
    ("encoder_kv", ("context_key", "context_value")),
    ("proj_out", ("out",)),
  ):
    yield from corr.fused_dense(
      (f"{theirs}.{their_name}.weight", f"{theirs}.{their_name}.bias"),
      [f"{unit}attn.{name}" for name in names],
      num_heads=num_heads if len(names) > 1 else None,
      pattern="o i 1",
    )


# --- Sizes of the original files ----------------------------------------------


def _size(
  tensors: Mapping[str, LazyArray], name: str, axis: int, where: str
) -> int:
  if name not in tensors or len(tensors[name].shape) <= axis:
    raise errors.UserError(
      f"{where} does not hold Karlo's files: {name} is missing or of another "
      "shape"
    )
  return tensors[name].shape[axis]


def _original_prior_fields(
  tensors: Mapping[str, LazyArray], shape: OriginalShape, where: str
) -> dict[str, Any]:
  width = _size(tensors, "model.clip_img_proj.weight", 0, where)
  embed_dim = _size(tensors, "model.clip_img_proj.weight", 1, where)
  length = _size(tensors, "model.positional_embedding", 1, where)
  blocks = {
    name.split(".")[3]
    for name in tensors
    if name.startswith("model.transformer.resblocks.")
  }
  return dict(
    embed_dim=embed_dim,
    text_width=embed_dim,
    context_length=length - 4,
    width=width,
    depth=len(blocks),
    num_heads=width // shape.head_channels,
    learned_null_text=False,
  )


def _original_unet_fields(
  tensors: Mapping[str, LazyArray],
  prefix: str,
  shape: OriginalShape,
  where: str,
) -> dict[str, Any]:
  return dict(
    image_size=shape.image_size,
    channels=_size(tensors, f"{prefix}.input_blocks.0.0.weight", 0, where),
    channel_mult=shape.channel_mult,
    num_res_blocks=shape.num_res_blocks,
    out_channels=_size(tensors, f"{prefix}.out.2.weight", 0, where),
  )


def _original_decoder_fields(
  tensors: Mapping[str, LazyArray], shape: OriginalShape, where: str
) -> dict[str, Any]:
  embed_dim = _size(tensors, "model.cf_param", 0, where)
  return dict(
    **_original_unet_fields(tensors, "model", shape, where),
    attention_resolutions=shape.attention_resolutions,
    head_channels=shape.head_channels,
    image_embed_dim=embed_dim,
    num_image_embed_tokens=shape.num_image_embed_tokens,
    text_width=embed_dim,
    text_embed_dim=embed_dim,
    context_width=_size(tensors, "model.text_seq_proj.1.weight", 0, where),
    learned_null_text=False,
    scale_shift_norm=True,
  )


def _original_upsampler_fields(
  tensors: Mapping[str, LazyArray], shape: OriginalShape, where: str
) -> dict[str, Any]:
  fields = _original_unet_fields(tensors, "model_first_steps", shape, where)
  return fields | dict(
    image_size=shape.image_size * shape.scale,
    attention_resolutions=(),
    scale_shift_norm=False,
    low_res_resize="bicubic",
  )


# --- Out ----------------------------------------------------------------------


class Written(NamedTuple):
  """One folder of the layout of diffusers, not written yet.

  Attributes:
    class_name: of diffusers.
    config: its config.json.
    tensors: its weights.
  """

  class_name: str
  config: dict[str, Any]
  tensors: Arrays


def export(name: str, config: Config, arrays: Arrays) -> dict[str, Written]:
  """A part as folders of diffusers; the inverse of reading it.

  Args:
    name: "prior", "decoder" or "upsampler_SIZE".
    config: the part's.
    arrays: its "params...", "last..." and "tables...".

  Returns:
    Folder -> what goes there, schedulers included (they have no tensors).

  Raises:
    UserError: the part is not of Karlo's kind, which has no place for it.
  """
  model = config.model.to_dict()
  arrays = {k: v for k, v in arrays.items() if k != _TABLE + "is_unit"}
  if name == "prior":
    network = prior_model.Model(**model)
    pairs = list(_prior_pairs(network, _DIFFUSERS))
    folders = {
      "prior": ("PriorTransformer", _prior_config(network)),
      "prior_scheduler": _scheduler(config, "sample", _FIXED),
    }
  elif name == "decoder":
    network = unet_model.Model(**model)
    if config.task.embedding_space != "raw":
      raise errors.UserError(
        "only a decoder whose embedding_space is 'raw' can be written as "
        f"Karlo's, not '{config.task.embedding_space}'"
      )
    arrays = {k: v for k, v in arrays.items() if not k.startswith(_TABLE)}
    shapes = {k: v.shape for k, v in arrays.items()}
    pairs = list(_decoder_pairs(network, shapes, _DIFFUSERS))
    folders = {
      "decoder": ("UNet2DConditionModel", _decoder_config(network)),
      "text_proj": ("UnCLIPTextProjModel", _projections_config(network)),
      "decoder_scheduler": _scheduler(config, "epsilon", _LEARNED),
    }
  else:
    network = unet_model.Model(**model)
    shapes = {k: v.shape for k, v in arrays.items()}
    pairs = list(_upsampler_pairs(network, shapes, _DIFFUSERS))
    unet = ("UNet2DModel", _upsampler_config(network))
    folders = {
      "super_res_first": unet,
      "super_res_last": unet,
      "super_res_scheduler": _scheduler(config, "epsilon", _FIXED),
    }
  tensors = corr.to_theirs(pairs, arrays, where=f"the {name}")
  return {
    folder: Written(
      class_name,
      {"_class_name": class_name, **fields},
      {
        k.removeprefix(f"{folder}."): v
        for k, v in tensors.items()
        if k.startswith(f"{folder}.")
      },
    )
    for folder, (class_name, fields) in folders.items()
  }


def _scheduler(
  config: Config, prediction: str, variance: str
) -> tuple[str, dict[str, Any]]:
  process = config.task.process
  clip = process.clip_x_start
  return "UnCLIPScheduler", {
    "num_train_timesteps": process.get("num_timesteps", 1000),
    "prediction_type": prediction,
    "variance_type": variance,
    "clip_sample": clip is not None,
    "clip_sample_range": 1.0 if clip is None else clip,
  }


def _prior_config(network: prior_model.Model) -> dict[str, Any]:
  return _PRIOR_FIXED | {
    "num_attention_heads": network.num_heads,
    "attention_head_dim": network.width // network.num_heads,
    "num_layers": network.depth,
    "embedding_dim": network.embed_dim,
    "num_embeddings": network.context_length,
    "dropout": network.dropout,
  }


def _projections_config(network: unet_model.Model) -> dict[str, Any]:
  return {
    "clip_extra_context_tokens": network.num_image_embed_tokens,
    "clip_embeddings_dim": network.image_embed_dim,
    "time_embed_dim": 4 * network.channels,
    "cross_attention_dim": network.context_width,
  }


def _decoder_config(network: unet_model.Model) -> dict[str, Any]:
  return (
    _DECODER_FIXED
    | _unet_config(network)
    | {
      "attention_head_dim": network.head_channels,
      "cross_attention_dim": network.context_width,
    }
  )


def _upsampler_config(network: unet_model.Model) -> dict[str, Any]:
  return _UPSAMPLER_FIXED | _unet_config(network)


def _unet_config(network: unet_model.Model) -> dict[str, Any]:
  sizes = [network.image_size >> i for i in range(len(network.channel_mult))]
  attends = [size in network.attention_resolutions for size in sizes]
  down, up = (
    [attending if a else plain for a in attends]
    for attending, plain in zip(_ATTENDING_BLOCKS, _PLAIN_BLOCKS)
  )
  return {
    "sample_size": network.image_size,
    "out_channels": network.out_channels,
    "block_out_channels": [network.channels * m for m in network.channel_mult],
    "layers_per_block": network.num_res_blocks,
    "down_block_types": down,
    "up_block_types": up[::-1],
    "norm_num_groups": network.max_groups,
    "dropout": network.dropout,
  }
