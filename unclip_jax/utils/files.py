"""Files that are whole or not there."""

from __future__ import annotations

import os
import pathlib

PathLike = str | os.PathLike[str]


def write_atomically(path: PathLike, data: str | bytes) -> None:
  """Writes a file in place of what stands there; text is UTF-8.

  Whoever reads it, or finds it after a crash, has the old or the new one whole.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "wb") as f:
    f.write(data.encode("utf-8") if isinstance(data, str) else data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)
