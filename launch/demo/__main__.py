"""The demo: train a small transformer on four ranks and on one, and compare. The same as `cpattn demo`:

    python -m cpattn.launch.demo [--data FOLDER]
"""

import typer

from cpattn.launch.demo_command import demo_command

if __name__ == "__main__":
    typer.run(demo_command)
