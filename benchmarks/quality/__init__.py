"""Does it help? Data x features x method x setting x seed, each a training with its figures.

`data` and `methods` say what there is, `runs` trains one, `study` says which are run and what the
figures decide, `tables` writes the pages, `command` is `python -m benchmarks quality`.
"""

from benchmarks.quality.command import main

__all__ = ["main"]
