"""The verbs that read the folders of runs: evaluate, report, sync."""

from pathlib import Path

from distcond.config import RunConfig
from distcond.errors import ConfigError, RunError
from distcond.verbs.parser import Parser, configure_logging


def evaluate(argv: list[str]) -> int:
    """`distcond evaluate`."""
    parser = Parser(prog="distcond evaluate", description="Measure a run: quality, steps, cost.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder, e.g. runs/first")
    parser.add_argument("--step", type=int, help="a checkpoint other than the latest")
    parser.add_argument("--against", type=Path, metavar="RUN", help="another run on the same data, e.g. the dense model")
    args = parser.parse_intermixed_args(argv)
    configure_logging()
    for run in (args.run, args.against):
        if run is not None:
            _check_is_run(run)
    from distcond.evaluate import evaluate, table

    print(table(evaluate(args.run, args.step, args.against)))
    return 0


def report(argv: list[str]) -> int:
    """`distcond report`."""
    parser = Parser(prog="distcond report", description="One HTML page about runs; it needs no network.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders; curves and maps are those of the first one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the folder of the first run")
    args = parser.parse_intermixed_args(argv)
    configure_logging()
    for run in args.runs:
        _check_is_run(run)
    from distcond.report import report

    print(report(args.runs, args.out))
    return 0


def sync(argv: list[str]) -> int:
    """`distcond sync`."""
    parser = Parser(prog="distcond sync", description="Send to wandb what has not been sent, once.", allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders; none: every run in run.dir (run.dir=FOLDER: in FOLDER)")
    args = parser.parse_intermixed_args(argv)
    folders = [word.removeprefix("run.dir=") for word in args.runs if word.startswith("run.dir=")]
    runs = [Path(word) for word in args.runs if not word.startswith("run.dir=")]
    if len(folders) > 1 or (folders and runs):
        raise ConfigError(f"sync was given {' '.join(args.runs)}; needed is either folders of runs, or one run.dir=FOLDER.")
    configure_logging()
    from distcond.sync import sync

    for line in sync(runs, Path(folders[0] if folders else RunConfig().dir).expanduser()):
        print(line, flush=True)
    return 0


def _check_is_run(run: Path) -> None:
    """Refuse what is no run before torch is imported."""
    if not (run / "config.yaml").is_file():
        raise RunError(f"{run} is not a run folder, for it has no config.yaml; give one such as runs/first.")
