"""`unclip VERB ...`, which is the same as `python -m unclip_jax.VERB ...`."""

from __future__ import annotations

import ast
import pathlib
import runpy
import sys

from unclip_jax.utils import config as config_lib


def verbs() -> dict[str, str]:
  """Name -> first line of the docstring of every program in the package.

  A program is a module that calls `programs.run`; it is read, not imported.
  """
  found = {}
  for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
    source = path.read_text(encoding="utf-8")
    if path.stem != "__main__" and "programs.run(" in source:
      doc = ast.get_docstring(ast.parse(source)) or ""
      found[path.stem] = doc.partition("\n")[0]
  return found


def main() -> None:
  """Runs the verb `sys.argv[1]`; exits with 2 where there is none such."""
  known = verbs()
  verb = sys.argv[1] if len(sys.argv) > 1 else None
  if verb in known:
    del sys.argv[1]
    runpy.run_module(f"unclip_jax.{verb}", run_name="__main__", alter_sys=True)
    return
  wants_help = verb in ("--help", "-h", "help")
  out = sys.stdout if wants_help else sys.stderr
  if verb and not wants_help:
    near = config_lib.suggest(verb, known)
    print(f"error: there is no verb {verb!r}{near}", file=out)
  print("usage: unclip VERB [--FLAG=VALUE ...]\n", file=out)
  for name, line in known.items():
    print(f"  {name:<14}{line}", file=out)
  print("\n`unclip VERB --help` lists the flags of a verb.", file=out)
  sys.exit(0 if wants_help else 2)


if __name__ == "__main__":
  main()
