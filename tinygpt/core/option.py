"""Options: a field of a dataclass states a default, a range and a help text, for Python and for the command
line."""

import dataclasses
import math

from ..errors import UserError


def option(default: object, allowed: str | tuple = "", help: str = "", **more) -> dataclasses.Field:
    """A field of a dataclass. With a help text it is an option of the command line.

    allowed: an interval such as "[0, 1)", or a tuple of values. more, each of these if it is necessary:

    - name: the name of the option, if it is not the name of the field
    - shown: the default in words, if it depends on other options
    - metavar: the kind of value, in the help text
    - missing: the thing that the user must give as this option
    - only: {another option: its values}; with other values this option has no meaning
    - alone: other options; with one of them this option has no meaning
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed, "help": help, **more})


def written(options: dict) -> str:
    """{"max_iters": 200} as --max-iters 200."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def check_options(config: object) -> None:
    """Raises UserError if a field of a dataclass has a value that is not allowed."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), field.metadata.get("allowed")
        if isinstance(allowed, tuple):
            right, rule = value in allowed, f"one of {', '.join(allowed)}"
        else:
            right, rule = inside(value, allowed) if allowed else (True, "")
        if not right:
            raise UserError(f"{field.name} is {value!r}: it must be {rule}")


def inside(value: float, interval: str) -> tuple[bool, str]:
    """Whether a number is in an interval, and the interval in words."""
    low, high = map(float, interval[1:-1].split(","))
    right = value >= low if interval[0] == "[" else value > low  # NaN compares as False
    right = right and (value <= high if interval[-1] == "]" else value < high)
    rules = [f"{'at least' if interval[0] == '[' else 'more than'} {low:g}"]
    if high < math.inf:
        rules.append(f"{'at most' if interval[-1] == ']' else 'less than'} {high:g}")
    return right, " and ".join(rules)
