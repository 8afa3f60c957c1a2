"""The command ``lowrank-onnx``. Outside the package, whose import takes a second in which Ctrl-C would show a stack."""

import contextlib
import os
import signal


def main() -> None:
    """Load the package, then run its command line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else the caller wants it ignored
        signal.signal(signal.SIGINT, _stop)
    from lowrank_onnx.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _stop(number: int, frame: object) -> None:
    with contextlib.suppress(OSError):  # standard error may be closed
        os.write(2, b"Error: interrupted; nothing was begun\n")
    os._exit(128 + number)  # nothing is open yet; modules that are half imported may swallow an exception


if __name__ == "__main__":
    main()
