"""The class that an app's manifest names (spec/device.md 7.1)."""

from abc import ABC, abstractmethod
from typing import final

from fedcompute.device.developer.connection import Refused, RequestToken
from fedcompute.device.developer.event_urls import EventUrlProvider
from fedcompute.device.developer.inference import ModelManager
from fedcompute.device.developer.key_values import KeyValueStore, MutableKeyValueStore
from fedcompute.device.developer.log_records import LogReader
from fedcompute.device.developer.scheduling import FederatedComputeScheduler
from fedcompute.device.developer.user_data import UserData
from fedcompute.device.developer.worker import IsolatedWorker


class IsolatedService(ABC):
    """An app's half of the system: makes a worker for each operation.

    It runs in a process without network and without files, made for one operation and gone after it. The facilities
    below are all that it reaches; which of them an operation has, the table in docs/devices.md says. Making one never
    fails; one that the operation lacks fails when it is used.
    """

    @abstractmethod
    def on_request(self, request_token: RequestToken) -> IsolatedWorker:
        """The worker for one operation."""

    @final
    def get_remote_data(self, request_token: RequestToken) -> KeyValueStore:
        """What the app has downloaded and kept."""
        return KeyValueStore(request_token, "remote_data")

    @final
    def get_local_data(self, request_token: RequestToken) -> MutableKeyValueStore:
        """What the service stores on this device."""
        return MutableKeyValueStore(request_token, "local_data")

    @final
    def get_log_reader(self, request_token: RequestToken) -> LogReader:
        """The service's own request and event records."""
        return LogReader(request_token)

    @final
    def get_user_data(self, request_token: RequestToken) -> UserData | None:
        """The user's situation, None in an operation that does not get it."""
        try:
            found: UserData | None = request_token("user_data", (), UserData | None)
        except Refused:
            return None
        return found

    @final
    def get_federated_compute_scheduler(self, request_token: RequestToken) -> FederatedComputeScheduler:
        """Schedules training; in `on_execute` and `on_download_completed`."""
        return FederatedComputeScheduler(request_token)

    @final
    def get_event_url_provider(self, request_token: RequestToken) -> EventUrlProvider:
        """Makes URLs for rendered content."""
        return EventUrlProvider(request_token)

    @final
    def get_model_manager(self, request_token: RequestToken) -> ModelManager:
        """Runs models of the service; in `on_execute`."""
        return ModelManager(request_token)
