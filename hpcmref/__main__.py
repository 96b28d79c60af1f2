"""What does `python -m hpcmref` do? The same as the `hpcmref` command."""

from hpcmref.cli import app

if __name__ == "__main__":
    app(prog_name="hpcmref")
