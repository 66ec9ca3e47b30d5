"""The state directory: sealed files, one a session, that are whole or set aside, and locks between processes."""

# ruff: noqa: ASYNC240 - a few small files of a test's own directory keep nobody waiting

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provider.state import FORMAT, MAGIC, MAX_FILE_BYTES, Entry, StateDir, StateUnusable, _is_in_memory
from tests.test_audit import no_file_larger_than

KEY = b"k" * 32
NAME = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
PAYLOAD = {"token": "hvs.canary-of-the-state", "count": 3}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run" / "state"


@pytest.fixture
def state(directory: Path) -> StateDir:
    return StateDir(str(directory), KEY)


async def saved(state: StateDir, generation: int = 1) -> None:
    await state.save(NAME, Entry(generation, PAYLOAD))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_what_was_saved_is_loaded(state: StateDir) -> None:
    """An entry comes back with its generation, in another process with the same key too; others are not there."""
    await saved(state, 7)
    assert await state.load(NAME) == Entry(7, PAYLOAD)
    assert state.generation(NAME) == 7
    assert state.keys() == [NAME]
    assert await state.load(OTHER) is None
    assert state.generation(OTHER) is None


async def test_another_daemon_reads_it(state: StateDir, directory: Path) -> None:
    """What one daemon sealed, another with the same key opens."""
    await saved(state)
    assert await StateDir(str(directory), KEY).load(NAME) == Entry(1, PAYLOAD)


@pytest.mark.parametrize(
    ("in_memory", "small", "at_once"), [(True, True, True), (True, False, False), (False, True, False)]
)
async def test_only_what_waits_for_nothing_is_written_on_the_event_loop(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, in_memory: bool, small: bool, at_once: bool
) -> None:
    """A small entry of a directory in memory is; a large one is not, nor any on a disk, which may be full or slow."""
    threads: list[threading.Thread] = []
    write = StateDir._save

    def watched(state: StateDir, key: str, entry: Entry) -> None:
        threads.append(threading.current_thread())
        write(state, key, entry)

    monkeypatch.setattr(StateDir, "_save", watched)
    monkeypatch.setattr(state, "_in_memory", in_memory)
    await state.save(NAME, Entry(1, PAYLOAD), small=small)
    assert [thread is threading.current_thread() for thread in threads] == [at_once]
    assert await state.load(NAME) == Entry(1, PAYLOAD)


def test_a_disk_is_no_memory() -> None:
    """Any file system but a tmpfs may make a write wait."""
    assert not _is_in_memory(Path("/sys/kernel"))


def test_state_in_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the daemon keeps it, below /run, it is in memory; where the kernel does not tell, it is not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        assert _is_in_memory(Path(memory))
        assert StateDir(f"{memory}/state", KEY)._in_memory
        monkeypatch.setattr(Path, "read_bytes", no_file)
        assert not StateDir(f"{memory}/state", KEY)._in_memory


def no_file(path: Path) -> bytes:
    raise FileNotFoundError(path)


def test_mounts_of_any_name_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is no UTF-8, or has what some take for the end of a line, hides no other mount."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        odd = b"".join(b"1 2 9:9 / /caf\xe9%s rw - ext4 x rw\n" % end for end in (b"\x0c", b"\x0b", b"\x85", b"\x1c"))
        mounts = odd + Path("/proc/self/mountinfo").read_bytes()
        monkeypatch.setattr(Path, "read_bytes", lambda _: mounts)
        assert _is_in_memory(Path(memory))


@settings(max_examples=20)
@given(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text())), max_size=5))
def test_any_json_object_comes_back(tmp_path_factory: pytest.TempPathFactory, payload: dict[str, object]) -> None:
    """Any JSON object, whatever characters it holds, is the same after saving and loading."""
    state = StateDir(str(tmp_path_factory.mktemp("state")), KEY)

    async def scene() -> None:
        await state.save(NAME, Entry(1, payload))
        assert await state.load(NAME) == Entry(1, payload)

    asyncio.run(scene())


async def test_nothing_on_disk_is_readable(state: StateDir, directory: Path) -> None:
    """No byte of the payload, not even a name of a field, is in any file of the directory; nor in the entry's repr."""
    await saved(state)
    async with state.lock(NAME):
        state.hold()
        for path in directory.rglob("*"):
            assert b"canary" not in path.read_bytes()
            assert b"token" not in path.read_bytes()
    assert "canary" not in repr(Entry(1, PAYLOAD))


