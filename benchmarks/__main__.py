"""`python -m benchmarks` and one of `COMMANDS`, each with `--help` of its own."""

import argparse
from pkgutil import resolve_name

# The function of each command, and what it measures.
COMMANDS = {
    "speed": ("speed:speed", "what a step costs, beside other losses"),
    "scale": ("speed:scale", "how time and memory grow with classes and samples"),
    "gpu": ("gpu:main", "steps on a CUDA GPU, by operators, kernels and compiled, and trainings"),
    "quality": ("quality.command:main", "whether it helps: accuracy, compactness, separation"),
    "paper": ("paper.command:main", "the paper's own experiment, on your files"),
}


def main(arguments: list[str] | None = None) -> None:
    """Hands the arguments on to the command's function."""
    texts = "; ".join(f"{name}: {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=texts)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see COMMAND --help")
    chosen = parser.parse_args(arguments)
    resolve_name(f"benchmarks.{COMMANDS[chosen.command][0]}")(chosen.options)


if __name__ == "__main__":
    main()
