"""What a device tells services of its user's situation, read off the machine (spec/device.md 7.8)."""

from datetime import datetime, timedelta

from fedcompute.device.developer.user_data import UserData
from fedcompute.device.jobs.conditions import Conditions


def user_data(conditions: Conditions) -> UserData:
    """The situation now; what a machine without screen and carrier cannot know stays undefined."""
    offset = datetime.now().astimezone().utcoffset() or timedelta()
    network = "none" if not conditions.network else "unmetered" if conditions.unmetered else "metered"
    return UserData(
        timezone_utc_offset=timedelta(minutes=offset // timedelta(minutes=1)),
        available_storage_bytes=conditions.free_bytes,
        battery_percentage=conditions.battery_percent,
        network_type=network,
    )
