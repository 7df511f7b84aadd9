"""The command `distcond`: reads the line, refuses a mistake at once, and hands a validated configuration to the verb.

Exit status: 0 done; 1 failed while running; 2 the user's mistake, told in one line; 130 interrupted.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from distcond import __version__
from distcond.completion import complete
from distcond.errors import ConfigError, UserError
from distcond.redaction import redact
from distcond.verbs import configured, deployment, runs
from distcond.verbs.bench import BENCHES, bench

HELP = f"""distcond {__version__}: models that choose their weights and their amount of computation from the data

  distcond train    [overrides]        train          distcond train model.tree.depth=4 run.name=first
  distcond sweep    [overrides]        search         distcond sweep sweep=depth_x_penalty train.max_steps=50
  distcond submit   train|sweep [...]  run elsewhere  distcond submit train cluster=ray cluster.num_workers=8
  distcond prepare  [overrides]        prepare a text distcond prepare data=text 'data.files=[corpus/**/*.txt]'
  distcond evaluate RUN [--step N]     measure a run  distcond evaluate runs/first
  distcond report   RUN... [--out F]   HTML page      distcond report runs/first runs/second
  distcond explain  RUN --input TEXT   say why        distcond explain runs/first --input 'def main('
  distcond export   RUN --out DIR      deploy         distcond export runs/first --out model --flatten
  distcond predict  DIR|RUN [FILE]     answer lines   echo 'def main(' | distcond predict model
  distcond sync     [RUN...]           send to wandb  distcond sync runs/first
  distcond bench    tree|table|...     time layers    distcond bench table --json table.json

Overrides are group=option or key=value. `distcond train --help` lists the groups, their options and every key.

  --dry-run         train, submit: show what would happen, start nothing
  --config FILE     run a resolved file (the config.yaml of a run) as it is
  --config-dir DIR  add your own files, e.g. DIR/data/mine.yaml for data=mine
  --cfg job, --info defaults-tree, --hydra-help     train: Hydra's own flags
  --version

TAB completion:  eval "$(distcond -sc install=bash)"
DISTCOND_LOG=INFO or DEBUG shows more on the screen."""

VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": configured.train,
    "sweep": configured.sweep,
    "submit": configured.submit,
    "prepare": configured.prepare,
    "evaluate": runs.evaluate,
    "report": runs.report,
    "explain": deployment.explain,
    "export": deployment.export,
    "predict": deployment.predict,
    "sync": runs.sync,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"distcond: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough, e.g. `distcond train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort, which keeps the traceback for whoever mends it
        print(f"distcond: failed: {_one_line(error)} (traceback: {_save_traceback()})", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help", "help"}:
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(f"distcond {__version__}")
        return 0
    if argv[0] in {"-sc", "--shell-completion"}:
        return complete(argv[1:], VERBS, BENCHES)
    if argv[0] not in VERBS:
        meant = get_close_matches(argv[0], VERBS, n=1) or ([f"train {argv[0]}"] if "=" in argv[0] else [])
        advice = f"did you mean distcond {meant[0]}?" if meant else "`distcond --help` says what each does."
        raise ConfigError(f"{argv[0]!r} is none of {', '.join(VERBS)}; {advice}")
    return VERBS[argv[0]](argv[1:])


def _one_line(error: BaseException) -> str:
    """The message of an error; notes, which say where the log of a run is, belong to it."""
    text = str(error) or type(error).__name__
    line = redact(" ".join(" ".join([text, *getattr(error, "__notes__", [])]).split()))
    # What was given is shown, not obeyed: files from strangers may hold what moves a terminal's cursor.
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)


def _save_traceback() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="distcond-", suffix=".log", delete=False) as file:
        file.write(redact(traceback.format_exc()))
    return file.name
