"""Every page, chart and button of the dashboard."""

from fedcompute.monitoring.pages import (
    actions,
    assets,
    compare,
    one_round,
    population,
    populations,
    privacy,
    service,
    sign_in,
    system,
    task,
)
from fedcompute.monitoring.pages.table import page
from fedcompute.server.api.operations import Operation

PAGES: tuple[Operation, ...] = (
    page("/static/{name}", assets.asset, "asset", role=None),
    *sign_in.operations,
    *populations.operations,
    *population.operations,
    *service.operations,
    *compare.operations,
    *privacy.operations,
    *system.operations,
    *task.operations,
    *one_round.operations,
    *actions.operations,
)
