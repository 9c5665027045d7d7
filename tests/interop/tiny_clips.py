"""Tiny CLIPs of transformers with random weights, and what they give."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from tests import bpe_files, random_variables
from unclip_jax import inference
from unclip_jax.data import tokenizers

CONTEXT_LENGTH = 16
TEXTS = (
  "a red frog",
  "",
  "hello world, an owl and a bear and an owl and a frog",
)


def make(
  activation: str = "quick_gelu",
  *,
  text: dict[str, Any] | None = None,
  vision: dict[str, Any] | None = None,
) -> transformers.CLIPModel:
  """A CLIP with odd numbers of heads; no parameter is 0 or 1."""
  config = transformers.CLIPConfig(
    projection_dim=12,
    text_config=dict(
      vocab_size=574,
      max_position_embeddings=CONTEXT_LENGTH,
      hidden_size=24,
      intermediate_size=96,
      num_hidden_layers=2,
      num_attention_heads=3,
      hidden_act=activation,
      bos_token_id=572,
      eos_token_id=573,
    )
    | (text or {}),
    vision_config=dict(
      image_size=16,
      patch_size=4,
      hidden_size=20,
      intermediate_size=50,
      num_hidden_layers=2,
      num_attention_heads=5,
      hidden_act=activation,
    )
    | (vision or {}),
  )
  generator = torch.Generator().manual_seed(0)
  model = transformers.CLIPModel(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
      parameter.normal_(std=std, generator=generator)
      parameter += float(parameter.ndim == 1)  # scales, and biases like them
  return model


def save(model: Any, folder: pathlib.Path, **options: Any) -> str:
  """Writes a model with its tokenizer as transformers keep them."""
  model.save_pretrained(folder, **options)
  bpe_files.write(folder)
  return str(folder)


def image() -> np.ndarray:
  """Pictures [3, 16, 16, 3] in [-1, 1]."""
  return np.tanh(random_variables.normal(3, 16, 16, 3))


def theirs(
  model: transformers.CLIPModel, text_tokens: np.ndarray, text_mask: np.ndarray
) -> dict[str, np.ndarray]:
  """What transformers give for TEXTS and the pictures."""
  processor = transformers.CLIPImageProcessorPil()
  pixels = (image() + 1) / 2 - processor.image_mean
  pixels = (pixels / processor.image_std).transpose(0, 3, 1, 2)
  with torch.no_grad():
    text = model.text_model(
      torch.tensor(text_tokens).long(),
      attention_mask=torch.tensor(text_mask).long(),
    )
    vision = model.vision_model(torch.tensor(pixels, dtype=torch.float32))
    outputs = {
      "text_embed": model.text_projection(text.pooler_output),
      "text_encodings": text.last_hidden_state,
      "image_embed": model.visual_projection(vision.pooler_output),
      "image_encodings": vision.last_hidden_state,
    }
  return {name: x.numpy() for name, x in outputs.items()}


def ours(
  folder: str, dtype: str = "float32"
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
  """What a converted CLIP gives, with text_tokens and text_mask."""
  clip = inference.load(folder)
  text = tokenizers.load(clip.assets_dir).encode(TEXTS, CONTEXT_LENGTH)
  model = clip.task.model.copy(dtype=dtype)
  output, out = jax.jit(model.apply)(clip.variables, image(), *text)
  outputs = {k: v for k, v in (output | out).items() if v.ndim}
  return jax.tree.map(lambda x: np.asarray(x, jnp.float32), outputs), *text


def assert_close(
  model: transformers.CLIPModel,
  folder: str,
  bound: float,
  dtype: str = "float32",
) -> None:
  """The converted CLIP's outputs are the model's, up to a relative error."""
  found, text_tokens, text_mask = ours(folder, dtype)
  expected = theirs(model, text_tokens, text_mask)
  for name, x in found.items():
    y = expected[name]
    if name == "text_encodings":  # no one may read those of padding
      x, y = x[text_mask], y[text_mask]
    error = np.linalg.norm(x - y) / np.linalg.norm(y)
    assert error < bound, (name, error)
  assert found.keys() <= expected.keys()


def openai_tensors(model: transformers.CLIPModel) -> dict[str, torch.Tensor]:
  """The state of a CLIP under the names of OpenAI's release."""
  given = model.state_dict()
  text, vision = "text_model.embeddings", "vision_model.embeddings"
  found = {
    "logit_scale": given["logit_scale"],
    "token_embedding.weight": given[f"{text}.token_embedding.weight"],
    "positional_embedding": given[f"{text}.position_embedding.weight"],
    "text_projection": given["text_projection.weight"].T,
    "visual.conv1.weight": given[f"{vision}.patch_embedding.weight"],
    "visual.class_embedding": given[f"{vision}.class_embedding"],
    "visual.positional_embedding": given[f"{vision}.position_embedding.weight"],
    "visual.proj": given["visual_projection.weight"].T,
  }
  layers = {
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
  }
  for tower, prefix in (
    (model.text_model, ""),
    (model.vision_model, "visual."),
  ):
    name = tower.config.model_type.replace("clip_", "")
    for i in range(tower.config.num_hidden_layers):
      layer = f"{name}.encoder.layers.{i}"
      block = f"{prefix}transformer.resblocks.{i}"
      layers |= {
        f"{layer}.layer_norm1": f"{block}.ln_1",
        f"{layer}.layer_norm2": f"{block}.ln_2",
        f"{layer}.mlp.fc1": f"{block}.mlp.c_fc",
        f"{layer}.mlp.fc2": f"{block}.mlp.c_proj",
        f"{layer}.self_attn.out_proj": f"{block}.attn.out_proj",
      }
      for end in ("weight", "bias"):
        found[f"{block}.attn.in_proj_{end}"] = torch.cat(
          [given[f"{layer}.self_attn.{x}_proj.{end}"] for x in "qkv"]
        )
  for old, new in layers.items():
    for end in ("weight", "bias"):
      found[f"{new}.{end}"] = given[f"{old}.{end}"]
  return {name: x.contiguous() for name, x in found.items()}
