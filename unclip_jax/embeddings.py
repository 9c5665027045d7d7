"""A CLIP's embeddings of a prepared folder, written into its records.

Priors and decoders stand on a frozen CLIP whose answers never change: computed
once, they cost nothing in training, and the CLIP's image tower need not run.
`write` makes a prepared folder (data/prepared.py) of another one, whose records
hold beside picture and captions

  image_embed     [D] of the picture, as `clip_image` shows it
  text_embed      [C, D] of the first C captions; the others are left out
  text_encodings  [C, L, W] float16, the CLIP's states of them, where asked for

not normalised. Its index names the CLIP by its fingerprint, and a run that
stands on another one refuses the data. `embeddings.npz` beside it tells of the
training split: `count`, `mean` and `std` [D] of the image embeddings, their
principal components `components` [D, D] (rows, the first has the largest of
`variances` [D]), and a histogram of the cosine of picture and canonical caption
(`dot_counts` between `dot_edges`).

Several processes share the work, each its own shards, and need nothing but the
folder in common. Shards appear whole; whoever is killed goes on with the same
call. The process that finds all shards there writes the index.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax import partitioning, upstream
from unclip_jax.data import prepared, preparing, preprocess, tokenizers
from unclip_jax.data.source import ArrayShape, Record
from unclip_jax.metrics import frechet, similarity
from unclip_jax.utils import files
from unclip_jax.utils import progress as progress_lib
from unclip_jax.utils.errors import UserError

STATISTICS_FILE = "embeddings.npz"
_PARTS = ".embedding"
_DOT_EDGES = np.linspace(-1.0, 1.0, 201)


def make_encoder(
  model: upstream.Loaded,
  *,
  num_captions: int,
  text_encodings: bool,
  batch_size: int,
) -> Callable[[Sequence[Record]], list[Record]]:
  """A function that gives up to `batch_size` records their embeddings.

  Args:
    model: the CLIP.
    num_captions, text_encodings: as in `write`.

  Raises:
    UserError: the model is no CLIP with a tokenizer.
  """
  task = model.task
  if not hasattr(task, "encode_image") or model.assets_dir is None:
    raise UserError("embeddings are a CLIP's: --clip must name one")
  length = task.model.context_length
  pictures = preprocess.Preprocess(task.image_size, length)
  tokenizer = tokenizers.load(model.assets_dir)
  # Of this process alone: the others may be anywhere.
  mesh = partitioning.make_mesh({}, jax.local_devices())
  weights = jax.device_put(model.variables, partitioning.replicated(mesh))

  @jax.jit
  def encode(weights: Any, batch: Any) -> dict[str, jax.Array]:
    text_embed, states = task.encode_text(
      weights, batch["text_tokens"], batch["text_mask"]
    )
    image_embed = task.encode_image(weights, batch["image"])
    found = {"image_embed": image_embed, "text_embed": text_embed}
    if text_encodings:
      found["text_encodings"] = states.astype(jnp.float16)
    return found

  def embed(records: Sequence[Record]) -> list[Record]:
    images = [preprocess.to_float(pictures.resize(r)["image"]) for r in records]
    # Filled up with the last one, so that nothing compiles a second time.
    missing = batch_size - len(records)
    filled = [*records, *[records[-1]] * missing]
    captions = [
      caption
      for record in filled
      for caption in itertools.islice(
        itertools.cycle(record.captions), num_captions
      )
    ]
    text_tokens, text_mask = tokenizer.encode(captions, length)
    batch = {
      "image": np.stack([*images, *[images[-1]] * missing]),
      "text_tokens": text_tokens,
      "text_mask": text_mask,
    }
    found = jax.device_get(encode(weights, partitioning.spread(batch, mesh)))
    for name in found.keys() - {"image_embed"}:
      rows = found[name]
      found[name] = rows.reshape(batch_size, num_captions, *rows.shape[1:])
    return [
      dataclasses.replace(
        record,
        captions=record.captions[:num_captions],
        arrays={**record.arrays, **{k: x[i] for k, x in found.items()}},
      )
      for i, record in enumerate(records)
    ]

  return embed


def write(
  folder: str,
  clip: str,
  out: str,
  *,
  num_captions: int = 1,
  text_encodings: bool = False,
  batch_size: int = 64,
  process_index: int = 0,
  process_count: int = 1,
) -> prepared.Index | None:
  """Makes the prepared folder `out` of `folder`, or this process's part of it.

  Args:
    folder: a prepared folder.
    clip: run folder or model part.
    num_captions: of each record that are kept and embedded.
    text_encodings: whether their states are stored too.
    batch_size: records at once.
    process_index, process_count: this process takes every so manieth shard.

  Returns:
    The index, or None where other processes have shards to make.

  Raises:
    UserError: a folder is missing or damaged, or `out` holds something else.
  """
  source = prepared.read_index(folder)
  model = upstream.load_model(clip)
  made_from = {
    "folder": hashlib.sha256(source.to_json().encode()).hexdigest(),
    "clip": model.fingerprint,
    "num_captions": num_captions,
    "text_encodings": text_encodings,
  }
  if os.path.isfile(os.path.join(out, prepared.INDEX_FILE)):
    index = prepared.read_index(out)
    preparing.check_plan(index.made_from, made_from, out)
    return index
  embed = make_encoder(
    model,
    num_captions=num_captions,
    text_encodings=text_encodings,
    batch_size=batch_size,
  )
  parts = os.path.join(out, _PARTS)
  try:
    os.makedirs(parts, exist_ok=True)
  except OSError as e:
    raise UserError(f"cannot write to {out} ({e.strerror})") from e
  plan = os.path.join(parts, "plan.json")
  if os.path.isfile(plan):
    with open(plan, encoding="utf-8") as file:
      preparing.check_plan(json.load(file), made_from, out)
  files.write_atomically(plan, json.dumps(made_from))

  shards = [shard for shards in source.splits.values() for shard in shards]
  own = shards[process_index::process_count]
  with progress_lib.Progress(
    "embedding", sum(shard.num_records for shard in own)
  ) as progress:
    done = 0
    for shard in own:
      account = os.path.join(parts, f"{shard.file}.npz")
      if not os.path.isfile(account):
        _embed_shard(folder, out, shard, embed, batch_size, account)
      done += shard.num_records
      progress.update(done)
  accounts = {s: os.path.join(parts, f"{s.file}.npz") for s in shards}
  if not all(os.path.isfile(path) for path in accounts.values()):
    return None
  try:
    _finish(folder, out, source, made_from, accounts)
  except FileNotFoundError:
    # Another process found all there too, was faster, and has tidied up.
    if not os.path.isfile(os.path.join(out, prepared.INDEX_FILE)):
      raise
  shutil.rmtree(parts, ignore_errors=True)
  return prepared.read_index(out)


def _embed_shard(
  folder: str,
  out: str,
  shard: prepared.Shard,
  embed: Callable[[Sequence[Record]], list[Record]],
  batch_size: int,
  account: str,
) -> None:
  """Writes a shard, and then its account: the shard's fields and statistics."""
  moments: frechet.Moments | None = None
  dot_counts = np.zeros(len(_DOT_EDGES) - 1, np.int64)
  shapes: dict[str, ArrayShape] = {}

  def encoded() -> Iterator[bytes]:
    nonlocal moments, dot_counts
    path = os.path.join(folder, shard.file)
    rows = iter(prepared.read_encoded(path, range(shard.num_records)))
    while batch := list(itertools.islice(rows, batch_size)):
      records = embed([prepared.decode(x) for x in batch])
      images = np.stack([r.arrays["image_embed"] for r in records])
      texts = np.stack([r.arrays["text_embed"][0] for r in records])
      new = frechet.Moments.of(images)
      moments = moments.merge(new) if moments else new
      cosines = similarity.cosine(images, texts)
      dot_counts += np.histogram(cosines, _DOT_EDGES)[0]
      shapes.update(
        (k, ArrayShape(x.shape, x.dtype)) for k, x in records[0].arrays.items()
      )
      yield from map(prepared.encode, records)

  made = prepared.write_shard(os.path.join(out, shard.file), encoded())
  file = io.BytesIO()
  np.savez(
    file,
    shard=json.dumps(dataclasses.asdict(made)),
    arrays=json.dumps({k: (x.shape, x.dtype.str) for k, x in shapes.items()}),
    dot_counts=dot_counts,
    **(dataclasses.asdict(moments) if moments else {}),
  )
  files.write_atomically(account, file.getvalue())


