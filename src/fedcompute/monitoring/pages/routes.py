"""Every page, chart and button of the dashboard."""

from fedcompute.monitoring.pages import actions, assets, one_round, populations, sign_in, task
from fedcompute.monitoring.pages.table import page
from fedcompute.server.api.operations import Operation

PAGES: tuple[Operation, ...] = (
    page("/static/{name}", assets.asset, "asset", role=None),
    *sign_in.operations,
    *populations.operations,
    *task.operations,
    *one_round.operations,
    *actions.operations,
)
