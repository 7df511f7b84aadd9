"""The verbs that use a trained model: export, predict, explain."""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from distcond.errors import ConfigError, RunError
from distcond.verbs.parser import Parser, configure_logging, positive


def export(argv: list[str]) -> int:
    """`distcond export`."""
    parser = Parser(
        prog="distcond export", description="Write the model of a run into a folder for distcond.load.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder, e.g. runs/first")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--step", type=int, help="a checkpoint other than the latest")
    parser.add_argument("--flatten", action="store_true", help="fold the leaves of its trees: one matrix a prediction")
    parser.add_argument("--max-mib", type=positive, metavar="M", help="MiB that folded leaves may take: the most visited ones")
    parser.add_argument("--bf16", action="store_true", help="weights in bf16, half the size")
    args = parser.parse_intermixed_args(argv)
    configure_logging()
    if args.max_mib is not None and not args.flatten:
        raise ConfigError(f"--max-mib {args.max_mib:g} goes with --flatten.")
    from distcond.deploy.export import ExportOptions, export

    most = {} if args.max_mib is None else {"max_mib": args.max_mib}
    _print_card(args.out, export(args.run, args.out, args.step, ExportOptions(flatten=args.flatten, bfloat16=args.bf16, **most)))
    return 0


def predict(argv: list[str]) -> int:
    """`distcond predict`."""
    parser = Parser(
        prog="distcond predict",
        description="Answer lines by JSON lines. A text model continues each line; else a line is a JSON vector, or a list of "
        "them, one for each time step.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="DIR|RUN", help="what distcond export wrote, or the folder of a run")
    parser.add_argument("file", nargs="?", metavar="FILE", help="default: standard input")
    parser.add_argument("--step", type=int, help="of a run: a checkpoint other than the latest")
    parser.add_argument("--batch-size", type=_count, help="lines that are computed together")
    parser.add_argument("--max-new", type=_count, metavar="N", help="bytes or tokens that a text is continued by")
    parser.add_argument("--temperature", type=positive, help="draw them; default: always the likeliest")
    parser.add_argument("--seed", type=int, help="of what is drawn")
    parser.add_argument("--json-lines", action="store_true", help="texts are JSON strings, which may hold newlines")
    args = parser.parse_intermixed_args(argv)
    configure_logging()
    if args.file is not None and not Path(args.file).is_file():
        raise RunError(f"{args.file} is no file; give one with a line for each answer, or none and write to standard input.")
    names = ("batch_size", "max_new", "temperature", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    from distcond.deploy.predict import PredictOptions, predict
    from distcond.deploy.served import serve

    served = serve(args.model, args.step)
    options = PredictOptions(json_lines=args.json_lines, **given)
    with sys.stdin.buffer if args.file is None else Path(args.file).open("rb") as source:
        assert isinstance(source, io.BufferedReader)
        for answer in predict(served, source, args.file or "standard input", options):
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    return 0


def explain(argv: list[str]) -> int:
    """`distcond explain`."""
    parser = Parser(prog="distcond explain", description="Why a model says what it says at one position.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="its folder, e.g. runs/first")
    parser.add_argument("--input", metavar="TEXT|FILE|-", help="a text, or JSON vectors of a task")
    parser.add_argument("--position", type=int, metavar="N", help="from 0; default: the last one whose target is known")
    parser.add_argument("--layer", default="", metavar="NAME", help="default: the first tree layer")
    parser.add_argument("--step", type=int, help="a checkpoint other than the latest")
    parser.add_argument(
        "--with", nargs="+", default=[], type=Path, metavar="RUN", dest="others", help="do they cut inputs alike?"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there")
    args = parser.parse_intermixed_args(argv)
    configure_logging()
    if args.input is None and not args.others:
        raise ConfigError("explain needs an input, e.g. --input 'def main(', or runs to compare with, --with runs/second.")
    from distcond.train.run_folder import check_can_hold, write_json

    if args.json is not None:
        check_can_hold("--json", args.json, "explained.json")
    from distcond.deploy.explain import explain, read_input
    from distcond.deploy.explained import show, show_stability
    from distcond.deploy.stability import stability

    result: dict[str, Any] = {}
    shown = []
    if args.input is not None:
        text, source = read_input(args.input)
        result |= explain(args.run, text, layer=args.layer, position=args.position, step=args.step)
        shown.append(f"input  {source}\n{show(result)}")
    if args.others:
        result["stability"] = stability([args.run, *args.others], args.layer)
        shown.append(show_stability(result["stability"]))
    if args.json is not None:
        write_json(args.json, result)
    print("\n\n".join(shown))
    return 0


def _print_card(out: Path, card: dict[str, Any]) -> None:
    size = sum(file["bytes"] for file in card["files"].values())
    folded = "".join(f", {leaves} leaves of {name} folded" for name, leaves in card["flattened"].items())
    print(f"{out}  {size / 2**20:.2f} MiB, {card['precision']}{folded}")
    run, exported = card["figures"]["run"], card["figures"]["exported"]
    width = max(map(len, run))
    print(f"{'':{width}}  {'run':>10}  {'exported':>10}  {'change':>10}")
    for name, value in run.items():
        print(f"{name:{width}}  {value:>10.5g}  {exported[name]:>10.5g}  {exported[name] - value:>+10.2g}")


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)
