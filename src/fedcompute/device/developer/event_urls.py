"""URLs in rendered content that come back to the service as events (spec/device.md 7.7)."""

from fedcompute.device.developer.connection import Ask, Refused
from fedcompute.device.developer.errors import IllegalState
from fedcompute.device.developer.log_records import Row, check_columns


class EventUrlProvider:
    """Makes `odp://` URLs that only this device can read; one that is opened calls `on_event` with its parameters.

    Its methods raise IllegalState where the device makes none, TypeError for parameters that no column could hold.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def create_event_tracking_url_with_response(
        self, parameters: Row, response_data: bytes | None = None, mime_type: str | None = None
    ) -> str:
        """A URL that answers with `response_data`, for an image, or with nothing."""
        check_columns(parameters)
        return self._create(dict(parameters), response_data, mime_type, None)

    def create_event_tracking_url_with_redirect(self, parameters: Row, destination_url: str) -> str:
        """A URL that leads on to `destination_url`, for a click."""
        if not destination_url:
            raise TypeError("a redirect needs a destination")
        check_columns(parameters)
        return self._create(dict(parameters), None, None, destination_url)

    def _create(self, *arguments: object) -> str:
        try:
            url: str = self._ask("event_urls.create", arguments, str)
        except Refused as refused:
            raise IllegalState(refused.detail) from None
        return url
