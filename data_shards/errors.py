"""The errors a user can cause: the command line prints their message, nothing else, and exits.

They live here, in the lowest layer that raises them, so that ``trainer`` and ``cluster`` share one
hierarchy without ``model`` depending on anything.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the mend.

    ``exit_status`` is what the command line returns: 2 for a wrong input.
    """

    exit_status = 2


class DataError(UserError):
    """A corpus, a shard or a vocabulary is missing, cut short, altered or unusable."""


class RunFailedError(UserError):
    """A run that began could not go on (exit status 1): what happened, and how to go on."""

    exit_status = 1
