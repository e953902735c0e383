"""Exit codes of the command line, and the errors that one of them stands for.

A process that SIGTERM ends exits with 128 + 15 = 143, as a shell would report it.
"""

from __future__ import annotations

from flowdata.errors import RankError

DONE = 0
DAMAGED = 1  # `verify` found damage, or a store that is not finished
BAD_INPUT = 2  # nothing is lost; argparse exits with this code for unknown options, too
INTERRUPTED = 130  # by Ctrl-C; the losses scored until then are kept

# Errors that a user can put right are told in one line. Any other error is a bug of the library
# and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RankError)
