"""Options: a field of a dataclass says its default, its range and its help once, for Python and the command
line."""

import dataclasses
import math

from ..errors import UserError


def option(default: object, allowed: str | tuple = "", help: str = "", **more) -> dataclasses.Field:
    """A field of a dataclass that is an option of the command line, if it has a help text.

    allowed: an interval such as "[0, 1)", or a tuple of values. more: `name`, the option's name where it is
    not the field's; `shown`, in words, a default that depends on others; `metavar`; `missing`, what the user
    has to give with this option; `only`, {another option: its values with which this one has a meaning};
    `alone`, options beside which this one has none.
    """
    return dataclasses.field(default=default, metadata={"allowed": allowed, "help": help, **more})


def written(options: dict) -> str:
    """{"max_iters": 200} as --max-iters 200."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def check_options(config: object) -> None:
    """Raises UserError for a field of a dataclass with a value that is not allowed."""
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
    right = value >= low if interval[0] == "[" else value > low  # comparisons that are false for NaN
    right = right and (value <= high if interval[-1] == "]" else value < high)
    rules = [f"{'at least' if interval[0] == '[' else 'more than'} {low:g}"]
    if high < math.inf:
        rules.append(f"{'at most' if interval[-1] == ']' else 'less than'} {high:g}")
    return right, " and ".join(rules)
