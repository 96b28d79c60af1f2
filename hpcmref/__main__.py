"""`python -m hpcmref` does the same as the command `hpcmref`."""

from hpcmref.cli import app

if __name__ == "__main__":
    app(prog_name="hpcmref")
