"""The tensors of Karlo's original files, made of diffusers' modules.

Written out name by name and head by head, and used by tests only: the converter
has its own table, which this one checks.
"""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]

_RES = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}


def _move(source: Tensors, target: Tensors, theirs: str, original: str) -> None:
  for end in ("weight", "bias"):
    if f"{theirs}.{end}" in source:
      target[f"{original}.{end}"] = source[f"{theirs}.{end}"]


def _in_turns(
  source: Tensors, target: Tensors, names: list[str], original: str, size: int
) -> None:
  """Rows of one head of each layer in turn; `size` rows are a head."""
  for end in ("weight", "bias"):
    layers = [source[f"{name}.{end}"] for name in names]
    rows = []
    for first in range(0, len(layers[0]), size):
      rows += [layer[first : first + size] for layer in layers]
    target[f"{original}.{end}"] = torch.cat(rows)


def prior(module: torch.nn.Module, head_size: int) -> Tensors:
  source, target = module.state_dict(), {}
  for theirs, original in {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj",
    "encoder_hidden_states_proj": "text_enc_proj",
    "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
  }.items():
    _move(source, target, theirs, f"model.{original}")
  target["model.positional_embedding"] = source["positional_embedding"]
  target["model.prd_emb"] = source["prd_embedding"]
  for i in range(len(module.transformer_blocks)):
    theirs = f"transformer_blocks.{i}."
    original = f"model.transformer.resblocks.{i}."
    qkv = [f"{theirs}attn1.to_{x}" for x in "qkv"]
    _in_turns(source, target, qkv, f"{original}attn.c_qkv", head_size)
    for a, b in {
      "attn1.to_out.0": "attn.c_proj",
      "ff.net.0.proj": "mlp.c_fc",
      "ff.net.2": "mlp.c_proj",
      "norm1": "ln_1",
      "norm3": "ln_2",
    }.items():
      _move(source, target, theirs + a, original + b)
  return target


def stats(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
  source = module.state_dict()
  return source["clip_mean"][0], source["clip_std"][0]


def projections(module: torch.nn.Module) -> Tensors:
  source, target = module.state_dict(), {}
  for theirs, original in {
    "encoder_hidden_states_proj": "text_seq_proj.0",
    "text_encoder_hidden_states_norm": "text_seq_proj.1",
    "clip_extra_context_tokens_proj": "clip_tok_proj",
    "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
  }.items():
    _move(source, target, theirs, f"model.{original}")
  null = "learned_classifier_free_guidance_embeddings"
  target["model.cf_param"] = source[null]
  return target


def unet(module: torch.nn.Module, prefix: str, head_size: int = 0) -> Tensors:
  """One of the U-Nets; the blocks are numbered as they are run."""
  source, target = module.state_dict(), {}

  def res(theirs: str, original: str) -> None:
    for a, b in _RES.items():
      _move(source, target, f"{theirs}.{a}", f"{prefix}.{original}.{b}")

  def attention(theirs: str, original: str) -> None:
    original = f"{prefix}.{original}"
    _move(source, target, f"{theirs}.group_norm", f"{original}.norm")
    _move(source, target, f"{theirs}.to_out.0", f"{original}.proj_out")
    qkv = [f"{theirs}.to_{x}" for x in "qkv"]
    _in_turns(source, target, qkv, f"{original}.qkv", head_size)
    kv = [f"{theirs}.add_{x}_proj" for x in "kv"]
    _in_turns(source, target, kv, f"{original}.encoder_kv", head_size)
    for name in ("proj_out", "qkv", "encoder_kv"):
      weight = f"{original}.{name}.weight"
      target[weight] = target[weight][:, :, None]  # a convolution of one pixel

  for theirs, original in {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
  }.items():
    _move(source, target, theirs, f"{prefix}.{original}")
  number = 0
  for i, block in enumerate(module.down_blocks):
    for j in range(len(block.resnets)):
      number += 1
      res(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0")
      if hasattr(block, "attentions"):
        attention(f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1")
    if block.downsamplers:
      number += 1
      res(f"down_blocks.{i}.downsamplers.0", f"input_blocks.{number}.0")
  res("mid_block.resnets.0", "middle_block.0")
  has_attention = bool(head_size)
  if has_attention:
    attention("mid_block.attentions.0", "middle_block.1")
  res("mid_block.resnets.1", f"middle_block.{2 if has_attention else 1}")
  number = -1
  for i, block in enumerate(module.up_blocks):
    attends = hasattr(block, "attentions")
    for j in range(len(block.resnets)):
      number += 1
      res(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0")
      if attends:
        attention(f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1")
    if block.upsamplers:
      last = f"output_blocks.{number}.{2 if attends else 1}"
      res(f"up_blocks.{i}.upsamplers.0", last)
  return target
