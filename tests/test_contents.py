"""What a volume holds is counted while it is made, and what is too much is told in one way."""

from __future__ import annotations

import pytest

from provider.errors import BadSecret
from provider.render import Contents, RenderedFile, contents, too_large
from provider.settings import MAX_MOUNT_BYTES, MIB


def file(path: str, size: int = 0) -> RenderedFile:
    """A file of so many bytes."""
    return RenderedFile(path, 0o644, b"c4nary"[:size].ljust(size, b"x"))


def test_what_fits_is_kept_by_object() -> None:
    """Files of each object are there as they were added, and the volume is not full."""
    made = Contents(2)
    made.add("a", (file("a/1", 5), file("a/2")))
    made.add("b", (file("b", MAX_MOUNT_BYTES - 100),))
    assert not made.full
    assert {name: [one.path for one in files] for name, files in made.made.items()} == {"a": ["a/1", "a/2"], "b": ["b"]}


def test_bytes_count_with_path_and_frame() -> None:
    """A volume is full by one byte; the error has sizes rounded up, and the largest files first, no contents."""
    room = MAX_MOUNT_BYTES - file("large").weight
    Contents(1).add("large", (file("large", room),))
    made = Contents(7)
    made.add("small", (file("small", MIB // 10), file("empty")))
    with pytest.raises(BadSecret) as raised:
        made.add("large", (file("large", room - MIB // 10),))
    assert made.full
    assert raised.value.what == (
        "the volume is too large: 2 of its 7 objects come to 4.01 MiB, and the driver takes at most 4.00 MiB; "
        "the largest: large (3.90 MiB), small (0.10 MiB), empty (0.00 MiB)"
    )
    assert "secretKey" in raised.value.advice
    assert made.too_much() is raised.value


def test_files_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little they hold, there is a number of files that a volume may have."""
    monkeypatch.setattr(contents, "MAX_FILES", 3)
    made = Contents(2)
    made.add("a", (file("a/1"), file("a/2"), file("a/3")))
    assert not made.full
    with pytest.raises(BadSecret, match="2 of its 2 objects come to 4 files, and it may have 3"):
        made.add("b", (file("b"),))


def test_names_leave_room() -> None:
    """The longest paths, as many as there are, make a sentence of a few hundred characters."""
    error = too_large("its 9 files come to", 5 * MIB, [file("x" * 4000, size) for size in range(9)])
    assert len(error.what) < 400
    assert error.what.count("x…") == 3
