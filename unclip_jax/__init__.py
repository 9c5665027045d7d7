"""unclip_jax: the whole of DALL-E 2 (unCLIP, arXiv 2204.06125) in JAX.

Shape letters used in every docstring of the package:

  B batch            H W C image height, width, channels
  L tokens attended from           M tokens attended to
  D width or embedding size        N heads      K head size
  V vocabulary or codebook size    P patches    T diffusion timesteps

Pictures are NHWC float32 in [-1, 1] unless a docstring says otherwise.
"""

__version__ = "0.1.0"
