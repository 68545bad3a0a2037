"""MODEL.BACKBONE.CONV_BODY: the network and what stands on it, in one name as upstream registers them."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import ConfigError

FORM = re.compile(r"(?:R-(18|34|50|101|152)(vd)?|HRNet-W(18|30|32|40|48))-(C4|C5|FPN|FPN-RETINANET)")


class ConvBody(NamedTuple):
    """depth: of a ResNet, 0 for an HRNet. vd: ResNet-vd. width: channels of an HRNet's finest branch, 0 for a ResNet.
    neck: C4, C5 (one map, of stride 16 or 32), FPN, or FPN-RETINANET (with P6 and P7, without P2)."""

    depth: int
    vd: bool
    width: int
    neck: str


def parse(name: str) -> ConvBody:
    """Raises ConfigError when there is no such body."""
    found = FORM.fullmatch(name)
    if not found or (found[3] and found[4] != "FPN"):
        raise ConfigError(
            f"MODEL.BACKBONE.CONV_BODY is {name!r}; known are R-18, R-34, R-50, R-101, R-152, each also with vd, "
            "followed by -C4, -C5, -FPN or -FPN-RETINANET, and HRNet-W18, -W30, -W32, -W40, -W48 followed by -FPN"
        )
    depth, vd, width, neck = found.groups()
    return ConvBody(int(depth or 0), bool(vd), int(width or 0), neck)
