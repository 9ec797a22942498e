"""Run the command: the console script, and `python -m stayaligned`.

`gate` runs in a child process. Its exit code 1 means "fail", and libraries can end a process with 1: for lack of
memory, OpenBLAS calls C's `exit(1)` while numpy is imported. The parent imports no library, and gives a 0, 1 or 3 only
if the child has said that it ends with this code.
"""

from __future__ import annotations

import os
import sys

_DECISIONS = (0, 1, 3)
_NO_DECISION = 2


def main() -> None:
    """Run the command; see `stayaligned.cli.main`."""
    if sys.argv[1:2] == ["gate"] and hasattr(os, "fork"):
        _gate()
    from stayaligned.cli import main as run

    run()


def _gate() -> None:
    """Run the gate in a child process, and end with its exit code or by its signal."""
    try:
        import signal

        forwarded = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)
        reading, writing = os.pipe()
        child = os.fork()
    except BaseException as error:  # 1, the exit code of an error, would be a decision
        os.write(2, f"error: the gate can't be started: {type(error).__name__}: {error}\n".encode())
        os._exit(_NO_DECISION)
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _run_and_tell(writing)
    code = _NO_DECISION
    try:
        for number in forwarded:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda sent, _frame: os.kill(child, sent))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 128 - status if status < 0 else status
        os.set_blocking(reading, False)
        if code in _DECISIONS and os.read(reading, 1) != bytes([code]):
            code = _NO_DECISION
        if status < 0:
            if -status != signal.SIGKILL:
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
    except BaseException:
        code = code if code not in _DECISIONS else _NO_DECISION
    os._exit(code)


def _run_and_tell(writing: int) -> None:
    """Run the command, tell the parent process with which exit code it ends, and end."""
    code = _NO_DECISION
    try:
        from stayaligned.cli import main as run

        run()
        code = 0
    except SystemExit as ended:
        code = 0 if ended.code is None else ended.code if isinstance(ended.code, int) else _NO_DECISION
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        os.write(2, f"error: {type(error).__name__}: {error}\n".encode())
    os.write(writing, bytes([code & 255]))
    sys.exit(code)


if __name__ == "__main__":
    main()
