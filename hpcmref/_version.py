"""The version of hpcmref. It is defined here only."""

__version__ = "0.3.0"
