"""Manifests: what is read from them, and that what is wrong is named by file, line and column."""

import logging

import pytest

from fedcompute.device.manifest import ELEMENTS_LIMIT, MANIFEST_BYTES_LIMIT, NO_CERTIFICATE, Manifest, read_manifest
from fedcompute.device.owner import Owner
from fedcompute.errors import ArtifactInvalid, Reason

PROPERTY = "android.ondevicepersonalization.ON_DEVICE_PERSONALIZATION_CONFIG"
APP = f"""\
<?xml version="1.0" encoding="utf-8"?>
<manifest xmlns:android="http://schemas.android.com/apk/res/android" package="com.example.app">
  <application android:label="app">
    <property android:name="{PROPERTY}" android:resource="@xml/OdpSettings"/>
    <service android:name="com.example.app.SampleService" android:exported="true" android:isolatedProcess="true"/>
    <activity android:name=".Main"/>
  </application>
</manifest>
"""
SETTINGS = """\
<on-device-personalization>
  <service name="com.example.app.SampleService">
    <federated-compute-settings url="https://fc.example.org/"/>
    <download-settings url="https://data.example.org/v1"/>
  </service>
</on-device-personalization>
"""
TOML = """\
[service]
name = "com.example.app.SampleService"

[federated-compute-settings]
url = "https://fc.example.org/"

[download-settings]
url = "https://data.example.org/v1"
"""
READ = Manifest(
    "com.example.app", "com.example.app.SampleService", "https://fc.example.org/", "https://data.example.org/v1"
)


