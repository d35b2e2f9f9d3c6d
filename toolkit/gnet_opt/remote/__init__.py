"""Running on a device over plain SSH what would otherwise run here.

`Work` says what, `Device` where. `check` looks, and `run` looks, copies, starts, follows, brings
the results home and leaves the device as it was. Nothing is ever installed there.
"""

from __future__ import annotations

from gnet_opt.remote.address import Address, Device
from gnet_opt.remote.fleet import Result, check, read_fleet, run
from gnet_opt.remote.job import Outcome
from gnet_opt.remote.parcel import OUT, Work
from gnet_opt.remote.preflight import Report

__all__ = [
    "OUT",
    "Address",
    "Device",
    "Outcome",
    "Report",
    "Result",
    "Work",
    "check",
    "read_fleet",
    "run",
]