async def test_equal_payloads_are_sealed_differently(state: StateDir, directory: Path) -> None:
    """Each save takes a new nonce: two files of one content have nothing in common behind their heads."""
    await saved(state)
    first = (directory / f"{NAME}.session").read_bytes()
    await saved(state)
    second = (directory / f"{NAME}.session").read_bytes()
    assert first[:13] == second[:13]
    assert first[13:25] != second[13:25]
    assert first[25:] != second[25:]


async def test_modes(directory: Path) -> None:
    """The directory is 0700 and every file in it 0600, whatever the umask; a wider directory is narrowed."""
    directory.mkdir(mode=0o755, parents=True)
    directory.chmod(0o755)
    before = os.umask(0)
    try:
        state = StateDir(str(directory), KEY)
        await saved(state)
        assert state.hold()
        async with state.lock(NAME):
            assert mode(directory) == 0o700
            assert {mode(path) for path in directory.iterdir()} == {0o600}
    finally:
        os.umask(before)
        state.close()


def test_directory_of_another_user_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that somebody else made is not trusted."""
    directory.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StateUnusable, match="belongs to another user"):
        StateDir(str(directory), KEY)


def test_file_in_place_of_the_directory(directory: Path) -> None:
    """What is no directory cannot be used, and the error is one of ours."""
    directory.parent.mkdir()
    directory.write_text("")
    with pytest.raises(StateUnusable, match="cannot use the state directory"):
        StateDir(str(directory), KEY)


# What does not open -----------------------------------------------------------------------------------------------


def _flip(position: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in its head": lambda raw: raw[:6],
    "cut in its nonce": lambda raw: raw[:20],
    "cut in its seal": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0",
    "foreign": lambda raw: b'{"not": "ours"}' * 10,
    "another magic": _flip(0),
    "generation changed": _flip(12),
    "nonce changed": _flip(13),
    "one bit of it": _flip(40),
    "huge": lambda raw: raw + b"\0" * MAX_FILE_BYTES,
}


@pytest.mark.parametrize("how", SPOILED)
async def test_spoiled_file_is_set_aside(
    state: StateDir, directory: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is damaged, cut or foreign is no entry: it is set aside with a warning, and not looked at again."""
    await saved(state)
    path = directory / f"{NAME}.session"
    path.write_bytes(SPOILED[how](path.read_bytes()))
    assert await state.load(NAME) is None
    assert state.keys() == []
    assert (directory / f"{NAME}.session.aside").exists()
    assert "is set aside" in caplog.text
    assert "canary" not in caplog.text
    assert await state.load(NAME) is None
    assert caplog.text.count("is set aside") == 1
    await saved(state, 2)
    assert await state.load(NAME) == Entry(2, PAYLOAD)


