"""What the tools' command lines accept."""

import argparse


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on; type 1 or more")
    return number
