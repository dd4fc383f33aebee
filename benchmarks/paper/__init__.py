"""The paper's own experiment on a user's own files: `python -m benchmarks paper`.

`sets` says which data a person brought, `runs` trains a backbone with accelerate, `tables` writes
the page beside the paper's figures, `command` is the command line.
"""

from benchmarks.paper.command import main

__all__ = ["main"]
