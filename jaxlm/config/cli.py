"""How a command ends: its exit code, and one line instead of a traceback where a person can put it right."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from jaxlm.config.errors import CommandError
from jaxlm.config.files import FULL

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main` on the command's arguments and end the process.

    Exit codes: what `main` returns (None: 0), or that of its CommandError; 1 where the disk is full; 2 where a file may
    not be read or written; 130 on Ctrl-C; 141 where the reader of our output went away. Anything else is a bug of ours
    and keeps its traceback.
    """
    try:
        code = main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
    except CommandError as error:
        code = _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout once more as it exits
        code = 141
    except OSError as error:
        path = f": {error.filename}" if error.filename else ""
        if error.errno in FULL:
            code = _complain(f"no space left on the disk{path}; free some and run the same command again", 1)
        elif error.errno in REFUSED and error.filename:
            code = _complain(f"{(error.strerror or 'refused').lower()}{path}; change its permissions or the path", 2)
        else:
            raise
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    return code
