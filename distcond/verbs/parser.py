"""How a verb reads its line."""

import argparse
import logging
import os
from difflib import get_close_matches
from typing import NoReturn

from distcond.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ours: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print. Raises ConfigError."""
        given = message.removeprefix("unrecognized arguments: ").split()[0]
        meant = get_close_matches(given, self._option_string_actions, n=1) if given.startswith("-") else []
        raise ConfigError(f"{message}; " + (f"did you mean {meant[0]}?" if meant else f"see {self.prog} --help."))


def configure_logging() -> None:
    """As DISTCOND_LOG says. Raises ConfigError where that is no level."""
    level = os.environ.get("DISTCOND_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"DISTCOND_LOG={level} is not a level; needed is one of DEBUG, INFO, WARNING, ERROR.")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("distcond").setLevel(level)


def positive(text: str) -> float:
    """A number above 0 on the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value
