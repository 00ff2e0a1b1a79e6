"""The entry point of the `cpattn` command; the commands themselves are in `commands`."""

import errno
import os
import sys

# What it prints to cannot take it: a full disk, a quota, a reader that has gone.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)


def main() -> None:
    """Run the command line, or say how to install what it needs (the extra `cli` is optional)."""
    try:
        from cpattn.launch.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        print(
            f"the cpattn command needs typer and rich, and {error.name} is not installed: "
            f"run pip install 'cpattn[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again, and complains
        print(f"error: the output could not be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
