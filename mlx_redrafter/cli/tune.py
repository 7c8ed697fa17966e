"""`mlx-redrafter tune`: shows what steps cost on this device, and what is drafted because of it."""

from __future__ import annotations

import argparse
import json

from mlx_redrafter.errors import UserError
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.flags import add_pair_arguments, choose_target, load_from
from mlx_redrafter.tuning import report
from mlx_redrafter.tuning.session import session_for

HELP = "measure what steps cost here, and show what is drafted because of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser, default=None)
    add = parser.add_argument
    add("--fresh", action="store_true", help="measure anew, and forget what was learnt of the drafter")
    add("--json", action="store_true", help="print one JSON object, and nothing else")


def run(args: argparse.Namespace) -> None:
    said = choose_target(args, with_drafter=True)
    model, drafter, _ = load_from(args)
    if drafter is None:
        raise UserError("--draft is missing: without a drafter there is nothing to choose")
    session = session_for(verifier_of(model).checked(), drafter, fresh=args.fresh)
    if said and not args.json:
        print(said)
    print(json.dumps(report.facts(session)) if args.json else report.text(session))
