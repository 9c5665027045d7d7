"""Programs: exit codes and messages, each in a process of its own."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
  """Runs a small program with a config; returns the finished process."""
  folder = tmp_path_factory.mktemp("program")
  (folder / "config.py").write_text(
    textwrap.dedent("""
      from unclip_jax.utils import config as config_lib

      def get_config(arg=None):
        arg = config_lib.parse_arg(arg, quick=False)
        return dict(
          quick=arg.quick, optim=dict(lr=0.1, nesterov=False), shift=1
        )
    """)
  )
  (folder / "program.py").write_text(
    textwrap.dedent('''
      """Says what its config is."""

      from absl import flags, logging

      from unclip_jax.utils import errors, programs

      CONFIG = programs.config_flag()
      MODE = flags.DEFINE_string("mode", None, "What to do.", required=True)

      def main():
        logging.info("an info")
        print(CONFIG.value.to_dict())
        if MODE.value == "mistake":
          raise errors.UserError("the user's\\nmistake")
        if MODE.value == "bug":
          raise ValueError("our bug")
        if MODE.value == "interrupt":
          raise KeyboardInterrupt

      if __name__ == "__main__":
        programs.run(main, argument="mode")
    ''')
  )

  def run(*args):
    return subprocess.run(
      [sys.executable, str(folder / "program.py"), *args],
      cwd=folder,
      env={**os.environ, "PYTHONPATH": str(_ROOT)},
      capture_output=True,
      text=True,
    )

  return run


def _error_lines(process):
  lines = process.stderr.strip().splitlines()
  return [line for line in lines if not line.startswith("I ")]


def test_success_with_overrides(program):
  done = program(
    "--config=config.py:quick",
    "--mode=go",
    "--config.optim.lr=1e-4",
    "--config.shift",
    "-3",
    "--config.optim.nesterov",
  )
  assert done.returncode == 0
  assert eval(done.stdout) == {
    "quick": True,
    "optim": {"lr": 1e-4, "nesterov": True},
    "shift": -3,
  }
  assert done.stderr.startswith("I ") and "an info" in done.stderr


@pytest.mark.parametrize(
  "args, message",
  [
    (["--mode=mistake"], "the user's mistake"),
    (["--mode=go", "--config.optim.lrr=1"], "did you mean 'optim.lr'?"),
    (["--mode=go", "--mod=1"], "Unknown command line flag 'mod'"),
    ([], "--mode=VALUE is required"),
    (["--mode=go", "stray"], "unexpected argument 'stray'"),
  ],
)
def test_mistakes_are_one_line_and_exit_2(program, args, message):
  done = program("--config=config.py", *args)
  assert done.returncode == 2
  (line,) = _error_lines(done)
  assert line.startswith("error: ") and message in line


def test_missing_config_file(program):
  done = program("--config=confg.py", "--mode=go")
  assert done.returncode == 2
  assert "did you mean 'config.py'" in done.stderr


def test_bug_keeps_its_traceback(program):
  done = program("bug", "--config=config.py")
  assert done.returncode == 1
  assert "Traceback" in done.stderr and "our bug" in done.stderr


def test_interrupt(program):
  done = program("--config=config.py", "--mode=interrupt")
  assert done.returncode == 130
  assert _error_lines(done) == ["interrupted"]


def test_only_noisy_libraries_are_quiet_wherever_they_are_installed(tmp_path):
  """Below a folder that is called as our package is, as in a fresh clone."""
  clone = tmp_path / "unclip_jax"
  installed = clone / ".venv/lib/python3/site-packages"
  program = textwrap.dedent("""
    from absl import logging
    import orbax, other
    from unclip_jax.utils import programs

    def main():
      logging.info("own info")
      orbax.say()
      other.say()

    programs.run(main)
  """)
  for name in ("orbax", "other"):
    (installed / name).mkdir(parents=True)
    (installed / name / "__init__.py").write_text(
      "from absl import logging\ndef say():\n"
      f"  logging.info('{name} info')\n  logging.warning('{name} warning')\n"
    )
  (clone / "program.py").write_text(program)
  done = subprocess.run(
    [sys.executable, str(clone / "program.py")],
    env={**os.environ, "PYTHONPATH": f"{installed}:{_ROOT}"},
    check=True,
    capture_output=True,
    text=True,
  )
  lines = done.stderr.splitlines()
  assert [line.split(" ", 2)[2] for line in lines] == [
    *("own info", "orbax warning", "other info", "other warning"),
  ]


def test_help(program):
  done = program("--help")
  assert done.returncode == 0
  assert "Says what its config is." in done.stdout
  assert "--config:" in done.stdout and "--mode:" in done.stdout


@pytest.fixture
def package(tmp_path):
  """A copy of the command with two verbs and a module that is none."""
  folder = tmp_path / "unclip_jax"
  (folder / "utils").mkdir(parents=True)
  for name in ["__main__.py", "utils/config.py", "utils/errors.py"]:
    text = (_ROOT / "unclip_jax" / name).read_text(encoding="utf-8")
    (folder / name).write_text(text, encoding="utf-8")
  verb = (
    '"""{doc}\n\nMore."""\nimport sys\nclass programs:\n  run = print\n'
    'if __name__ == "__main__":\n  programs.run("ran", sys.argv[1:])\n'
  )
  (folder / "train.py").write_text(verb.format(doc="Trains a model."))
  (folder / "sample.py").write_text(verb.format(doc="Draws pictures."))
  (folder / "trainer.py").write_text('"""No program."""\n')

  def run(*args):
    return subprocess.run(
      [sys.executable, "-m", "unclip_jax", *args],
      cwd=tmp_path,
      env={**os.environ, "PYTHONPATH": str(tmp_path)},
      capture_output=True,
      text=True,
    )

  return run


def test_command_runs_a_verb(package):
  done = package("train", "--a=1")
  assert done.returncode == 0
  assert done.stdout == "ran ['--a=1']\n"


@pytest.mark.parametrize("args", [[], ["tarin"], ["trainer"]])
def test_command_lists_the_verbs(package, args):
  done = package(*args)
  assert done.returncode == 2
  assert "Trains a model." in done.stderr and "Draws pictures." in done.stderr
  assert "No program." not in done.stderr
  assert ("did you mean 'train'?" in done.stderr) == bool(args)
