import os

import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited, write_atomically


@pytest.mark.parametrize("content", ["é\r\n", b"\x00\xff"])
def test_it_writes_what_it_is_given_and_nothing_else(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_content_stays_until_the_new_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(_):
        raise OSError("a full disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full disk"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_it_reads_up_to_the_limit_and_says_what_else(tmp_path):
    path, cures = tmp_path / "file", {"unreadable": "name another", "too_large": "split it"}
    path.write_bytes(b"12345")
    assert read_limited(path, 5, "it", **cures) == b"12345"
    with pytest.raises(UserError, match="it is over 4 bytes; split it"):
        read_limited(path, 4, "it", **cures)
    with pytest.raises(UserError, match="it cannot be read: Is a directory; name another"):
        read_limited(tmp_path, 4, "it", **cures)
