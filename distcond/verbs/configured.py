"""The verbs that take a configuration: train, sweep, submit, prepare."""

import argparse
from pathlib import Path

from distcond.completion import check_asked
from distcond.config import ClusterName, Config
from distcond.errors import ConfigError
from distcond.verbs.parser import Parser, configure_logging


def train(argv: list[str]) -> int:
    """`distcond train`."""
    parser = _verb_parser("train")
    parser.add_argument("--dry-run", action="store_true")
    _add_hydra_flags(parser)
    args = parser.parse_intermixed_args(argv)
    flags = _hydra_flags(args)
    if flags:
        return _ask_hydra(args, flags)
    configure_logging()
    config = _configuration(args, may_fork=True)
    from distcond.train.fits import check_fits

    check_fits(config)
    if args.dry_run:
        return _dry_run(config)
    from distcond.cluster.trainer import launch

    launch(config)
    return 0


def sweep(argv: list[str]) -> int:
    """`distcond sweep`."""
    args = _verb_parser("sweep", add_help=True).parse_intermixed_args(argv)
    configure_logging()
    config = _configuration(args)
    from distcond.cluster.sweep import sweep

    return sweep(config)


def prepare(argv: list[str]) -> int:
    """`distcond prepare`."""
    args = _verb_parser("prepare", add_help=True).parse_intermixed_args(argv)
    configure_logging()
    config = _configuration(args)
    from distcond.cluster.prepare import prepare

    return prepare(config)


def submit(argv: list[str]) -> int:
    """`distcond submit`."""
    parser = _verb_parser("submit", add_help=True)
    parser.add_argument("--dry-run", action="store_true", help="show what would be sent, send nothing")
    args = parser.parse_intermixed_args(argv)
    configure_logging()
    if args.overrides[:1] not in (["train"], ["sweep"]):
        given = args.overrides[0] if args.overrides else "nothing"
        raise ConfigError(f"submit was given {given}; needed is train or sweep, e.g. distcond submit train cluster=ray.")
    what = args.overrides.pop(0)
    config = _configuration(args)
    from distcond.cluster.submit import submit

    return submit(what, config, args.overrides, args.dry_run)


def _verb_parser(verb: str, add_help: bool = False) -> Parser:
    parser = Parser(
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


def _add_hydra_flags(parser: Parser) -> None:
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
    if args.shell_completion:
        check_asked(args.overrides)
    elif not args.hydra_help:
        compose.compose_node(args.overrides, args.config_dir)
    config_dir = ["--config-dir", args.config_dir] if args.config_dir else []
    return compose.hydra_main([*flags, *config_dir, *args.overrides])


def _configuration(args: argparse.Namespace, *, may_fork: bool = False) -> Config:
    if args.multirun:
        raise ConfigError("--multirun: a search over values is `distcond sweep`, e.g. distcond sweep sweep=depth_x_penalty.")
    if not args.config:
        from distcond.command_line import typed

        return typed(args.overrides, args.config_dir, may_fork=may_fork)
    if args.overrides or args.config_dir:
        extra = args.overrides[0] if args.overrides else "--config-dir"
        raise ConfigError(f"--config {args.config} is run as it is; remove {extra}, or remove --config and compose anew.")
    from distcond.compose import load_config

    return load_config(Path(args.config))


def _dry_run(config: Config) -> int:
    from distcond.compose import to_yaml
    from distcond.train.plan import describe

    start = _check_launch(config)
    print(to_yaml(config))
    print("\n".join(filter(None, [describe(config), start])))
    return 0


def _check_launch(config: Config) -> str:
    """Refuse what `launch` would refuse before it starts or writes anything; a line on the run that this one starts from."""
    from distcond.cluster.local import preflight
    from distcond.cluster.trainer import check_fork, check_same, ready
    from distcond.data import check_files
    from distcond.train.run_folder import RunFolder

    if config.cluster.name == ClusterName.local:
        preflight(config.cluster)
    named, start = ready(config)
    folder = RunFolder.of(named)
    check_files(named.data)
    folder.check_writable()
    if named.run.fork:
        return check_fork(named)
    check_same(folder, named)
    return start
