"""The command line: ``app`` has one verb per thing a user does, ``inputs`` loads models and data, ``console`` ends on one
line.
"""

from qlens.cli.app import main

__all__ = ["main"]
