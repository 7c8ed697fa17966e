"""Computes tokens per second over the number of machines and the latency between them, plain and with drafts.

python -m mlx_redrafter.benchmarks.machines.step_time [--row-ms 76 ...]

Knows nothing of any machine but the numbers that it is given. Assumed is:
- a step's own work divides evenly; drafting does not divide, every machine does all of it;
- each layer sums twice over all machines, and no sum overlaps with other work;
- a sum takes one exchange between all (mesh) or 2 (n - 1) of them in turn (ring), each of them the latency and the
  time of its bytes, 2 for each entry of a row;
- draft tokens are right independently of each other, with one probability;
- what a step shares besides (the drafts, and what was chosen) are two sums of a few bytes.
The latency is that of a whole exchange as a program sees it, not the wire's.
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from mlx_redrafter.system.flag_types import real, whole
from mlx_redrafter.system.table import Table

MESH, RING = "mesh", "ring"
LONGEST = 8  # draft tokens


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a step's time is computed from.

    Attributes:
        row_ms: time of one row on one machine.
        costs: of so many rows together, over that of one.
        draft: time of a draft token, over that of one row.
        right: the probability that a draft token is the target's.
        layers, width: of the target.
        gigabytes: per second of a link.
        topology: MESH or RING.
    """

    row_ms: float
    costs: dict[int, float]
    draft: float
    right: float
    layers: int
    width: int
    gigabytes: float
    topology: str

    def sum_ms(self, machines: int, rows: int, latency_ms: float) -> float:
        """Of one sum over all machines of so many rows; no rows are a few bytes."""
        if machines == 1:
            return 0.0
        turns = 1 if self.topology == MESH else 2 * (machines - 1)
        sent = rows * self.width * 2 / (1 if self.topology == MESH else machines)
        return turns * (latency_ms + sent / (1e6 * self.gigabytes))

    def step_ms(self, machines: int, drafts: int, latency_ms: float) -> float:
        """Of a step that verifies so many draft tokens."""
        rows = 1 + drafts
        work = self.row_ms * float(np.interp(rows, list(self.costs), list(self.costs.values()))) / machines
        sums = 2 * self.layers * self.sum_ms(machines, rows, latency_ms)
        shared = (2 if drafts else 1) * self.sum_ms(machines, 0, latency_ms)
        return work + sums + shared + drafts * self.draft * self.row_ms

    def tokens(self, drafts: int) -> float:
        """Of a step, the target's own one included."""
        return sum(self.right**depth for depth in range(drafts + 1))

    def speed(self, machines: int, drafts: int, latency_ms: float) -> float:
        """Tokens per second."""
        return 1000 * self.tokens(drafts) / self.step_ms(machines, drafts, latency_ms)


def table(setting: Setting, machines: list[int], latencies: list[float]) -> Table:
    rows = []
    for count in machines:
        for latency in latencies if count > 1 else [0.0]:
            speeds = [setting.speed(count, drafts, latency) for drafts in range(LONGEST + 1)]
            best = max(range(LONGEST + 1), key=speeds.__getitem__)
            cells = [f"{latency:g}" if count > 1 else "", f"{speeds[0]:.1f}", f"{speeds[best]:.1f}", str(best)]
            rows.append([str(count), *cells, f"{speeds[best] / speeds[0]:.2f}"])
    return Table("", ["machines", "exchange, ms", "plain, tokens/s", "drafted", "draft tokens", "gain"], rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # A 70B model in 4 bits on an M5 Max, as measured by others for mlx#3791: rows of one call, in ms.
    add("--row-ms", type=real(0.001), default=76.0, help="of one row on one machine (default: %(default)s)")
    add("--costs", nargs="+", default=["1:1", "3:1.11", "5:1.49", "8:2.25", "12:3.17"], metavar="ROWS:X",
        help="of rows together, over one (default: %(default)s)")  # fmt: skip
    add("--draft", type=real(0), default=0.02, help="of a draft token, over a row (default: %(default)s)")
    add("--right", type=real(0, 1), default=0.7, help="probability that a draft is right (default: %(default)s)")
    add("--layers", type=whole(1), default=80)
    add("--width", type=whole(1), default=8192)
    add("--gigabytes", type=real(0.001), default=5.0, help="per second of a link (default: %(default)s)")
    add("--topology", choices=(MESH, RING), default=MESH)
    add("--machines", type=whole(1), nargs="+", default=[1, 2, 4])
    add("--latencies-ms", type=real(0), nargs="+", default=[0.01, 0.05, 0.3, 1.0, 5.0])
    args = parser.parse_args(argv)
    try:
        pairs = [pair.split(":") for pair in args.costs]
        costs = dict(sorted((whole(1)(rows), real(0.001)(cost)) for rows, cost in pairs))
    except (ValueError, argparse.ArgumentTypeError):
        parser.error(f"--costs is {' '.join(args.costs)!r}, expected pairs like 1:1 4:1.5")
    fields = (args.row_ms, costs, args.draft, args.right, args.layers, args.width, args.gigabytes, args.topology)
    print(table(Setting(*fields), args.machines, args.latencies_ms).text())


if __name__ == "__main__":
    main()
