"""Small files: written whole or not at all, read up to a limit."""

import errno
import os
from pathlib import Path

from jaxlm.config.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that say a disk has no room."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new (text as UTF-8), also after a kill or a power loss. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Make the names of the files in a folder survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_limited(path: Path, largest: int, name: str, *, unreadable: str, too_large: str) -> bytes:
    """The content of a file that somebody else may have written, read no further than `largest` bytes.

    Raises:
        UserError: it cannot be read or is larger; `name` is the file in the message, the others end it with the cure.
    """
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}; {unreadable}") from None
    if len(content) > largest:
        raise UserError(f"{name} is over {largest} bytes; {too_large}")
    return content
