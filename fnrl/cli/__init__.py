"""The command line: `fnrl train | resume | evaluate`, thin over `fnrl.Learner`."""

from fnrl.cli.commands import main

__all__ = ["main"]
