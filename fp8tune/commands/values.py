"""What the arguments of commands may be, as argparse reads them."""

import argparse
from pathlib import Path

__all__ = ["mesh", "new_file", "shape", "size", "sizes"]


def size(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def shape(text: str) -> tuple[int, ...]:
    """Sizes such as 2x8192."""
    return tuple(size(part) for part in text.split("x"))


def mesh(text: str) -> dict[str, int]:
    """Dimensions such as dp=32,tp=8."""
    pairs = [part.split("=") for part in text.split(",")]
    try:
        found = {name: size(number) for name, number in pairs}
    except (ValueError, argparse.ArgumentTypeError):
        found = {}
    if "" in found or len(found) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is no mesh such as dp=32,tp=8")
    return found


def sizes(text: str) -> list[int]:
    """Sizes such as 1024,4096, rising and each once."""
    return sorted({size(part) for part in text.split(",")})


def new_file(text: str) -> str:
    """A file to write, of which as much is asked before anything takes time."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"No such file or directory: {text!r}; make the folder {path.parent} first"
        )
    return text
