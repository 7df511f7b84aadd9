"""The command `distcond`: reads the line, refuses a mistake at once, and hands a validated configuration to the verb.

Exit status: 0 done; 1 failed while running; 2 the user's mistake, told in one line; 130 interrupted.
"""

import argparse
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from distcond import __version__
from distcond.completion import complete
from distcond.config import Config, Kernels, RunConfig
from distcond.errors import ConfigError, RunError, UserError
from distcond.redaction import redact

BENCHES = {
    "tree": "layers, beside this machine's limits and their rivals",
    "table": "rows and their optimiser",
    "exchange": "messages of a sharded layer, here and in a model of many ranks",
    "train": "a step of distcond train, beside a plain loop",
    "halting": "time that halting saves, beside what its steps promise and a masked loop",
}

# NOTE: torch, Ray and Hydra are imported inside the verbs that need them, once the line has been understood:
# that is what keeps `distcond --help` and the refusal of a mistake below a second.

HELP = f"""distcond {__version__}: models that choose their weights and their amount of computation from the data

  distcond train    [overrides]        train          distcond train model.tree.depth=4 run.name=first
  distcond sweep    [overrides]        search         distcond sweep sweep=depth_x_penalty train.max_steps=50
  distcond submit   train|sweep [...]  run elsewhere  distcond submit train cluster=ray cluster.num_workers=8
  distcond prepare  [overrides]        prepare a text distcond prepare data=text 'data.files=[corpus/**/*.txt]'
  distcond evaluate RUN [--step N]     measure a run  distcond evaluate runs/first
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


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ours: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        given = message.removeprefix("unrecognized arguments: ").split()[0]
        meant = get_close_matches(given, self._option_string_actions, n=1) if given.startswith("-") else []
        raise ConfigError(f"{message}; " + (f"did you mean {meant[0]}?" if meant else f"see {self.prog} --help."))


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
        meant = get_close_matches(argv[0], VERBS, n=1) or [f"train {argv[0]}"]
        raise ConfigError(f"{argv[0]!r} is none of {', '.join(VERBS)}; did you mean distcond {meant[0]}?")
    return VERBS[argv[0]](argv[1:])


def _train(argv: list[str]) -> int:
    parser = _verb_parser("train")
    parser.add_argument("--dry-run", action="store_true")
    _add_hydra_flags(parser)
    args = parser.parse_intermixed_args(argv)
    flags = _hydra_flags(args)
    if flags:
        return _ask_hydra(args, flags)
    _configure_logging()
    config = _configuration(args)
    from distcond.train.fits import check_fits

    check_fits(config)
    if args.dry_run:
        return _dry_run(config)
    from distcond.cluster.trainer import launch

    launch(config)
    return 0


def _sweep(argv: list[str]) -> int:
    args = _verb_parser("sweep", add_help=True).parse_intermixed_args(argv)
    _configure_logging()
    config = _configuration(args)
    from distcond.cluster.sweep import sweep

    return sweep(config)


def _prepare(argv: list[str]) -> int:
    args = _verb_parser("prepare", add_help=True).parse_intermixed_args(argv)
    _configure_logging()
    config = _configuration(args)
    from distcond.cluster.prepare import prepare

    return prepare(config)


def _submit(argv: list[str]) -> int:
    parser = _verb_parser("submit", add_help=True)
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, send nothing")
    args = parser.parse_intermixed_args(argv)
    _configure_logging()
    if args.overrides[:1] not in (["train"], ["sweep"]):
        given = args.overrides[0] if args.overrides else "nothing"
        raise ConfigError(f"submit was given {given}; needed is train or sweep, e.g. distcond submit train cluster=ray.")
    what = args.overrides.pop(0)
    config = _configuration(args)
    from distcond.cluster.submit import submit

    return submit(what, config, args.overrides, args.dry_run)


def _evaluate(argv: list[str]) -> int:
    parser = _Parser(prog="distcond evaluate", description="Measure a run: quality, steps, cost.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder, e.g. runs/first")
    parser.add_argument("--step", type=int, help="a checkpoint other than the latest")
    args = parser.parse_args(argv)
    _configure_logging()
    if not (args.run / "config.yaml").is_file():
        raise RunError(f"{args.run} is not a run folder, for it has no config.yaml; give one such as runs/first.")
    from distcond.evaluate import evaluate

    _print_table(evaluate(args.run, args.step))
    return 0


def _sync(argv: list[str]) -> int:
    parser = _Parser(prog="distcond sync", description="Send to wandb what has not been sent, once.", allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders; none: every run in run.dir (run.dir=FOLDER: in FOLDER)")
    args = parser.parse_args(argv)
    folders = [word.removeprefix("run.dir=") for word in args.runs if word.startswith("run.dir=")]
    runs = [Path(word) for word in args.runs if not word.startswith("run.dir=")]
    if len(folders) > 1 or (folders and runs):
        raise ConfigError(f"sync was given {' '.join(args.runs)}; needed is either folders of runs, or one run.dir=FOLDER.")
    _configure_logging()
    from distcond.sync import sync

    for line in sync(runs, Path(folders[0] if folders else RunConfig().dir).expanduser()):
        print(line, flush=True)
    return 0


def _bench(argv: list[str]) -> int:
    args = _bench_parser().parse_args(argv)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise RunError(f"--json {args.json}: {args.json.parent} is not a folder; create it first.")
    _configure_logging()
    from distcond import bench
    from distcond.ops import use_kernels
    from distcond.train.run_folder import write_json

    use_kernels(args.kernels)
    options: dict[str, Any] = {}
    if args.what == "table":
        options["large"] = args.large
    elif args.what == "exchange":
        link = {"latency_us": args.latency_us, "bandwidth_gb_s": args.bandwidth_gb_s}
        options["interconnect"] = bench.Interconnect(**{name: value for name, value in link.items() if value is not None})
    rows = list(bench.BENCHES[args.what](args.quick, **options))
    if args.json is not None:
        write_json(args.json, {"bench": args.what, "machine": bench.machine(), "rows": rows})
    print(bench.show(rows))
    return 0


def _bench_parser() -> _Parser:
    parser = _Parser(
        prog="distcond bench", description="Time layers and tables beside this machine's limits.", allow_abbrev=False
    )
    common = _Parser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too, and what machine this is")
    kinds = [kind.value for kind in Kernels]
    common.add_argument(
        "--kernels",
        choices=kinds,
        default=kinds[0],
        help="of trees and recurrent cells; native: compiled by gcc (default: %(default)s)",
    )
    common.add_argument("--quick", action="store_true", help="a few small cases, to see that it works")
    verbs = parser.add_subparsers(dest="what", required=True, metavar="|".join(BENCHES))
    each = {name: verbs.add_parser(name, help=text, parents=[common], allow_abbrev=False) for name, text in BENCHES.items()}
    each["table"].add_argument("--large", action="store_true", help="also 10^9 numbers on two ranks; takes 14 GiB and minutes")
    link = each["exchange"]
    link.add_argument("--latency-us", type=_positive, help="of a message in the model; default: InfiniBand's")
    link.add_argument("--bandwidth-gb-s", type=_positive, help="of a rank's link; default: an HDR port's")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "sweep": _sweep,
    "submit": _submit,
    "prepare": _prepare,
    "evaluate": _evaluate,
    "sync": _sync,
    "bench": _bench,
}


def _verb_parser(verb: str, add_help: bool = False) -> _Parser:
    parser = _Parser(
        prog=f"distcond {verb}",
        add_help=add_help,
        allow_abbrev=False,
        epilog="`distcond train --help` lists the groups, their options and every key.",
    )
    parser.add_argument("overrides", nargs="*", help="group=option or key=value, in Hydra's grammar")
    parser.add_argument("--config", metavar="FILE", help="a resolved file, run as it is")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a folder of your own files, e.g. DIR/data/mine.yaml")
    parser.add_argument("--multirun", "-m", action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_hydra_flags(parser: _Parser) -> None:
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--resolve", action="store_true")
    infos = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=infos)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("--shell-completion", "-sc", action="store_true")


def _hydra_flags(args: argparse.Namespace) -> list[str]:
    """The flags of a line that Hydra answers itself, written out again."""
    valued = {"--cfg": args.cfg, "--package": args.package, "--info": args.info}
    switches = {"--help": args.help, "--hydra-help": args.hydra_help, "--shell-completion": args.shell_completion}
    switches["--resolve"] = args.resolve
    flags = [word for flag, value in valued.items() if value is not None for word in (flag, value)]
    return flags + [flag for flag, is_set in switches.items() if is_set]


def _ask_hydra(args: argparse.Namespace, flags: list[str]) -> int:
    """Pass the line on to Hydra, after a mistake in it has had the chance to be told our way."""
    from distcond import compose

    if args.config:
        raise ConfigError(f"--config {args.config} is resolved already; {flags[0]} shows what is composed without it.")
    if (args.package or args.resolve) and not (args.cfg or args.help):
        raise ConfigError("--package and --resolve go with --cfg, e.g. distcond train --cfg job --package model.")
    if not args.shell_completion and not args.hydra_help:
        compose.compose_node(args.overrides, args.config_dir)
    config_dir = ["--config-dir", args.config_dir] if args.config_dir else []
    return compose.hydra_main([*flags, *config_dir, *args.overrides])


def _configuration(args: argparse.Namespace) -> Config:
    from distcond import compose

    if args.multirun:
        raise ConfigError("--multirun: a search over values is `distcond sweep`, e.g. distcond sweep sweep=depth_x_penalty.")
    if not args.config:
        return compose.compose(args.overrides, args.config_dir)
    if args.overrides or args.config_dir:
        extra = args.overrides[0] if args.overrides else "--config-dir"
        raise ConfigError(f"--config {args.config} is run as it is; remove {extra}, or remove --config and compose anew.")
    return compose.load_config(Path(args.config))


def _dry_run(config: Config) -> int:
    from distcond import compose
    from distcond.train.deepspeed_options import deepspeed_options
    from distcond.train.plan import describe

    deepspeed_options(config)  # refuses what the run would refuse
    print(compose.to_yaml(config))
    print(describe(config))
    return 0


def _print_table(metrics: dict[str, Any]) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {f'{value:.6g}' if isinstance(value, float) else value}")


def _configure_logging() -> None:
    level = os.environ.get("DISTCOND_LOG", "WARNING").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigError(f"DISTCOND_LOG={level} is not a level; needed is one of DEBUG, INFO, WARNING, ERROR.")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("distcond").setLevel(level)


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
