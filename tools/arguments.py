"""What the tools' command lines accept."""

import argparse
import math


def positive(text: str) -> int:
    """A number from 1 on, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on; type 1 or more")
    return number


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0; type 8 or 0.5")
    return number
