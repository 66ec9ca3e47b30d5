"""Run a command that dies when its parent does: `python -I -S launch.py PARENT SIGNAL UID GID COMMAND...`.

A file of its own, started by exec, because setting this up between fork and exec inside a process that
has threads (gRPC's, the Kubernetes stand-in's) can deadlock. UID and GID may be `-` to keep the caller's.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Drop privileges where asked, tie this process to its parent, and become the command."""
    parent, signal_number, uid, gid, *command = sys.argv[1:]
    if uid != "-":
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    # After setuid, since changing the user clears the setting (prctl(2)).
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # It died before the line above.
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
