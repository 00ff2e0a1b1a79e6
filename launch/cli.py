"""The entry point of the `cpattn` command; the commands themselves are in `commands`."""

import sys


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
    app()


if __name__ == "__main__":
    main()
