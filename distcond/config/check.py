"""The check that every section of a configuration makes of its values."""

from distcond.errors import ConfigError


def need(condition: bool, message: str) -> None:
    """Raise ConfigError with a line that says what was given, what is needed and what to do, unless the condition holds."""
    if not condition:
        raise ConfigError(message)
