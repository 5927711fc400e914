"""Every page, chart and button of the dashboard."""

from fedcompute.monitoring.pages import actions, assets, sign_in
from fedcompute.monitoring.pages.table import page
from fedcompute.server.api.operations import Operation

PAGES: tuple[Operation, ...] = (
    page("/static/{name}", assets.asset, "asset", role=None),
    *sign_in.operations,
    *actions.operations,
)
