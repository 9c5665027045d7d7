"""What the public formats of CLIP share: from fields and tensors to a part.

The tokenizer of every public CLIP is one and the same vocabulary; it comes as
vocab.json and merges.txt, inside a tokenizer.json, or as the list of merges
that the released code reads. A part holds the first of these three.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.data.tokenizers import BPE_BEGIN, BPE_END, BPE_FILES
from unclip_jax.interop import correspondence, parts
from unclip_jax.models import clip
from unclip_jax.tensor_files import LazyArray
from unclip_jax.utils import config as config_lib
from unclip_jax.utils import errors, trees

# Of pictures in [0, 1], RGB: what every public CLIP of OpenAI's line was
# trained with.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_NUM_MERGES = 48_894  # of those in the file, so many were used
_MAX_BYTES = 2**26  # of a tokenizer's file; the largest has 3 MB
_VISION_FIELDS = (
  *("image_size", "patch_size"),
  *("vision_width", "vision_depth", "vision_num_heads"),
)
_TEXT_FIELDS = (
  *("vocab_size", "context_length"),
  *("text_width", "text_depth", "text_num_heads"),
)


def make_part(
  fields: Mapping[str, Any],
  tensors: Mapping[str, LazyArray],
  assets: Mapping[str, bytes],
  *,
  pairs: Any,
  where: str,
  ignored: str = r"(?!)",
) -> parts.Part:
  """The part of a CLIP.

  Args:
    fields: of models.clip.Model; those of a missing tower may be left out.
    pairs: the model -> the `Pair`s of the format.
    where, ignored: as in `correspondence.to_ours`.

  Raises:
    UserError: the tensors are not those of this model.
  """
  missing = dict.fromkeys((*_VISION_FIELDS, *_TEXT_FIELDS))
  fields = {**missing, **fields}
  model = config_lib.construct(clip.Model, fields, where=where)
  arrays = correspondence.to_ours(
    pairs(model), tensors, _shapes(model), where=where, ignored=ignored
  )
  config = parts.make_config(
    "clip",
    task_name="unclip_jax.tasks.clip",
    model_name="unclip_jax.models.clip",
    model=fields,
  )
  return parts.Part(config, arrays, dict(assets))


def _shapes(model: clip.Model) -> dict[str, tuple[int, ...]]:
  """Flat name -> shape of all that the model has."""
  S, L = model.image_size or 1, model.context_length or 1
  variables = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros((1, S, S, 3)),
    jnp.zeros((1, L), jnp.int32),
    jnp.ones((1, L), bool),
  )
  return {name: x.shape for name, x in trees.flatten(variables).items()}


def size(
  fields: Mapping[str, Any], name: str, where: str, default: Any = None
) -> int:
  """A positive whole number of a foreign config.

  Raises:
    UserError: it is something else.
  """
  value = fields.get(name, default)
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise errors.UserError(
      f"{where} has {name} {value!r}, which is one whole number in every CLIP"
      " that has a place here: a ViT and a text transformer"
    )
  return value


def channels(
  fields: Any, name: str, where: str, default: tuple[float, ...]
) -> tuple[float, ...]:
  """A number for each of R, G and B in a foreign config.

  Raises:
    UserError: it is something else.
  """
  value = fields.get(name) if isinstance(fields, Mapping) else fields
  value = value or default
  if (
    not isinstance(value, (list, tuple))
    or len(value) != 3
    or not all(isinstance(x, (int, float)) for x in value)
  ):
    raise errors.UserError(
      f"{where} has {name} {value!r}, which must be three numbers"
    )
  return tuple(float(x) for x in value)


def tokenizer_assets(
  folder: str, *, vocab_size: int, pad_token: str
) -> dict[str, bytes]:
  """vocab.json, merges.txt and tokenizer_config.json, of any public form.

  Args:
    folder: holds vocab.json and merges.txt, or tokenizer.json, or
      bpe_simple_vocab_16e6.txt.gz.
    vocab_size: of the model.
    pad_token: that the model pads with.

  Raises:
    UserError: there is no tokenizer, it is damaged, or another model's.
  """
  paths = {
    name: os.path.join(folder, name)
    for name in (*BPE_FILES[:2], "tokenizer.json", _MERGES_FILE)
  }
  there = {name: path for name, path in paths.items() if os.path.isfile(path)}
  if {*BPE_FILES[:2]} <= there.keys():
    where = paths["vocab.json"]
    vocab = correspondence.read_json(where)
    lines = _read_text(paths["merges.txt"]).splitlines()
    merges = [x for x in lines if x and not x.startswith("#version")]
  elif "tokenizer.json" in there:
    where = paths["tokenizer.json"]
    model = correspondence.read_json(where).get("model")
    model = model if isinstance(model, Mapping) else {}
    vocab, merges = model.get("vocab"), model.get("merges")
  elif _MERGES_FILE in there:
    where = paths[_MERGES_FILE]
    merges = _read_text(where).splitlines()[1 : 1 + _NUM_MERGES]
    vocab = {token: i for i, token in enumerate(_tokens(merges))}
  else:
    raise errors.UserError(
      f"there is no tokenizer in {folder}: put vocab.json and merges.txt,"
      f" tokenizer.json, or the released {_MERGES_FILE} there"
    )
  problem = _problem(vocab, merges, vocab_size, pad_token)
  if problem:
    raise errors.UserError(
      f"{where} is damaged, or another model's tokenizer: {problem}"
    )
  merges = [x if isinstance(x, str) else " ".join(x) for x in merges]
  config = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": BPE_BEGIN,
    "eos_token": BPE_END,
    "unk_token": BPE_END,
    "pad_token": pad_token,
  }
  contents = (
    json.dumps(vocab, ensure_ascii=False),
    "\n".join(["#version: 0.2", *merges, ""]),
    json.dumps(config, indent=2),
  )
  return {name: text.encode() for name, text in zip(BPE_FILES, contents)}


def _tokens(merges: Iterable[str]) -> list[str]:
  """The vocabulary that a list of merges stands for, in its order."""
  # A byte that no printable character of Latin 1 shows is shown by one from
  # U+0100 on; the printable ones come first.
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  letters = [chr(i) for i in printable]
  letters += [chr(256 + i) for i in range(256 - len(printable))]
  return [
    *letters,
    *(f"{x}</w>" for x in letters),
    *(x.replace(" ", "") for x in merges),
    *(BPE_BEGIN, BPE_END),
  ]


def _problem(
  vocab: Any, merges: Any, vocab_size: int, pad_token: str
) -> str | None:
  """What is wrong with a tokenizer, or None."""
  if not isinstance(vocab, Mapping) or not isinstance(merges, list):
    return "it holds no vocabulary with merges"
  ids = vocab.values()
  if {type(i) for i in ids} != {int} or {*ids} != {*range(len(vocab))}:
    return "its ids are not 0, 1, 2, ..."
  if len(vocab) > vocab_size:
    return f"{len(vocab)} tokens, and the model knows {vocab_size}"
  lacking = {BPE_BEGIN, BPE_END, pad_token} - vocab.keys()
  if lacking:
    return f"no token {min(lacking)}"
  for merge in merges:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if (
      not isinstance(pair, list)
      or len(pair) != 2
      or not {*pair, "".join(pair)} <= vocab.keys()
    ):
      return f"the merge {merge!r} is none of its tokens"
  return None


def _read_text(path: str) -> str:
  """A text file, which may be compressed.

  Raises:
    UserError: it is damaged.
  """
  open_file = gzip.open if path.endswith(".gz") else open
  try:
    with open_file(path, "rb") as f:
      return f.read(_MAX_BYTES).decode("utf-8")
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
    raise errors.UserError(f"{path} is damaged: {e}") from e
