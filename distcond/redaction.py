"""What nobody may read in a file, a log, a job or on the screen: passwords in URLs, and what the environment holds in secret."""

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SHORTEST = 6
"Of a variable's value that is hidden; shorter ones, such as `1`, are no secrets and stand in every text."
_NAME = re.compile(r"KEY|TOKEN(?!IZER)|SECRET|PASSWORD", re.IGNORECASE)
_BEFORE_HOST = re.compile(r"(?<=://)[^\s/?#'\"]*@")


def is_secret(name: str) -> bool:
    """Whether what a variable or key of this name holds is a secret."""
    return _NAME.search(name) is not None


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with *** for user and password in every URL, and for every value of a secret environment variable."""
    values = {value for name, value in environment.items() if is_secret(name) and len(value) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _BEFORE_HOST.sub(f"{HIDDEN}@", text)


def without_user(url: str) -> str:
    """The URL without user and password."""
    return _BEFORE_HOST.sub("", url)


def has_password(text: str) -> bool:
    """Whether a URL in the text names a password."""
    return any(":" in part for part in _BEFORE_HOST.findall(text))
