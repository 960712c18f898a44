"""Work in a forked child: for scripts that tests run in a process of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def in_child(work: Callable[[], bool]) -> bool:
    """Whether work() is true in a forked child, which has a minute."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if work() else 1)
    return os.waitpid(pid, 0)[1] == 0