def _finish(
  folder: str,
  out: str,
  source: prepared.Index,
  made_from: Mapping[str, Any],
  accounts: Mapping[prepared.Shard, str],
) -> None:
  """Writes statistics, tokenizer and, last, the index."""
  splits: dict[str, list[prepared.Shard]] = {}
  arrays: dict[str, ArrayShape] = {}
  moments: frechet.Moments | None = None
  dot_counts = np.zeros(len(_DOT_EDGES) - 1, np.int64)
  first = "train" if "train" in source.splits else next(iter(source.splits))
  for split, shards in source.splits.items():
    for shard in shards:
      with np.load(accounts[shard], allow_pickle=False) as account:
        made = json.loads(str(account["shard"]))
        splits.setdefault(split, []).append(prepared.Shard(**made))
        for name, (shape, dtype) in json.loads(str(account["arrays"])).items():
          arrays[name] = ArrayShape(tuple(shape), np.dtype(dtype))
        if split == first and "mean" in account:
          fields = {k: account[k] for k in ("count", "mean", "scatter")}
          new = frechet.Moments(**fields)
          moments = moments.merge(new) if moments else new
          dot_counts += account["dot_counts"]
  if moments is None:
    raise UserError(f"{folder} holds no record: prepare it anew")
  file = io.BytesIO()
  np.savez(
    file, **_statistics(moments), dot_counts=dot_counts, dot_edges=_DOT_EDGES
  )
  files.write_atomically(os.path.join(out, STATISTICS_FILE), file.getvalue())
  for name, path in tokenizers.load(folder).assets().items():
    shutil.copyfile(path, os.path.join(out, name))
  made_by = {"clip": made_from["clip"]}
  index = prepared.Index(made_from, splits, source.left_out, arrays, made_by)
  path = os.path.join(out, prepared.INDEX_FILE)
  files.write_atomically(path, index.to_json())


def _statistics(moments: frechet.Moments) -> dict[str, np.ndarray]:
  covariance = moments.scatter / max(1, moments.count - 1)
  variances, vectors = np.linalg.eigh(covariance)
  return {
    "count": np.int64(moments.count),
    "mean": moments.mean,
    "std": np.sqrt(np.diag(covariance)),
    "variances": np.maximum(variances[::-1], 0.0),
    "components": vectors.T[::-1],
  }
