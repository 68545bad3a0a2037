"""Errors that a person can act on. The tools print their message as one line on stderr and exit with 2."""

import re

# All but tabs and ends of lines
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """Control characters as \\x1b and the like: names in a data set must not steer the terminal that shows them."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class UserError(Exception):
    """What was wrong, where (file, key, image id) and what to do, in one line.

    Those of measuring, comparing and reporting are of this class itself, all others of one below.
    """

    exit_code = 2
    help = "docs/troubleshooting.md#benchmarks-and-reports"  # the section that the tools name behind the message


class ConfigError(UserError):
    """A yaml file, a key or a value that cannot be used."""

    help = "docs/troubleshooting.md#configuration"


class DataError(UserError):
    """A data set, an annotation or an image that cannot be used."""

    help = "docs/troubleshooting.md#data"


class CheckpointError(UserError):
    """A weights file that is missing, damaged, or belongs to another model."""

    help = "docs/troubleshooting.md#weights"


class DeviceError(UserError):
    """A device or a kernel that was asked for and is not there."""

    help = "docs/troubleshooting.md#devices-and-kernels"


class NonFiniteLossError(UserError):
    """A loss became NaN or infinite; the message names the losses and the images."""

    help = "docs/troubleshooting.md#training"
    exit_code = 1


class ResultError(UserError):
    """The measured accuracy missed TEST.EXPECTED_RESULTS."""

    help = "docs/troubleshooting.md#results"
    exit_code = 1


class Terminated(UserError):
    """SIGTERM; the message says what was saved."""

    help = "docs/troubleshooting.md#training"
    exit_code = 143


class DependencyError(UserError):
    """An optional package that is needed for what was asked, and is not installed."""

    help = "docs/troubleshooting.md#devices-and-kernels"
