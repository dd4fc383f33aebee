"""`python -m benchmarks` and one of `COMMANDS`, each with `--help` of its own."""

import argparse
from importlib import import_module

COMMANDS = {
    "speed": "what a step costs, beside other losses and beside what no step can go under",
    "scale": "how time and memory grow with classes and samples",
    "quality": "whether it helps: accuracy, compactness, separation, size of the features",
    "paper": "the paper's own experiment, on your files",
    "course": "a picture of classes coming together and apart over training",
    "retrieval": "classes that were not trained on, found by cosine",
    "rate": "how soon centers follow classes whose means have changed",
    "heads": "which models of timm work with one line",
    "gpu": "whether the fused kernels reach their bars, on a CUDA GPU",
}


def main(arguments: list[str] | None = None) -> None:
    """Hands the arguments on to `main` of the module that is named like the command."""
    lines = [f"{name:9} {what}" for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see COMMAND --help")
    chosen = parser.parse_args(arguments)
    import_module(f"benchmarks.{chosen.command}").main(chosen.options)


if __name__ == "__main__":
    main()
