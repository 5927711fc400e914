"""What a service shows, and who may see it."""

from dataclasses import replace

import pytest

from fedcompute.device.developer.errors import Status
from fedcompute.device.owner import Owner
from fedcompute.device.personalization import HTML_CHARACTERS_LIMIT
from fedcompute.device.state.apps import install, uninstall

NOW = 1_700_000_000_000
OWNER = Owner("org.example.app", "org.example.app.Service", "AB" * 32)


SHOWS = """
def on_execute(self, request):
    return ExecuteOutput(RequestLogRecord([{"id": 1}, {"id": 2}]), RenderingConfig(["greeting"]))

def on_render(self, request):
    params = {"who": "<b>'A&B'</b>", "width": request.width, "yes": True}
    if self.remote.get("content"):
        return RenderOutput(content=f"{request.rendering_config.keys} {request.height}")
    key = self.remote.get("template")
    return RenderOutput(template_id=key and key.decode(), template_params=params)
"""


def shown(bench, **remote):
    bench.install(SHOWS)
    bench.remote(greeting=b"<p title='$who'>$who ${width}px, $yes $unknown $$5</p>", **remote)
    return bench.execute().surface_token


def test_content_is_shown_as_it_is(bench):
    token = shown(bench, content=b"1")
    assert bench.render(token) == "['greeting'] 240"


def test_a_template_is_filled_with_escaped_values(bench):
    token = shown(bench, template=b"greeting")
    person = "&lt;b&gt;&#x27;A&amp;B&#x27;&lt;/b&gt;"
    assert bench.render(token) == f"<p title='{person}'>{person} 320px, true $unknown $5</p>"


@pytest.mark.parametrize("template", [{}, {"template": b"gone"}], ids=["neither", "gone"])
def test_a_surface_without_content_fails_the_service(bench, template):
    token = shown(bench, **template)
    assert bench.refused(bench.render, token).platform_status == Status.SERVICE_FAILED
    assert [entry.outcome for entry in bench.entries()] == ["ok", "service_failed"]


def test_a_template_that_would_fill_the_memory_is_refused(bench):
    bench.install(
        """
        def on_execute(self, request): return ExecuteOutput(rendering_config=RenderingConfig(["t"]))
        def on_render(self, request): return RenderOutput(template_id="t", template_params={"x": "x" * 1_000_000})
        """
    )
    bench.remote(t=b"$x" * 1_000_000)
    failure = bench.refused(bench.render, bench.execute().surface_token)
    assert (failure.platform_status, str(HTML_CHARACTERS_LIMIT) in failure.detail) == (Status.SERVICE_FAILED, True)


@pytest.mark.parametrize(("width", "height"), [(0, 240), (320, 0), (-1, 240)])
def test_a_frame_without_room_is_an_argument_error(bench, width, height):
    with pytest.raises(ValueError, match="pixels"):
        bench.render(b"", width, height)


def test_only_tokens_that_this_device_made_open_and_only_with_consent(bench, tmp_path, write_service):
    token = shown(bench, content=b"1")
    (tmp_path / "other").mkdir()
    other = type(bench)(tmp_path / "other", write_service)
    foreign = shown(other, content=b"1")
    other.database.close()
    changed = bytes([*token[:-5], token[-5] ^ 1, *token[-4:]])
    for bad in (foreign, changed, token[:-8], b"", b"\xff", b"odp://localhost?e=" + token):
        assert bench.refused(bench.render, bad).platform_status == Status.INTERNAL
        assert bench.refused(bench.open, bad, "odp://localhost?e=x").platform_status == Status.INTERNAL
    bench.revoke("protected_audience")
    assert bench.refused(bench.render, token).platform_status == Status.PERSONALIZATION_DISABLED
    assert bench.refused(bench.open, token, "odp://localhost?e=x").platform_status == Status.PERSONALIZATION_DISABLED


def test_a_surface_outlives_neither_its_app_nor_its_caller_s_place_on_the_list(bench):
    token = shown(bench, content=b"1")
    bench.flag("caller_app_allow_list", "org.example.other")
    assert bench.refused(bench.render, token).platform_status == Status.CALLER_NOT_ALLOWED
    with bench.database.write() as tx:
        uninstall(tx, OWNER)
    assert bench.refused(bench.render, token).platform_status == Status.NAME_NOT_FOUND


def test_a_surface_opens_for_no_other_certificate(bench):
    token = shown(bench, content=b"1")
    with bench.database.write() as tx:
        install(tx, replace(bench.app, owner=replace(OWNER, certificate_digest="CD" * 32)), NOW)
    assert "another certificate" in bench.refused(bench.render, token).detail