@settings(max_examples=30)
@given(st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever byte of a file is changed, and to what: it does not open."""
    directory = tmp_path_factory.mktemp("state")
    state = StateDir(str(directory), KEY)

    async def scene() -> None:
        await saved(state)
        path = directory / f"{NAME}.session"
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
        assert await state.load(NAME) is None

    asyncio.run(scene())


async def test_later_format_is_set_aside(state: StateDir, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of a format that is not known here is left as it was, under another name, for who knows it."""
    await saved(state)
    path = directory / f"{NAME}.session"
    raw = path.read_bytes()
    later = MAGIC + bytes([FORMAT + 1]) + raw[len(MAGIC) + 1 :]
    path.write_bytes(later)
    assert await state.load(NAME) is None
    assert (directory / f"{NAME}.session.aside").read_bytes() == later
    assert f"format {FORMAT + 1} is not known" in caplog.text


async def test_renamed_file_does_not_open(state: StateDir, directory: Path) -> None:
    """A file is bound to its name: one session's cannot be put in another's place."""
    await saved(state)
    (directory / f"{NAME}.session").rename(directory / f"{OTHER}.session")
    assert await state.load(OTHER) is None


async def test_another_key_does_not_open(state: StateDir, directory: Path) -> None:
    """With another HMAC key nothing of before is readable."""
    await saved(state)
    assert await StateDir(str(directory), b"x" * 32).load(NAME) is None


async def test_other_names_are_nobodys_entries(state: StateDir, directory: Path) -> None:
    """Files of other names are neither listed nor touched."""
    for name in ("notes.txt", "short.session", f"{NAME.upper()}.session", f"{NAME}.session.77.new", f"{NAME}.lock"):
        (directory / name).write_text("foreign")
    assert state.keys() == []


async def test_unreadable_file_is_no_entry(state: StateDir, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read for now is told of, and left."""
    await saved(state)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert await state.load(NAME) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "cannot read the session state" in caplog.text
    assert await state.load(NAME) == Entry(1, PAYLOAD)


# What is no file --------------------------------------------------------------------------------------------------


def _socket(path: Path) -> None:
    # Made in the directory itself, since the whole path may be too long for a socket's.
    with socket.socket(socket.AF_UNIX) as made:
        before = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.fchdir(before)
            os.close(before)


def _link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_text("of others")
    path.symlink_to(elsewhere)


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.parent.parent / "pipe")
    path.symlink_to(path.parent.parent / "pipe")


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "directory": Path.mkdir,
    "link": _link,
    "link to itself": _link_to_itself,
    "link to a pipe": _link_to_a_pipe,
    "link to nothing": lambda path: path.symlink_to(path.parent.parent / "made"),
}


def untouched(directory: Path) -> bool:
    """Whether what links lead to is as it was."""
    elsewhere = directory.parent / "elsewhere"
    return not (directory.parent / "made").exists() and (not elsewhere.exists() or elsewhere.read_text() == "of others")


@pytest.mark.parametrize("kind", NO_FILES)
async def test_what_is_no_file_in_place_of_an_entry(
    state: StateDir, directory: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps nobody waiting and leads nowhere: it is set aside with a warning, and the entry takes its place."""
    path = directory / f"{NAME}.session"
    NO_FILES[kind](path)
    assert state.generation(NAME) in (None, 0)
    assert await state.load(NAME) is None
    assert "is set aside" in caplog.text
    assert "it is no regular file" in caplog.text
    assert state.keys() == []
    await saved(state)
    assert await state.load(NAME) == Entry(1, PAYLOAD)
    assert stat.S_ISREG(path.lstat().st_mode)
    assert untouched(directory)


@pytest.mark.parametrize("kind", NO_FILES)
async def test_what_is_no_file_in_place_of_a_new_one(state: StateDir, directory: Path, kind: str) -> None:
    """What has the name under which an entry is written is removed, not written to; a directory is an error."""
    NO_FILES[kind](directory / f"{NAME}.session.{os.getpid()}.new")
    if kind == "directory":
        with pytest.raises(StateUnusable, match="cannot write to"):
            await saved(state)
    else:
        await saved(state)
        assert await state.load(NAME) == Entry(1, PAYLOAD)
        assert [path.name for path in directory.iterdir()] == [f"{NAME}.session"]
    assert untouched(directory)


@pytest.mark.parametrize("kind", NO_FILES)
async def test_what_is_no_file_in_place_of_a_lock(state: StateDir, directory: Path, kind: str) -> None:
    """It is no lock, and an error that says so; a link makes no file elsewhere."""
    NO_FILES[kind](directory / f"{NAME}.lock")
    with pytest.raises(StateUnusable, match=r"cannot lock in .*: it is no regular file"):
        async with state.lock(NAME):
            pass
    assert untouched(directory)
    (directory / f"{NAME}.lock").rename(directory / "directory.lock")
    with pytest.raises(StateUnusable, match="it is no regular file"):
        state.hold()
    assert untouched(directory)


@pytest.mark.parametrize("kind", NO_FILES)
async def test_directory_that_others_wrote_to(directory: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is narrowed, which is told; what they put in place of entries and locks is set aside, and all works."""
    caplog.set_level("INFO")
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    NO_FILES[kind](directory / f"{NAME}.lock")
    (directory / "directory.lock").symlink_to(directory.parent / "made")
    (directory / f"{OTHER}.session").symlink_to(directory.parent / "made")
    state = StateDir(str(directory), KEY)
    assert mode(directory) == 0o700
    assert "had mode 0777 and is its user's alone from now on: others may have removed sessions" in caplog.text
    assert caplog.text.count("it is no regular file") == 3
    assert state.hold()
    async with state.lock(NAME):
        await saved(state)
    assert state.keys() == [NAME]
    state.close()
    assert untouched(directory)
    caplog.clear()
    StateDir(str(directory), KEY)
    assert caplog.text == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_of_others_are_set_aside(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A lock that another user made could be held by that user for ever; other names are left."""
    directory.mkdir(mode=0o700, parents=True)
    for name in ("directory.lock", f"{NAME}.session", "notes.txt"):
        (directory / name).touch()
        os.chown(directory / name, 1234, 1234)
    state = StateDir(str(directory), KEY)
    assert caplog.text.count("it belongs to another user") == 2
    assert {path.name for path in directory.iterdir()} == {
        "directory.lock.aside",
        f"{NAME}.session.aside",
        "notes.txt",
    }
    assert state.hold()
    state.close()


async def test_what_cannot_be_set_aside_is_told_so(
    state: StateDir, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the name is taken by what cannot be replaced, the warning does not claim that it was."""
    (directory / f"{NAME}.session").write_bytes(b"")
    (directory / f"{NAME}.session.aside").mkdir()
    assert await state.load(NAME) is None
    assert "cannot be set aside (Is a directory): it is damaged" in caplog.text


# Writing ----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("at", ["fsync", "replace"])
async def test_crash_while_writing_leaves_the_old(state: StateDir, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Until the rename the old entry is there, whole; a half-written file is no entry."""
    await saved(state)

    def crash(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(state, "_in_memory", False)
    monkeypatch.setattr(*((os, "fsync", crash) if at == "fsync" else (Path, "replace", crash)))
    with pytest.raises(Crash):
        await state.save(NAME, Entry(2, {"half": "written"}))
    monkeypatch.undo()
    assert await state.load(NAME) == Entry(1, PAYLOAD)
    assert state.keys() == [NAME]


async def test_contents_are_on_disk_before_the_name(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is write, fsync, rename, fsync of the directory: no name stands for contents that are missing."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def see_fsync(descriptor: int) -> None:
        steps.append("fsync of directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "fsync of file")
        assert os.fstat(descriptor).st_size > 0
        fsync(descriptor)

    def see_replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", see_fsync)
    monkeypatch.setattr(Path, "replace", see_replace)
    monkeypatch.setattr(state, "_in_memory", False)
    await saved(state)
    assert steps == ["fsync of file", "rename", "fsync of directory"]
    # What ends with the node's memory is never read after it.
    steps.clear()
    monkeypatch.setattr(state, "_in_memory", True)
    await saved(state)
    assert steps == ["rename"]


async def test_full_disk_leaves_the_old(state: StateDir, directory: Path) -> None:
    """Where there is no space, the error is one of ours, the old entry stays, and no half file is left."""
    await saved(state)
    with no_file_larger_than(10), pytest.raises(StateUnusable, match="File too large"):
        await state.save(NAME, Entry(2, {"second": True}))
    assert await state.load(NAME) == Entry(1, PAYLOAD)
    assert {path.name for path in directory.iterdir()} == {f"{NAME}.session"}


async def test_directory_that_vanished(state: StateDir, directory: Path) -> None:
    """Without the directory there is nothing to load; the next lock makes it again, for its owner alone."""
    directory.rmdir()
    assert state.keys() == []
    assert await state.load(NAME) is None
    with pytest.raises(StateUnusable, match="cannot write"):
        await saved(state)
    async with state.lock(NAME):
        await saved(state)
    assert await state.load(NAME) == Entry(1, PAYLOAD)
    assert mode(directory) == 0o700


async def test_directory_that_cannot_be_made_again(state: StateDir, directory: Path) -> None:
    """Where something else stands in its place, or in its way, locks are errors of ours."""
    directory.rmdir()
    directory.touch()
    with pytest.raises(StateUnusable, match="cannot lock"):
        async with state.lock(NAME):
            pass
    directory.unlink()
    directory.parent.rmdir()
    directory.parent.touch()
    with pytest.raises(StateUnusable, match="cannot lock"):
        state.hold()


async def test_fault_is_told_once(state: StateDir, caplog: pytest.LogCaptureFixture) -> None:
    """However many entries meet it, one fault is one line, and its end another; the next fault is told again."""
    caplog.set_level("INFO")
    for round_ in (1, 2):
        for name in (NAME, OTHER):
            with no_file_larger_than(10), pytest.raises(StateUnusable):
                await state.save(name, Entry(1, PAYLOAD))
        assert caplog.text.count("cannot write to the state directory") == round_
        assert caplog.text.count("is written to again") == round_ - 1
        await saved(state)
        await saved(state)
        assert caplog.text.count("is written to again") == round_


async def test_entry_that_is_too_large_is_told_once(state: StateDir, caplog: pytest.LogCaptureFixture) -> None:
    """An entry over the limit is not written, and told of once, until it fits or is removed."""
    huge = Entry(1, {"value": "x" * MAX_FILE_BYTES})
    for round_, between in ((1, None), (2, "saved"), (3, "removed")):
        if between == "saved":
            await saved(state)
        elif between == "removed":
            state.remove(NAME)
        for _ in range(2):
            with pytest.raises(StateUnusable, match="more than"):
                await state.save(NAME, huge)
        assert caplog.text.count("more than") == round_


async def test_removed_entry_leaves_nothing(state: StateDir, directory: Path) -> None:
    """Removing takes the entry and its lock away; removing what is not there is no error."""
    async with state.lock(NAME):
        await saved(state)
        state.remove(NAME)
        state.remove(NAME)
    assert list(directory.iterdir()) == []


# Locks ------------------------------------------------------------------------------------------------------------


async def test_entry_is_locked_against_another_daemon(
    state: StateDir, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While one daemon holds an entry's lock another waits for it, and says so after a while; entries are locked one
    by one.
    """
    monkeypatch.setattr("provider.state._LOCK_TRIES_TOLD", 2)
    other = StateDir(str(directory), KEY)
    entered = asyncio.Event()

    async def wait() -> None:
        async with other.lock(NAME):
            entered.set()

    async with state.lock(NAME):
        waiting = asyncio.create_task(wait())
        async with other.lock(OTHER):
            pass
        await asyncio.sleep(0.2)
        assert not entered.is_set()
        assert caplog.text.count(f"another process holds {NAME}.lock: mounts of its pod wait for it") == 1
    await waiting
    assert entered.is_set()


async def test_lock_of_a_removed_entry_is_taken_anew(state: StateDir, directory: Path) -> None:
    """Who waited for a lock that was removed meanwhile holds a lock that others see, not the old one."""
    other, third = StateDir(str(directory), KEY), StateDir(str(directory), KEY)
    held: list[str] = []
    entered = asyncio.Event()

    async def wait() -> None:
        async with other.lock(NAME):
            held.append("second")
            entered.set()
            await asyncio.sleep(0.1)
            held.append("second ends")

    async with state.lock(NAME):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.05)
        state.remove(NAME)
    await entered.wait()
    async with third.lock(NAME):
        held.append("third")
    await waiting
    assert held == ["second", "second ends", "third"]


async def test_cancelled_holder_lets_go(state: StateDir, directory: Path) -> None:
    """A holder that is cancelled gives the lock back."""
    other = StateDir(str(directory), KEY)

    async def hold() -> None:
        async with state.lock(NAME):
            await asyncio.sleep(60)

    holding = asyncio.create_task(hold())
    await asyncio.sleep(0.01)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    async with asyncio.timeout(5), other.lock(NAME):
        pass


def test_directory_is_held_by_one(state: StateDir, directory: Path) -> None:
    """One of two daemons holds the directory, as long as it runs; asking again is answered alike."""
    other = StateDir(str(directory), KEY)
    assert [state.hold(), state.hold(), other.hold()] == [True, True, False]
    state.close()
    assert other.hold()
    other.close()


def test_lock_of_an_emptied_directory_is_taken_anew(state: StateDir, directory: Path) -> None:
    """Who held the directory believes so no more once its lock is gone: another daemon may have made it anew."""
    other = StateDir(str(directory), KEY)
    assert state.hold()
    (directory / "directory.lock").unlink()
    assert [other.hold(), state.hold()] == [True, False]
    other.close()
    assert state.hold()
    (directory / "directory.lock").unlink()
    assert [state.hold(), other.hold()] == [True, False]
    state.close()


def test_read_only_leftovers_are_no_fault(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that can be read and not written is used as it is: what is in it can be taken up."""
    directory.mkdir(mode=0o700, parents=True)
    left = directory / f"{NAME}.session.77.new"
    left.touch()
    os.utime(left, (0, 0))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    assert StateDir(str(directory), KEY).keys() == []
    monkeypatch.undo()
    StateDir(str(directory), KEY)
    assert not left.exists()
