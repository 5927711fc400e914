"""Apps are installed, listed and removed, and told apart."""

import json

import pytest

SERVICE = "org.example.app/org.example.app.Service"


def test_an_app_is_installed_listed_replaced_and_removed(device, write_app):
    folder = write_app()
    assert device("apps") == "no apps; install one with `fedcompute device install FOLDER`\n"
    assert f"installed {SERVICE}" in device("install", folder)
    told = {"service": SERVICE, "server": "https://learn.example", "download": "https://vendor.example/d.json"}
    write_app(server=told["server"], download=told["download"])
    assert json.loads(device("install", folder, "--json")) == told
    assert json.loads(device("apps", "--json")) == [{"code": str(folder), **told}]
    assert "https://learn.example" in device("apps")
    assert SERVICE in device("uninstall")
    assert json.loads(device("apps", "--json")) == []


def test_a_bad_manifest_is_refused_with_its_line(device, write_app):
    folder = write_app()
    with (folder / "odp.toml").open("a") as file:
        file.write('[download-setting]\nurl = "https://vendor.example"\n')
    error = device.refused("install", folder)
    assert f"{folder}/odp.toml:5: unknown table" in error["Error"]
    assert error["Code"] == "manifest_invalid"


def test_a_manifest_may_lie_elsewhere_and_of_several_one_is_named(device, write_app, tmp_path):
    folder = write_app()
    elsewhere = (folder / "odp.toml").rename(tmp_path / "odp.toml")
    assert "neither odp.toml" in device.refused("install", folder)["Error"]
    assert "installed" in device("install", folder, "--manifest", elsewhere)
    for name in ("one", "two"):
        settings = '<on-device-personalization><service name="org.example.app.Service"/></on-device-personalization>'
        (folder / f"{name}.xml").write_text(settings)
    assert "2 manifests" in device.refused("install", folder)["Error"]


def test_an_app_around_the_device_s_directory_is_refused_before_there_is_one(device, write_app, directory):
    folder = write_app()
    error = device.refused("install", folder, "--device-dir", folder / "device")
    assert "which services may read" in error["Error"]
    assert not (folder / "device").exists()
    (folder / "link").symlink_to(folder)
    device.refused("install", folder / "link", "--device-dir", folder / "deep" / "device")
    assert not directory.exists()


def test_a_url_that_devices_refuse_is_warned_of(device, write_app):
    shown = device("install", write_app(server="http://learn.example"))
    assert "warning: federated-compute-settings: neither https:// nor http://localhost:<port>" in shown
    assert "warning" not in device("install", write_app())


@pytest.mark.parametrize(
    "arguments",
    [["uninstall"], ["execute"], ["schedule", "digits"], ["cancel", "digits"], ["run-now", "digits"]],
    ids=" ".join,
)
def test_without_an_app_or_with_several_it_is_said_which_could_be_meant(device, write_app, arguments):
    error = device.refused(*arguments)
    assert (error["Error"], "device install" in error["Remedy"]) == ("no app is installed", True)
    device("install", write_app())
    device("install", write_app("other"))
    error = device.refused(*arguments)
    assert error["Error"] == f"several services could be meant: {SERVICE}, org.example.other/org.example.other.Service"
    assert "--service" in error["Remedy"]
    assert "nothing is not installed" in device.refused(*arguments, "--service", "nothing")["Error"]
