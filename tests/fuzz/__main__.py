"""Look for faults for some minutes: ``python -m tests.fuzz --minutes 10 --seed 0``.

Prints a line a part, then what did not hold; exits 1 if anything did not. A finding's seed repeats
it: ``python -m tests.fuzz --part api --seed 17 --rounds 1``. (Faults of timing, such as those of
threads or of a kill at a random time, may take several rounds.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.fuzz import api, checkpoints, interrupts, kills
from tests.fuzz.harness import Part, run_part

PARTS = (api.PART, checkpoints.PART, interrupts.PART, kills.PART)


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts in turn; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Look for faults.")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together")
    parser.add_argument("--seed", type=int, default=0, help="of the first round of each part")
    parser.add_argument("--rounds", type=int, help="of each part, in place of a time")
    parser.add_argument("--part", choices=[part.name for part in parts], help="only this one")
    parser.add_argument("--try-seconds", type=float, default=30.0, help="after which it hangs")
    given = parser.parse_args(arguments)
    chosen = [part for part in parts if given.part in (None, part.name)]
    seconds = 60 * given.minutes / len(chosen) if given.rounds is None else float("inf")
    broken = False
    for part in chosen:
        report = run_part(part, given.seed, seconds, given.rounds, given.try_seconds)
        print(f"{report.line()} ({part.about})", flush=True)
        for line in report.details():
            print(line, flush=True)
        if report.findings:
            again = f"python -m tests.fuzz --part {part.name} --seed SEED --rounds 1"
            print(f"  repeat a finding with: {again}", flush=True)
        broken |= bool(report.findings) or not report.tried
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
