"""Print a config's parameters, mesh and memory per device; trains nothing.

unclip describe --config configs/emoji/decoder.py
"""

from __future__ import annotations

from unclip_jax import trainer
from unclip_jax.utils import programs

CONFIG = programs.config_flag()


def main() -> None:
  print(trainer.describe(CONFIG.value))


if __name__ == "__main__":
  programs.run(main)
