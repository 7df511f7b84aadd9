"""The verb that times layers: bench."""

from pathlib import Path
from typing import Any

from distcond.config import Kernels
from distcond.verbs.parser import Parser, configure_logging, positive

BENCHES = {
    "tree": "layers, beside this machine's limits and their rivals",
    "table": "rows and their optimiser",
    "exchange": "messages of a sharded layer, here and in a model of many ranks",
    "train": "a step of distcond train, beside a plain loop",
    "halting": "time that halting saves, beside what its steps promise and a masked loop",
}


def bench(argv: list[str]) -> int:
    """`distcond bench`."""
    args = _bench_parser().parse_args(argv)
    configure_logging()
    from distcond.train.run_folder import check_can_hold, write_json

    if args.json is not None:
        check_can_hold("--json", args.json, "rows.json")
    from distcond import bench
    from distcond.ops import use_kernels

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


def _bench_parser() -> Parser:
    parser = Parser(prog="distcond bench", description="Time layers and tables beside this machine's limits.", allow_abbrev=False)
    common = Parser(add_help=False)
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
    link.add_argument("--latency-us", type=positive, help="of a message in the model; default: InfiniBand's")
    link.add_argument("--bandwidth-gb-s", type=positive, help="of a rank's link; default: an HDR port's")
    return parser
