"""TAB completion: Hydra completes overrides; what stands in front of them and begins with a dash is completed here."""

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence

from distcond.errors import ConfigError

READERS = {
    "evaluate": ["--step", "--against"],
    "explain": ["--input", "--position", "--layer", "--step", "--with", "--json"],
    "export": ["--out", "--step", "--flatten", "--max-mib", "--bf16"],
    "predict": ["--step", "--batch-size", "--max-new", "--temperature", "--seed", "--json-lines"],
    "report": ["--out"],
    "sync": [],
}
"Verbs that read folders -> their flags."


def check_asked(argv: Sequence[str]) -> None:
    """Refuse what Hydra's completion cannot answer. argv: what follows the flag. Raises ConfigError."""
    if not any(re.fullmatch("(install|uninstall|query)=(bash|zsh|fish)", word) for word in argv):
        given = " ".join(argv) or "nothing"
        raise ConfigError(f"-sc was given {given}; needed is install= or uninstall=bash, zsh or fish, e.g. -sc install=bash.")


def complete(argv: list[str], verbs: Iterable[str], benches: Iterable[str]) -> int:
    """Print what may follow the line in COMP_LINE; returns the exit status. argv: as Hydra's script calls it."""
    from distcond import compose

    check_asked(argv)
    if not any(word.startswith("query=") for word in argv):
        return compose.hydra_main(["-sc", *argv])
    words = os.environ.get("COMP_LINE", "").split()[1:]
    if os.environ.get("COMP_LINE", "").endswith(" "):
        words.append("")
    *done, word = words or [""]
    fixed = _fixed_words(done, word, verbs, benches)
    if fixed is not None:
        sys.stdout.write(" ".join(fixed) + "\n")
        return 0
    folders = [word_after for flag, word_after in itertools.pairwise(done) if flag in {"--config-dir", "-cd"}]
    overrides = [before for before in done if "=" in before and before not in folders]
    os.environ["COMP_LINE"] = " ".join(["distcond", *overrides, word])
    with contextlib.redirect_stderr(io.StringIO()):  # a half-typed line is no error
        compose.hydra_main(["-sc", *argv, *(["--config-dir", folders[-1]] if folders else [])])
    return 0


def _fixed_words(done: list[str], word: str, verbs: Iterable[str], benches: Iterable[str]) -> list[str] | None:
    """What may stand at this place, if it is not an override; an empty list leaves it to the shell: a path."""
    if not done:
        return list(verbs)
    if done[0] in READERS or done[-1] in {"--config", "--config-dir", "-cd"}:
        return READERS.get(done[0], []) if word.startswith("-") else []
    if word.startswith("-"):
        common = ["--config", "--config-dir", "--help"]
        if done[0] == "bench":
            own = {"table": ["--large"], "exchange": ["--latency-us", "--bandwidth-gb-s"]}
            return ["--json", "--kernels", "--quick", *own.get(done[-1], []), "--help"]
        return {"train": ["--dry-run", "--cfg", "--info", "--hydra-help"], "submit": ["--dry-run"]}.get(done[0], []) + common
    if done == ["bench"]:
        return list(benches)
    if done == ["submit"]:
        return ["train", "sweep"]
    return None
