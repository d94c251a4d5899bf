"""Tables of hours that begin with the present one."""

import time
from datetime import UTC, datetime


def this_hour():
    """When the present hour began; waits a moment where it is about to end."""
    if time.time() % 3600 > 3590:
        time.sleep(12)
    return time.time() // 3600 * 3600


def write_hours(path, g_co2_per_kwh):
    rows = [
        f"{datetime.fromtimestamp(this_hour() + 3600 * idx, UTC):%Y-%m-%dT%H:%MZ},{value}\n"
        for idx, value in enumerate(g_co2_per_kwh)
    ]
    path.write_text("".join(["time,g_co2_per_kwh\n", *rows]))
    return path
