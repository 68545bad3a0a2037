"""`python -m maskrcnn_benchmark.engine.launch ...` is torchrun with the failed rank's exit status and a one-line error.

torchrun itself ends with status 1 and a traceback of its own, whatever the rank said.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        sys.stderr.write(f"error: rank {rank} {how}, so all ranks were ended; its words are above\n")
        return 128 - code if code < 0 else code
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
