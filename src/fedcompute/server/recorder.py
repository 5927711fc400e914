"""Writes what was measured of devices' requests to the database, and learns which populations there are."""

import logging
import threading

from fedcompute.errors import FedComputeError
from fedcompute.server.measures import Measures
from fedcompute.storage.charts import population_names
from fedcompute.storage.database import Database
from fedcompute.storage.request_minutes import add_request_minutes

_LOG = logging.getLogger(__name__)
_PERIOD = 10.0
_PATIENCE = 10.0


class Recorder:
    """A thread beside the API: looks every ten seconds, and once more at the end.

    A server that is killed loses the requests of its last ten seconds from the charts, and nothing else.
    """

    def __init__(self, database: Database, measures: Measures) -> None:
        self._database = database
        self._measures = measures
        self._stopping = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Learns the populations and starts the thread."""
        self._look()
        self._thread.start()

    def stop(self) -> None:
        """Writes what is left and ends the thread; nothing happens if it was never started."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while not self._stopping.wait(_PERIOD):
            self._look()
        self._look()

    def _look(self) -> None:
        taken = self._measures.take()
        try:
            with self._database.read() as tx:
                self._measures.know(population_names(tx))
            if taken:
                with self._database.write() as tx:
                    add_request_minutes(tx, taken)
            self._failing = False
        except FedComputeError as error:
            self._measures.give_back(taken)
            if not self._failing:
                _LOG.warning("requests are not in the charts until the database answers: %s", error)
            self._failing = True
