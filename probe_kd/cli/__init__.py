"""The command line: parse, call, print. What takes seconds to import is imported by the command that needs it."""

from probe_kd.cli.app import app, main

__all__ = ["app", "main"]
