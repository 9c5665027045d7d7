"""What unCLIP can do to pictures (Ramesh et al. 2022, sections 3 to 5).

Each function takes a pipeline first, and `UnCLIPPipeline` has them all as its
methods; `TextToImagePipeline` has those that need no CLIP. They share two ideas
of section 3: a picture is the pair of its CLIP image embedding z_i and of the
noise x_T from which DDIM, conditioned on z_i, draws it back (`encode`,
`decode`); and directions in CLIP's space mean something (`interpolate`,
`text_diff`).

Pictures go in as PIL pictures or as arrays [H, W, 3] in [0, 1], of any size:
the square around the middle is taken. They come out in the pipeline's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from PIL import Image, ImageDraw, ImageFont

from unclip_jax import stages, tensor_files
from unclip_jax.data import preprocess
from unclip_jax.metrics import pictures
from unclip_jax.stages import PipelineOutput
from unclip_jax.utils import errors

# A pipelines.UnCLIPPipeline, or any stages.Stages; those modules import this.
UnCLIPPipeline = Any
Pipeline = Any
Picture = Image.Image | np.ndarray
# Of Fig. 7; those beyond the CLIP's dimensions are left out.
PCA_DIMS = (20, 30, 40, 80, 120, 160, 200, 320)


class Latents(NamedTuple):
  """The bipartite latent of N pictures (section 3)."""

  image_embed: np.ndarray  # [N, D], z_i in the CLIP's own space
  x_T: np.ndarray  # [N, S, S, 3], the decoder's starting noise


class Attacked(NamedTuple):
  """A picture with a word written on it (Fig. 6)."""

  image: Image.Image
  probabilities: dict[str, float]  # of the CLIP, by label
  output: PipelineOutput  # what the decoder makes of its embedding


def slerp(a: jax.Array, b: jax.Array, theta: Any) -> jax.Array:
  """Spherical interpolation, row by row: a at theta = 0, b at theta = 1.

  Args:
    a, b: [N, ...]; a row is one vector, whatever its shape.
    theta: a float, or [N].

  Returns:
    [N, ...]: directions move along the great circle, lengths linearly, so
    that vectors of one length keep it.
  """
  shape = a.shape
  a, b = jnp.reshape(a, (shape[0], -1)), jnp.reshape(b, (shape[0], -1))
  length_a = jnp.linalg.norm(a, axis=1, keepdims=True)
  length_b = jnp.linalg.norm(b, axis=1, keepdims=True)
  unit_a, unit_b = a / length_a, b / length_b
  theta = jnp.broadcast_to(jnp.asarray(theta, a.dtype), shape[:1])[:, None]
  cosine = jnp.sum(unit_a * unit_b, axis=1, keepdims=True)
  angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
  # Where there is no angle, there is no great circle: linear is the limit.
  sine = jnp.sin(angle)
  is_line = sine < 1e-4
  safe = jnp.where(is_line, 1.0, sine)
  weight_a = jnp.where(is_line, 1 - theta, jnp.sin((1 - theta) * angle) / safe)
  weight_b = jnp.where(is_line, theta, jnp.sin(theta * angle) / safe)
  length = (1 - theta) * length_a + theta * length_b
  mixed = (weight_a * unit_a + weight_b * unit_b) * length
  return mixed.reshape(shape)


def encode(
  pipe: UnCLIPPipeline,
  images: Sequence[Picture],
  *,
  prompts: Sequence[str] | None = None,
  decoder_steps: int | None = None,
  num_refinements: int = 0,
) -> Latents:
  """Pictures as (z_i, x_T): CLIP, and DDIM inversion of the decoder.

  Args:
    prompts: captions on which the decoder is conditioned too; None: on none.
    decoder_steps: of the inversion; None: as many as the decoder draws with.
      The error of `decode` falls with their number.
    num_refinements: of each of them (diffusion.samplers.ddim_inverse).
  """
  decoder = pipe.parts["decoder"]
  batch = {
    **_text(pipe, prompts, len(images)),
    "image_embed": _image_embed(pipe, images),
    "image": stages.square_arrays(images, decoder.task.model.image_size),
  }
  steps = decoder_steps or pipe.options("decoder")["num_sample_steps"]

  def invert() -> Any:
    return jax.jit(
      lambda variables, frozen, batch: decoder.task.invert(
        variables,
        frozen,
        batch,
        use_text=prompts is not None,
        num_sample_steps=steps,
        num_refinements=num_refinements,
      )
    )

  key = ("invert", prompts is not None, steps, num_refinements)
  run = pipe.jitted(key, invert)
  x_T = run(*pipe.weights("decoder"), batch)
  return Latents(batch["image_embed"], np.asarray(x_T))


def decode(
  pipe: UnCLIPPipeline,
  image_embed: np.ndarray,
  *,
  x_T: np.ndarray | None = None,
  prompts: Sequence[str] | None = None,
  eta: float = 0.0,
  guidance_scale: float = 1.0,
  decoder_steps: int | None = None,
  seed: int = 0,
  batch_size: int = 16,
) -> PipelineOutput:
  """Pictures from image embeddings, by DDIM; no prior.

  Args:
    image_embed: [N, D] in the CLIP's own space.
    x_T: [N, S, S, 3]; None: drawn. With an `encode`d one, eta 0, and the same
      prompts and steps the decoder draws the encoded picture again.
    prompts: captions beside the embedding; None: the caption is dropped.
    eta: share of fresh noise.

  Returns:
    PIL pictures, as from `__call__`.
  """
  N = len(image_embed)
  batch = {**_text(pipe, prompts, N), "image_embed": np.asarray(image_embed)}
  options = {
    "sampler": "ddim",
    "eta": eta,
    "guidance_scale": guidance_scale,
    "num_sample_steps": decoder_steps,
    "use_text": prompts is not None,
  }
  arrays = {} if x_T is None else {"decoder": {"x_T": np.asarray(x_T)}}
  return _draw(pipe, batch, options, arrays, seed, batch_size)


def reconstruct(
  pipe: UnCLIPPipeline,
  images: Sequence[Picture],
  *,
  prompts: Sequence[str] | None = None,
  decoder_steps: int | None = None,
  num_refinements: int = 0,
) -> PipelineOutput:
  """Pictures drawn back from their (z_i, x_T); arguments as for `encode`."""
  options: dict[str, Any] = dict(prompts=prompts, decoder_steps=decoder_steps)
  latents = encode(pipe, images, num_refinements=num_refinements, **options)
  return decode(pipe, latents.image_embed, x_T=latents.x_T, **options)


def variations(
  pipe: UnCLIPPipeline,
  image: Picture,
  *,
  num_images: int = 4,
  eta: float = 1.0,
  from_noise: bool = False,
  guidance_scale: float | None = None,
  decoder_steps: int | None = None,
  seed: int = 0,
  noise: Mapping[str, jax.Array] | None = None,
) -> PipelineOutput:
  """Pictures that share what CLIP sees in one (section 3.1, Fig. 3).

  Args:
    eta: 0 gives the picture itself; the larger, the more is drawn anew.
    from_noise: start from noise in place of the picture's own x_T, with the
      decoder's own sampler, as Karlo's image variations do; without eta.
    guidance_scale: of the image embedding; None: 1, from noise the decoder's
      own.
    noise: from noise, in place of every draw (UnCLIPPipeline.__call__).
  """
  if from_noise:
    batch = {
      **_text(pipe, None, num_images),
      "image_embed": _image_embed(pipe, [image]).repeat(num_images, axis=0),
    }
    options = {
      "guidance_scale": guidance_scale,
      "num_sample_steps": decoder_steps,
      "use_text": False,
    }
    return _draw(pipe, batch, options, {}, seed, num_images, noise)
  latents = encode(pipe, [image], decoder_steps=decoder_steps)
  return decode(
    pipe,
    latents.image_embed.repeat(num_images, axis=0),
    x_T=latents.x_T.repeat(num_images, axis=0),
    eta=eta,
    guidance_scale=1.0 if guidance_scale is None else guidance_scale,
    decoder_steps=decoder_steps,
    seed=seed,
  )


def interpolate(
  pipe: UnCLIPPipeline,
  images: Sequence[Picture],
  *,
  num_images: int = 8,
  fixed_noise: bool = False,
  decoder_steps: int | None = None,
  seed: int = 0,
) -> PipelineOutput:
  """Pictures between two or more, one after another (section 3.2, Fig. 4).

  Args:
    images: two or more; the path goes through each.
    num_images: pictures from each to the next, both ends among them (the end
      of a part is the start of the next one, and comes once).
    fixed_noise: one random x_T for all, in place of those between the x_T of
      the pictures; the ends are then not the pictures themselves.

  Raises:
    UserError: fewer than two pictures, or than two steps.
  """
  if len(images) < 2 or num_images < 2:
    raise errors.UserError(
      f"interpolation needs at least two pictures ({len(images)} given) and"
      f" two steps from one to the next ({num_images} given)"
    )
  latents = encode(pipe, images, decoder_steps=decoder_steps)
  theta = np.linspace(0.0, 1.0, num_images)
  keep = [slice(0, num_images)] + [slice(1, num_images)] * (len(images) - 2)

  def path(x: np.ndarray) -> np.ndarray:
    parts = [
      slerp(
        *(jnp.repeat(x[j : j + 1], num_images, 0) for j in (i, i + 1)), theta
      )
      for i in range(len(x) - 1)
    ]
    return np.concatenate([part[rows] for part, rows in zip(parts, keep)])

  image_embed = path(latents.image_embed)
  x_T = path(latents.x_T)
  if fixed_noise:
    x_T = np.broadcast_to(_one_noise(pipe, seed), x_T.shape)
  return decode(
    pipe, image_embed, x_T=x_T, decoder_steps=decoder_steps, seed=seed
  )


def text_diff(
  pipe: UnCLIPPipeline,
  image: Picture,
  prompt: str,
  *,
  base_prompt: str | None = "a photo",
  max_theta: float = 0.5,
  num_images: int = 8,
  decoder_steps: int | None = None,
  seed: int = 0,
) -> PipelineOutput:
  """A picture moved towards a text (section 3.3, Fig. 5).

  z_d = normalised(z_t - z_t0); z_theta = slerp(z_i, z_d, theta) for theta
  from 0 to max_theta, at z_i's length, all from the picture's own x_T.

  Args:
    base_prompt: what the text is compared with, z_t0: a caption of the
      picture, a dummy such as "a photo", or None, which omits it.
    max_theta: 0.25 to 0.5 in the paper.
  """
  latents = encode(pipe, [image], decoder_steps=decoder_steps)
  texts = [prompt] if base_prompt is None else [prompt, base_prompt]
  text_embed = _unit(_text_embed(pipe, texts))
  if base_prompt is None:
    difference = text_embed[0]
  else:
    difference = text_embed[0] - text_embed[1]
    if np.linalg.norm(difference) < 1e-6:
      raise errors.UserError(
        f"'{prompt}' and '{base_prompt}' have the same embedding: there is no"
        " direction between them"
      )
  z_i = latents.image_embed
  z_d = _unit(difference[None]) * np.linalg.norm(z_i)
  repeated = [np.repeat(z, num_images, axis=0) for z in (z_i, z_d)]
  image_embed = slerp(*repeated, np.linspace(0.0, max_theta, num_images))
  return decode(
    pipe,
    np.asarray(image_embed),
    x_T=latents.x_T.repeat(num_images, axis=0),
    decoder_steps=decoder_steps,
    seed=seed,
  )


def pca_reconstructions(
  pipe: UnCLIPPipeline,
  image: Picture,
  *,
  dims: Sequence[int] = PCA_DIMS,
  num_examples: int = 4096,
  decoder_steps: int | None = None,
  seed: int = 0,
) -> PipelineOutput:
  """A picture drawn from the first principal parts of z_i (section 4, Fig. 7).

  Args:
    dims: how many components are kept, a picture each; those above the
      embedding's own number are left out.
    num_examples: training pictures whose embeddings give the components.

  Raises:
    UserError: no number of dimensions is left.
  """
  z_i = _image_embed(pipe, [image])
  kept = [k for k in dims if k <= z_i.shape[1]]
  if not kept:
    raise errors.UserError(
      f"the embeddings have {z_i.shape[1]} dimensions: give fewer than {dims}"
    )
  mean, components = fit_pca(pipe.train_image_embeds(num_examples))
  parts = (z_i - mean) @ components.T
  image_embed = np.concatenate(
    [mean + parts[:, :k] @ components[:k] for k in kept]
  )
  noise = _one_noise(pipe, seed)
  return decode(
    pipe,
    image_embed,
    x_T=np.repeat(noise, len(kept), axis=0),
    decoder_steps=decoder_steps,
    seed=seed,
  )


def fit_pca(embeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean [D] and components [D, D], rows by decreasing variance, of [N, D]."""
  mean = embeds.mean(axis=0)
  covariance = np.cov(embeds, rowvar=False)
  _, vectors = np.linalg.eigh(covariance)
  return mean, vectors[:, ::-1].T.astype(embeds.dtype)


