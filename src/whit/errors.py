"""Every error that is meant for a person.

    WhitError                      exit status 2
    ├── ModelError                 the model that was given cannot be used
    │   ├── BrokenFileError        truncated, corrupt or missing file
    │   ├── UnknownArchitectureError
    │   └── BadWeightsError        NaN or infinite weights, a wrong shape
    ├── RecipeError                the request makes no sense (unknown recipe, grid, option)
    │   └── TooLongError           a prompt does not fit in the context
    ├── OutputError                the result cannot be written
    ├── TextError                  the text cannot be scored
    ├── RankError                  another process of the run has ended
    ├── MissingPackageError        an optional package is needed; the message has the install line
    └── CheckFailedError           everything ran, the answer is "no": exit status 1

A message says what is wrong, where, which value was found and which is allowed, and what to do next.
The command line prints it and exits with `exit_status`; a traceback is a bug. A programmer's mistake
is a plain ValueError or TypeError.
"""

from __future__ import annotations


class WhitError(Exception):
    """The root: a problem that the user can do something about. The message is one clear sentence or two."""

    exit_status = 2


class ModelError(WhitError):
    """The model that was given cannot be used."""


class BrokenFileError(ModelError):
    """A file is truncated, corrupt, missing or not what its name says."""


class UnknownArchitectureError(ModelError):
    """No table describes this architecture; the message lists those that are known."""


class BadWeightsError(ModelError):
    """A tensor holds NaN or infinite values, or has a shape that the architecture does not allow."""


class RecipeError(WhitError):
    """The request cannot be met as written; the message lists the names there are."""


class TooLongError(RecipeError):
    """A prompt has more tokens than the context holds; the message has both numbers."""


class OutputError(WhitError):
    """The result cannot be written: no space, no permission, or the file exists."""


class TextError(WhitError):
    """The text cannot be read or is too short to score."""


class RankError(WhitError):
    """Another process of a run with several has ended, or could not be reached."""


class MissingPackageError(WhitError):
    """An optional package is needed; the message says how to install it."""


class CheckFailedError(WhitError):
    """A check ran to its end and the answer is no."""

    exit_status = 1