@pytest.fixture
def write(tmp_path):
    """`write(name, text)` writes a file into the test's directory and returns its path."""

    def one(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return one


@pytest.fixture
def app(write):
    """`app(manifest, settings)` writes an app's two files and returns the path of its manifest."""

    def one(manifest=APP, settings=SETTINGS):
        write("res/xml/OdpSettings.xml", settings)
        return write("AndroidManifest.xml", manifest)

    return one


def refusal(path):
    with pytest.raises(ArtifactInvalid) as caught:
        read_manifest(path)
    assert caught.value.reason is Reason.MANIFEST_INVALID
    return caught.value.detail


def test_the_three_forms_say_the_same(app, write):
    assert read_manifest(app()) == READ
    assert read_manifest(write("settings.xml", SETTINGS)) == READ
    assert read_manifest(write("odp.toml", TOML)) == READ


def test_a_manifest_makes_an_owner_with_the_protocols_digest(app):
    found = read_manifest(app())
    owner = Owner(found.package, found.service, found.certificate_digest)
    assert owner.digest == f"com.example.app/com.example.app.SampleService-{NO_CERTIFICATE}"


@pytest.mark.parametrize(
    ("declared", "package"),
    [("com.example.app.SampleService", "com.example.app"), ("com.example.Outer$Inner", "com.example")],
)
def test_settings_alone_take_the_package_from_the_services_name(write, declared, package):
    found = read_manifest(write("s.xml", SETTINGS.replace("com.example.app.SampleService", declared)))
    assert (found.package, found.service) == (package, declared)


def test_the_package_of_an_app_need_not_be_that_of_its_class(app):
    name = "org.other.Service"
    manifest = APP.replace("com.example.app.SampleService", name)
    found = read_manifest(app(manifest, SETTINGS.replace("com.example.app.SampleService", name)))
    assert (found.package, found.service) == ("com.example.app", name)


@pytest.mark.parametrize("short", [".SampleService", "SampleService"])
def test_an_app_may_shorten_the_names_of_its_classes(app, short):
    assert read_manifest(app(APP.replace("com.example.app.SampleService", short))) == READ


def test_the_android_namespace_may_have_any_prefix(app):
    assert read_manifest(app(APP.replace("android:", "a:").replace("xmlns:android=", "xmlns:a="))) == READ


def test_the_last_url_wins_wherever_it_stands(write, caplog):
    text = """<on-device-personalization><service name="a.B">
      <federated-compute-settings url="https://one"/><download-settings url="https://two"/></service>
      <more><federated-compute-settings url="http://three"/></more><download-settings/></on-device-personalization>"""
    found = read_manifest(write("s.xml", text))
    assert (found.server, found.download) == ("http://three", None)


def test_an_app_that_neither_trains_nor_downloads_has_no_urls(write):
    found = read_manifest(
        write("s.xml", '<on-device-personalization><service name="a.B"/></on-device-personalization>')
    )
    assert (found.server, found.download) == (None, None)
    found = read_manifest(write("odp.toml", '[service]\nname = "a.B"\n'))
    assert (found.server, found.download) == (None, None)


def test_unknown_elements_are_logged_with_their_line_and_ignored(write, caplog):
    text = SETTINGS.replace("  </service>", "    <federated-compute-setting url='https://x'/>\n  </service>")
    with caplog.at_level(logging.WARNING):
        assert read_manifest(write("s.xml", text)) == READ
    assert [record.message.rpartition("/")[2] for record in caplog.records] == [
        "s.xml:5: element <federated-compute-setting> is unknown and ignored"
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (' package="com.example.app"', "", "AndroidManifest.xml:2:1: <manifest> has no package"),
        ('package="com.example.app"', 'package="com/example"', "AndroidManifest.xml:2:1: package 'com/example'"),
        (PROPERTY, "other", "AndroidManifest.xml:2:1: no <property>"),
        ("@xml/OdpSettings", "@xml/../x", "AndroidManifest.xml:4:5: "),
        ("@xml/OdpSettings", "@raw/OdpSettings", "AndroidManifest.xml:4:5: "),
        ("@xml/OdpSettings", "@xml/missing", "AndroidManifest.xml:4:5: @xml/missing: there is no res/xml/missing.xml"),
        ("app.SampleService", "app.Other", "AndroidManifest.xml:4:5: declares no <service> com.example.app.Sample"),
        (' android:isolatedProcess="true"', "", 'AndroidManifest.xml:5:5: service com.example.app.SampleService needs'),
        ('isolatedProcess="true"', 'isolatedProcess="false"', 'needs android:isolatedProcess="true"'),
        ('exported="true"', 'exported="false"', 'AndroidManifest.xml:5:5: service com.example.app.SampleService needs'),
        ("<application", "<applications", "AndroidManifest.xml:7:5: mismatched tag"),
        ("</manifest>\n", "", "AndroidManifest.xml:8:1: no element found"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_app_is_named_with_its_place(app, old, new, words):
    assert words in refusal(app(APP.replace(old, new)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<odp/>", "s.xml:1:1: the root is neither"),
        ("<on-device-personalization/>", "s.xml:1:1: the first element"),
        ("<on-device-personalization>\n <other/>\n</on-device-personalization>", "s.xml:2:2: the first element"),
        ("<on-device-personalization>\n <service/>\n</on-device-personalization>", "s.xml:2:2: <service> has no name"),
        (SETTINGS.replace("com.example.app.SampleService", "Service"), "s.xml:2:3: service Service has no package"),
        ("", "s.xml:1:1: no element found"),
        ("<a", "s.xml:1:1: unclosed token"),
        ('<a b="&x;"/>', "s.xml:1:1: undefined entity"),
        (b"<a>\xff</a>", "s.xml:1:4: not well-formed"),
    ],
)
def test_what_is_wrong_with_settings_is_named_with_its_place(write, text, words):
    assert words in refusal(write("s.xml", text))


@pytest.mark.parametrize(
    "name",
    ["a..b", ".a.b", "a.b.", "a/b.C", "a.b\r\nx: y", "a.B-C", "ä.B", "", "a b.C", "a.B?" + "x", "a." + "b" * 254],
)
def test_names_that_cannot_travel_in_headers_and_paths_are_refused(write, name):
    text = SETTINGS.replace("com.example.app.SampleService", name.replace("\r\n", "&#13;&#10;"))
    assert "s.xml:2:3: service " in refusal(write("s.xml", text))
    quoted = name.replace("\r\n", "\\r\\n")
    assert "odp.toml:2: service " in refusal(write("odp.toml", f'[service]\nname = "{quoted}"\n'))
    assert "odp.toml:3: package " in refusal(write("odp.toml", f'[service]\nname = "a.B"\npackage = "{quoted}"\n'))


@pytest.mark.parametrize(
    "prologue",
    [
        "<!DOCTYPE on-device-personalization>",
        '<!DOCTYPE a [<!ENTITY x "y">]>',
        '<!DOCTYPE a SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE a [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
    ],
)
def test_a_doctype_is_refused_before_anything_in_it_counts(write, prologue):
    assert "s.xml:2: a DOCTYPE is not taken" in refusal(write("s.xml", f"\n{prologue}\n{SETTINGS}"))


def test_the_encoding_is_that_of_the_bytes_whatever_is_declared(write):
    declared = f'<?xml version="1.0" encoding="rot13"?>\n{SETTINGS}'
    assert read_manifest(write("s.xml", declared)) == READ
    assert read_manifest(write("s.xml", b"\xef\xbb\xbf" + SETTINGS.encode())) == READ
    assert read_manifest(write("s.xml", SETTINGS.encode("utf-16"))) == READ


def test_files_and_their_elements_are_limited(write):
    assert f"more than {MANIFEST_BYTES_LIMIT} bytes" in refusal(write("s.xml", SETTINGS + " " * MANIFEST_BYTES_LIMIT))
    assert f"more than {MANIFEST_BYTES_LIMIT} bytes" in refusal(write("odp.toml", TOML + " " * MANIFEST_BYTES_LIMIT))
    assert f"more than {ELEMENTS_LIMIT} elements" in refusal(write("s.xml", "<a>" * (ELEMENTS_LIMIT + 1)))
    assert "nested too deeply" in refusal(write("odp.toml", "a = " + "[" * 100_000))


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "none.xml: No such file" in refusal(tmp_path / "none.xml")


def test_a_toml_file_may_name_package_and_certificate(write):
    digest = ":".join(["ab"] * 32)
    extra = f'package = "org.apk"\ncertificate-digest = "{digest}"\n'
    found = read_manifest(write("odp.toml", TOML.replace("\n\n[fed", f"\n{extra}\n[fed")))
    assert (found.package, found.service) == ("org.apk", "com.example.app.SampleService")
    assert found.certificate_digest == "AB" * 32


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name =", "nam =", "odp.toml:2: unknown key 'nam' in [service]"),
        ("[download-settings]", "[downloads]", "odp.toml:7: unknown table or key 'downloads'"),
        ("[service]", 'x = 1\n[service]', "odp.toml:1: unknown table or key 'x'"),
        ("[service]", "service = 1\n[a]", "odp.toml:1: service is not a table"),
        ("[service]", "[[service]]", "odp.toml:1: service is not a table"),
        ('url = "https://data.example.org/v1"', "\nurl = 5", "odp.toml:9: url in [download-settings] is not text"),
        ('url = "https://data.example.org/v1"', "url =", "odp.toml:8:6: Invalid value"),
        ('name = "com.example.app.SampleService"', "", "odp.toml:1: no name in [service]"),
        ('name = "com.example.app.SampleService"', 'name = "Sample"', "odp.toml: package ''"),
        ("[service]\n", '[service]\ncertificate-digest = "abc"\n', "odp.toml:2: certificate-digest has 3 characters"),
        ("[service]\n", '[service]\ncertificate-digest = "{}"\n'.format("g" * 64), "odp.toml:2: certificate-digest"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_toml_is_named_with_its_line(write, old, new, words):
    assert words in refusal(write("odp.toml", TOML.replace(old, new)))


def test_toml_that_is_not_text_is_refused(write):
    assert "odp.toml: byte 0 is not UTF-8" in refusal(write("odp.toml", b"\xff"))


@pytest.mark.parametrize("name", ["odp.toml", "res/xml/odp_settings.xml", "settings.xml"])
def test_a_directory_stands_for_the_only_manifest_in_it(write, tmp_path, name):
    write("res/xml/other.xml", "<resources/>")
    write("notes.xml", "no xml at all")
    write(name, TOML if name.endswith(".toml") else SETTINGS)
    assert read_manifest(tmp_path) == READ


def test_a_directory_with_an_app_is_read_as_that_app(app, write, tmp_path):
    app()
    write("res/xml/unused.xml", SETTINGS.replace("Sample", "Other"))
    assert read_manifest(tmp_path) == READ


def test_a_directory_with_several_manifests_or_none_is_refused(app, write, tmp_path):
    assert "neither odp.toml nor AndroidManifest.xml nor" in refusal(tmp_path)
    write("a.xml", SETTINGS)
    write("odp.toml", TOML)
    assert "2 manifests: odp.toml, a.xml" in refusal(tmp_path)
    app()
    assert "2 manifests: odp.toml, AndroidManifest.xml" in refusal(tmp_path)


def test_a_damaged_file_in_a_directory_is_named_if_its_root_is_right(write, tmp_path):
    write("a.xml", SETTINGS.replace("</service>", ""))
    assert "a.xml:6:3: mismatched tag" in refusal(tmp_path)