def typographic_attack(
  pipe: UnCLIPPipeline,
  image: Picture,
  word: str,
  labels: Sequence[str],
  *,
  num_images: int = 4,
  seed: int = 0,
) -> Attacked:
  """What CLIP and the decoder see when a word is written on a picture.

  Section 4, Fig. 6: CLIP takes the apple for what is written on it, while
  the decoder still draws apples.

  Args:
    labels: captions between which the CLIP decides.
  """
  picture = preprocess.square(_to_pil(image), pipe.image_size)
  pen = ImageDraw.Draw(picture)
  font = ImageFont.load_default(max(8, pipe.image_size // 5))
  left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
  x = (pipe.image_size - (right - left)) / 2 - left
  y = (pipe.image_size - (bottom - top)) / 2 - top
  pen.rectangle(
    (x + left - 2, y + top - 2, x + right + 2, y + bottom + 2), fill="white"
  )
  pen.text((x, y), word, "black", font)
  z_i = _image_embed(pipe, [picture])
  output = decode(pipe, z_i.repeat(num_images, axis=0), seed=seed)
  probabilities = classify(pipe, [picture], labels)[0]
  return Attacked(picture, dict(zip(labels, probabilities.tolist())), output)


def classify(
  pipe: UnCLIPPipeline, images: Sequence[Picture], labels: Sequence[str]
) -> np.ndarray:
  """Between which captions the CLIP decides (Radford et al. 2021, 3.1).

  Returns:
    Probabilities [N, L], of each picture for each of the labels.
  """
  cosines = (
    _unit(_image_embed(pipe, images)) @ _unit(_text_embed(pipe, labels)).T
  )
  clip = pipe.parts["clip"]
  # Karlo's CLIP comes without its scale; OpenAI's ended at the largest one.
  largest = np.log(clip.task.max_logit_scale)
  logit_scale = clip.variables["params"].get("logit_scale", largest)
  logits = np.exp(np.asarray(tensor_files.loaded(logit_scale))) * cosines
  return scipy.special.softmax(logits, axis=-1)


def three_decodings(
  pipe: UnCLIPPipeline,
  prompts: Sequence[str],
  *,
  guidance_scale: float | None = None,
  seed: int = 0,
  batch_size: int = 16,
) -> dict[str, PipelineOutput]:
  """The same decoder fed in three ways (section 5.1, Fig. 8).

  Returns:
    "caption": the text alone. "text_embed": z_t as if it were an image
    embedding, at the length that image embeddings have, and the text.
    "prior": the prior's z_i and the text, which is the whole model, if there
    is a prior.
  """
  text = pipe.tokenize(prompts)
  z_t = as_image_embed(pipe, text)
  options = {"guidance_scale": guidance_scale}
  outputs = {}
  for name, image_embed, use in (
    ("caption", np.zeros_like(z_t), False),
    ("text_embed", z_t, True),
  ):
    batch = {**text, "image_embed": image_embed}
    stage = {**options, "use_image_embed": use}
    outputs[name] = _draw(pipe, batch, stage, {}, seed, batch_size)
  if "prior" in pipe.parts:
    outputs["prior"] = pipe(
      prompts, guidance_scale=guidance_scale, seed=seed, batch_size=batch_size
    )
  return outputs


def as_image_embed(
  pipe: UnCLIPPipeline, text: Mapping[str, np.ndarray]
) -> np.ndarray:
  """z_t [N, D] of what `tokenize` returned, as long as image embeddings are."""
  return _unit(pipe.encode_text(text)) * _typical_length(pipe)


def image_to_image(
  pipe: Pipeline,
  image: Picture,
  prompt: str,
  *,
  strength: float = 0.6,
  num_images: int = 4,
  guidance_scale: float | None = None,
  seed: int = 0,
) -> PipelineOutput:
  """A picture drawn anew from its noised self, for a prompt (SDEdit).

  Args:
    strength: in (0, 1], how much of the decoder's way is gone again; the
      upsamplers draw all of theirs.

  Raises:
    UserError: the model does not draw by diffusion.
  """
  pipe.check_option(pipe.first, "init")
  size = pipe.sizes()[pipe.first]
  init = stages.square_arrays([image], size).repeat(num_images, axis=0)
  options = {"guidance_scale": guidance_scale, "strength": strength}
  return _draw(
    pipe,
    pipe.tokenize([prompt] * num_images),
    options,
    {pipe.first: {"init": init}},
    seed,
    16,
  )


def inpaint(
  pipe: Pipeline,
  image: Picture,
  mask: Picture,
  prompt: str,
  *,
  num_images: int = 4,
  num_resamples: int = 1,
  guidance_scale: float | None = None,
  seed: int = 0,
) -> PipelineOutput:
  """Draws a part of a picture anew, for a prompt.

  Every stage keeps the known pixels (diffusion.process.Process.sample), so
  that what is drawn fits them; they come out unchanged, bit for bit.

  Args:
    mask: of the picture's size, where it is not black is drawn anew.
    num_resamples: above 1 the decoder draws by RePaint (samplers.ddpm), so many
      times slower and a better fit to what is known.

  Raises:
    UserError: the mask is of another size, nothing is to be drawn, or the
      model does not draw by diffusion.
  """
  pipe.check_option(pipe.first, "known")
  picture, mask_picture = _to_pil(image), _to_pil(mask).convert("L")
  if picture.size != mask_picture.size:
    raise errors.UserError(
      f"the mask has {mask_picture.size} pixels and the picture"
      f" {picture.size}: they must be of one size"
    )
  size = pipe.image_size
  known = stages.square_arrays([picture], size)
  reduced = preprocess.square(mask_picture, size)
  is_known = np.asarray(reduced)[None, :, :, None] == 0
  if is_known.all():
    raise errors.UserError("the mask is black: nothing is to be drawn anew")
  arrays = {}
  for name, side in pipe.sizes().items():
    factor = size // side
    smaller = pictures.area_resize(known, side, side)
    # A pixel is known where all that it covers is.
    blocks = is_known.reshape(1, side, factor, side, factor, 1)
    arrays[name] = {
      "known": smaller.astype(np.float32).repeat(num_images, axis=0),
      "is_known": blocks.all(axis=(2, 4)).repeat(num_images, axis=0),
    }
  options: dict[str, Any] = {"guidance_scale": guidance_scale}
  if num_resamples > 1:
    options |= {"sampler": "ddpm", "num_resamples": num_resamples}
  batch = pipe.tokenize([prompt] * num_images)
  return _draw(pipe, batch, options, arrays, seed, 16)


def outpaint(
  pipe: Pipeline,
  image: Picture,
  prompt: str,
  *,
  padding: tuple[int, int, int, int],
  guidance_scale: float | None = None,
  seed: int = 0,
) -> Image.Image:
  """A larger canvas around a picture, filled window by window.

  The picture, in the pipeline's size F, keeps its pixels. Windows of F x F,
  half overlapping, are inpainted from the picture outwards.

  Args:
    padding: pixels to add left, above, right and below.

  Raises:
    UserError: a negative padding.
  """
  if min(padding) < 0:
    raise errors.UserError(f"the padding {padding} must not be negative")
  left, top, right, bottom = padding
  size = pipe.image_size
  square = preprocess.square(_to_pil(image), size)
  canvas = Image.new("RGB", (left + size + right, top + size + bottom), "white")
  canvas.paste(square, (left, top))
  is_drawn = np.zeros((canvas.height, canvas.width), bool)
  is_drawn[top : top + size, left : left + size] = True
  corners = [
    (x, y)
    for y in _starts(canvas.height, size, top)
    for x in _starts(canvas.width, size, left)
  ]
  corners.sort(key=lambda c: (c[0] - left) ** 2 + (c[1] - top) ** 2)
  for number, (x, y) in enumerate(corners):
    window = is_drawn[y : y + size, x : x + size]
    if window.all():
      continue
    output = inpaint(
      pipe,
      canvas.crop((x, y, x + size, y + size)),
      Image.fromarray(np.where(window, 0, 255).astype(np.uint8)),
      prompt,
      num_images=1,
      guidance_scale=guidance_scale,
      seed=seed + number,
    )
    canvas.paste(output.images[0], (x, y))
    window[:] = True
  return canvas


def _starts(length: int, size: int, start: int) -> list[int]:
  """Window starts that cover [0, length), half a window apart from `start`."""
  step = size // 2
  inner = range(start % step, length - size + 1, step)
  return sorted({0, *inner, start, length - size})


def _draw(
  pipe: Pipeline,
  batch: dict[str, np.ndarray],
  first_options: dict[str, Any],
  arrays: dict[str, dict[str, np.ndarray]],
  seed: int,
  batch_size: int,
  noise: Mapping[str, jax.Array] | None = None,
) -> PipelineOutput:
  """Decoder and upsamplers; the prior before them, where no z_i is given."""
  options: dict[str, dict[str, Any]] = {pipe.first: first_options}
  if "image_embed" not in batch and "prior" in pipe.parts:
    options = {"prior": {}, **options}
  options |= {name: {} for name in pipe.upsamplers}
  output = pipe.draw(
    batch,
    options,
    arrays=arrays,
    seed=seed,
    batch_size=batch_size,
    noise=noise,
  )
  return output._replace(images=[preprocess.to_pil(x) for x in output.images])


def _text(
  pipe: UnCLIPPipeline, prompts: Sequence[str] | None, count: int
) -> dict[str, np.ndarray]:
  if prompts is not None and len(prompts) != count:
    raise errors.UserError(
      f"there are {count} pictures and {len(prompts)} prompts: give one each"
    )
  return pipe.tokenize([""] * count if prompts is None else prompts)


def _to_pil(image: Picture) -> Image.Image:
  if isinstance(image, np.ndarray):
    return preprocess.to_pil(image)
  return image.convert("RGB") if image.mode != "L" else image


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _image_embed(pipe: UnCLIPPipeline, images: Sequence[Picture]) -> np.ndarray:
  size = pipe.parts["clip"].task.image_size
  return pipe.encode_image(stages.square_arrays(images, size))


def _text_embed(pipe: UnCLIPPipeline, prompts: Sequence[str]) -> np.ndarray:
  return pipe.encode_text(pipe.tokenize(prompts))


def _typical_length(pipe: UnCLIPPipeline) -> float:
  """Root mean square length of image embeddings, of the decoder's table."""
  table = pipe.parts["decoder"].frozen["embedding_space"]
  return float(jnp.sqrt(jnp.sum(table["mean"] ** 2 + table["std"] ** 2)))


def _one_noise(pipe: UnCLIPPipeline, seed: int) -> np.ndarray:
  size = pipe.parts["decoder"].task.model.image_size
  return np.asarray(jax.random.normal(jax.random.key(seed), (1, size, size, 3)))
