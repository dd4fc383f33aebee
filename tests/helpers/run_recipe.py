"""Runs a recipe, then prints variables of it as JSON: arguments are its path and their names."""

import json
import runpy
import sys

from benchmarks.networks import complete_torchvision

if __name__ == "__main__":
    program, *names = sys.argv[1:]
    complete_torchvision()
    end = runpy.run_path(program, run_name="__main__")
    print(json.dumps({name: end[name] for name in names}))
