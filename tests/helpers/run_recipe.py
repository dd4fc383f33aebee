"""Runs a recipe and prints variables as JSON; arguments: the path, then the variables' names."""

import json
import runpy
import sys

from benchmarks.networks import complete_torchvision

if __name__ == "__main__":
    program, *names = sys.argv[1:]
    complete_torchvision()
    end = runpy.run_path(program, run_name="__main__")
    print(json.dumps({name: end[name] for name in names}))
