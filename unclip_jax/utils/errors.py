"""The one exception that a user's mistake raises."""


class UserError(Exception):
  """A mistake that the user can mend: one line, what is wrong and how to mend.

  Programs print the message without a traceback and exit with code 2
  (utils/programs.py); in a notebook it is an ordinary exception.
  """
