"""What every command-line tool does the same way: arguments, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from .errors import UserError, visible

# Seconds. The launcher ends with the status of the first rank that ends, and ends the others then: that must be the one
# with the error, which has let go of its connections and takes a moment to leave.
LINGER = 5
# What a rank is told when another one has ended.
LOST_CONNECTION = re.compile(r"Connection (closed|reset)|Broken pipe|Timed out waiting", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: error: {visible(message)} (see --help)\n")
        raise SystemExit(2)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a tool's main function. A UserError becomes one line on stderr and its exit code; a defect of ours keeps
    its traceback."""
    try:
        raise SystemExit(main())
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" on rank {rank}"
        sys.stderr.write(f"error{where}: {visible(str(error))} [{error.help}]\n")
        _write_to_log_files(str(error))
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        sys.stderr.write(f"error: {visible(str(error.filename or 'cannot write'))}: {error.strerror}\n")
        raise SystemExit(2) from None
    except RuntimeError as error:
        if "RANK" not in os.environ or not LOST_CONNECTION.search(str(error)):
            raise
        sys.stderr.write(f"error on rank {os.environ['RANK']}: another rank is gone ({str(error).splitlines()[0]})\n")
        time.sleep(LINGER)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None


def _write_to_log_files(message: str) -> None:
    """The run's log files get the error too; the screen has it already."""
    logger = logging.getLogger(__package__)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, message, (), None))
