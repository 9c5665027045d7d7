"""BERT in the folders of transformers, both ways.

Read are BertModel and the models that hold one beside the heads of its
pretraining (BertForPreTraining, BertForMaskedLM), whose names begin with
"bert." and whose heads are left out: config.json, model.safetensors, and the
WordPiece tokenizer's vocab.txt with tokenizer_config.json. What is written is
a BertModel that `from_pretrained` reads, with the tensors that came in, bit for
bit. Nothing pickled is read here.

  unclip convert --from bert-hf --src DIR --out models/bert
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax import model_folder, tensor_files
from unclip_jax.data import tokenizers
from unclip_jax.interop import correspondence, parts
from unclip_jax.interop.correspondence import Pair, dense, norm, same
from unclip_jax.models import bert
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

_MODEL_NAME = "unclip_jax.models.bert"
# Our fields by their names, and what a config.json means that leaves one out.
_SIZES: dict[str, tuple[str, int]] = {
  "vocab_size": ("vocab_size", 30522),
  "context_length": ("max_position_embeddings", 512),
  "width": ("hidden_size", 768),
  "depth": ("num_hidden_layers", 12),
  "num_heads": ("num_attention_heads", 12),
  "mlp_width": ("intermediate_size", 3072),
  "num_token_types": ("type_vocab_size", 2),
}
# What only one value of is known here, and what is meant where it is missing.
_FIXED: dict[str, Any] = {
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "position_embedding_type": "absolute",
  "is_decoder": False,
}
# Heads of pretraining, and a buffer of old files.
_IGNORED = r"cls\..*|(bert\.)?embeddings\.position_ids"


def convert_in(src: str, out: str) -> None:
  """Writes the part of a folder of transformers."""
  parts.write(out, read(src))


def convert_out(model: str, out: str) -> None:
  """Writes a converted BERT as BertModel.

  Raises:
    UserError: it is no BERT.
  """
  write(model_folder.open_model(model), out)


def read(folder: str) -> parts.Part:
  """The part of a BERT.

  Raises:
    UserError: the folder holds something else, or is not whole.
  """
  config = correspondence.read_json(os.path.join(folder, "config.json"))
  fields = _fields(config, folder)
  path = os.path.join(folder, "model.safetensors")
  if not os.path.isfile(path) and not os.path.isfile(f"{path}.index.json"):
    raise errors.UserError(
      f"there is no model.safetensors in {folder}: save the model again with"
      " save_pretrained of a recent transformers"
    )
  found = correspondence.find_tensors(folder, ("model",))
  tensors = {re.sub(r"^bert\.", "", name): x for name, x in found.items()}
  fields["has_pooler"] = "pooler.dense.weight" in tensors
  model = config_lib.construct(bert.Model, fields, where=folder)
  arrays = correspondence.to_ours(
    pairs(model), tensors, _shapes(model), where=folder, ignored=_IGNORED
  )
  part_config = parts.make_config(
    "bert",
    task_name="unclip_jax.tasks.bert",
    model_name=_MODEL_NAME,
    model=fields,
  )
  return parts.Part(part_config, arrays, _tokenizer_assets(folder, fields))


def _fields(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
  """The fields of models.bert.Model, but for the pooler."""
  if config.get("model_type") != "bert":
    raise errors.UserError(
      f"{folder} holds a model of the type {config.get('model_type')!r}, not a"
      " BERT of transformers"
    )
  for name, expected in _FIXED.items():
    value = config.get(name, expected)
    if value != expected:
      raise errors.UserError(
        f"{folder} has {name} {value!r}, and only {expected!r} is known here"
      )
  fields = {}
  for ours, (theirs, default) in _SIZES.items():
    value = config.get(theirs, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise errors.UserError(
        f"{folder} has {theirs} {value!r}, which is one whole number in every"
        " BERT"
      )
    fields[ours] = value
  return fields


def _shapes(model: bert.Model) -> dict[str, tuple[int, ...]]:
  """Flat name -> shape of all that the model has."""
  variables = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
    jnp.ones((1, 1), bool),
  )
  return {name: x.shape for name, x in trees.flatten(variables).items()}


def _tokenizer_assets(
  folder: str, fields: Mapping[str, Any]
) -> dict[str, bytes]:
  """vocab.txt and tokenizer_config.json.

  Raises:
    UserError: there is no vocab.txt, or it is another model's.
  """
  vocab, config = (
    pathlib.Path(folder, name) for name in tokenizers.WORDPIECE_FILES
  )
  if not vocab.is_file():
    raise errors.UserError(
      f"there is no tokenizer in {folder}: put the model's vocab.txt there"
    )
  tokenizer = tokenizers.WordPieceTokenizer(folder)
  if tokenizer.vocab_size > fields["vocab_size"]:
    raise errors.UserError(
      f"{vocab} has {tokenizer.vocab_size} tokens, and the model knows"
      f" {fields['vocab_size']}: it is another model's"
    )
  # Written out even where the folder has none, for what it then means.
  content = (
    config.read_bytes()
    if config.is_file()
    else json.dumps({"do_lower_case": tokenizer.lowercase}).encode()
  )
  return {vocab.name: vocab.read_bytes(), config.name: content}


def write(model: model_folder.OpenModel, folder: str) -> None:
  """Writes a BERT for transformers' `from_pretrained`.

  Raises:
    UserError: the model is no BERT, or its tokenizer no WordPiece.
  """
  if model.config.model_name != _MODEL_NAME:
    raise errors.UserError(
      f"this is a model of {model.config.model_name}, not a BERT: give the"
      " folder of one"
    )
  network = config_lib.construct(
    bert.Model, model.config.model, where="config.model"
  )
  tensors = correspondence.to_theirs(
    pairs(network), model.arrays, where="this BERT"
  )
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  tokenizer = tokenizers.load(model.assets_dir)
  for name, asset in tokenizer.assets().items():
    shutil.copyfile(asset, path / name)
  tensor_files.write_safetensors(
    path / "model.safetensors", tensors, {"format": "pt"}
  )
  # Last: a folder without it is no model.
  config = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "pad_token_id": tokenizer.pad_id,
    **{theirs: getattr(network, ours) for ours, (theirs, _) in _SIZES.items()},
    **{k: v for k, v in _FIXED.items() if k != "is_decoder"},
  }
  config["intermediate_size"] = network.mlp_width or 4 * network.width
  (path / "config.json").write_text(
    json.dumps(config, indent=2) + "\n", encoding="utf-8"
  )


def pairs(model: bert.Model) -> list[Pair]:
  """transformers' names, without "bert." before them, beside ours."""
  ours = "params.text_encoder"
  found = [
    same("embeddings.word_embeddings.weight", f"{ours}.token_embed"),
    same("embeddings.position_embeddings.weight", f"{ours}.position"),
    same("embeddings.token_type_embeddings.weight", f"{ours}.type_embed"),
    *norm("embeddings.LayerNorm", f"{ours}.norm"),
  ]
  for i in range(model.depth):
    layer, block = f"encoder.layer.{i}", f"{ours}.block_{i}"
    for name in ("query", "key", "value"):
      found += dense(f"{layer}.attention.self.{name}", f"{block}.attn.{name}")
    found += [
      *dense(f"{layer}.attention.output.dense", f"{block}.attn.out"),
      *norm(f"{layer}.attention.output.LayerNorm", f"{block}.norm_1"),
      *dense(f"{layer}.intermediate.dense", f"{block}.dense_1"),
      *dense(f"{layer}.output.dense", f"{block}.dense_2"),
      *norm(f"{layer}.output.LayerNorm", f"{block}.norm_2"),
    ]
  if model.has_pooler:
    found += dense("pooler.dense", f"{ours}.pooler")
  return found
