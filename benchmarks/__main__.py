"""`python -m benchmarks` and one of `COMMANDS`, each with `--help` of its own."""

import argparse
from importlib import import_module

# The module of each command, and what it measures.
COMMANDS = {
    "speed": ("speed", "what a step costs, beside other losses"),
    "gpu": ("gpu", "the same on a CUDA GPU, by operators, kernels and compiled, and in trainings"),
    "scale": ("scale", "how time and memory grow with classes and samples"),
    "quality": ("quality.command", "whether it helps: accuracy, compactness, separation"),
    "paper": ("paper.command", "the paper's own experiment, on your files"),
}


def main(arguments: list[str] | None = None) -> None:
    """Hands the arguments on to `main` of the command's module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="\n".join(f"{name:9} {text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see COMMAND --help")
    chosen = parser.parse_args(arguments)
    import_module(f"benchmarks.{COMMANDS[chosen.command][0]}").main(chosen.options)


if __name__ == "__main__":
    main()
