"""A rank whose training is a line of Python: fake_rank.py LOGS HOST RANK CODE [LEASE_S]."""

import os
import signal
import sys
from pathlib import Path

from vidworld.trainer.launch import rank

rank.KILL_AFTER_S = 0.5


def main() -> int:
    logs, host, number, code, *limit_s = sys.argv[1:]
    os.environ["RANK"] = number
    lease = rank.Lease(Path(logs) / rank.lease_name(int(number)), *map(float, limit_s))
    process = rank.RankProcess([sys.executable, "-c", code], Path(logs), host, lease)
    signal.signal(signal.SIGTERM, process.forward)
    ended = process.wait().exit_code
    assert ended is not None
    return ended if ended >= 0 else 128 - ended


if __name__ == "__main__":
    raise SystemExit(main())
