"""The check that every section of a configuration makes of its values, and what its messages propose."""

from distcond.errors import ConfigError

REACH = 1000
"How far from a number its divisors are looked for: nobody wants to hear of others, and numbers may be huge."


def nearest_divisors(number: int, near: int) -> str:
    """The next divisors of a number below and above another one, for a message: "2 or 4"; without any within REACH: "1"."""
    below = [divisor for divisor in range(max(1, near - REACH), near) if number % divisor == 0]
    above = [divisor for divisor in range(near + 1, min(near + REACH, number) + 1) if number % divisor == 0]
    return " or ".join(str(divisor) for divisor in (*below[-1:], *above[:1])) or "1"


def need(condition: bool, message: str) -> None:
    """Raise ConfigError with a line that says what was given, what is needed and what to do, unless the condition holds."""
    if not condition:
        raise ConfigError(message)
