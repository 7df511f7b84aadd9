"""The check that every section of a configuration makes of its values, and what its messages propose."""

from distcond.errors import ConfigError


def nearest_divisors(number: int, near: int) -> str:
    """The next divisors of a number below and above another one, for a message: "2 or 4"."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below, above = [divisor for divisor in divisors if divisor < near], [divisor for divisor in divisors if divisor > near]
    return " or ".join(str(divisor) for divisor in (*below[-1:], *above[:1]))


def need(condition: bool, message: str) -> None:
    """Raise ConfigError with a line that says what was given, what is needed and what to do, unless the condition holds."""
    if not condition:
        raise ConfigError(message)
