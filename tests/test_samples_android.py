"""The Android sample, as far as a machine without Android can tell: it compiles, declares what our reader reads, and
writes examples that parse. Nothing here shows that it runs on a phone.
"""

import base64
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fedcompute.builder.config import read_config
from fedcompute.builder.validation import validate
from fedcompute.cli.android import SAMPLE_PACKAGE, adb_commands
from fedcompute.device.manifest import read_manifest
from fedcompute.protos import task_builder_pb2, tensorflow_pb2
from fedcompute.server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "samples" / "android"
JAVA = SAMPLE / "java" / "com" / "example" / "odpsample"
DATA = Path(__file__).parent / "data"
GUIDE = ROOT / "docs" / "android.md"
BASE_URL = f"http://localhost:{Settings.port}"

needs_javac = pytest.mark.skipif(shutil.which("javac") is None, reason="no javac on this machine")


def compile_java(sources, out):
    done = subprocess.run(
        ["javac", "--release", "17", "-proc:none", "-Xlint:all", "-Werror", "-d", out, *sources],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def android_api(folder):
    """Writes each signature of the data file into a source file of its own."""
    for block in re.split(r"(?m)^(?=package )", (DATA / "android_api.txt").read_text())[1:]:
        name = re.search(r"^public (?:\w+ )*?(?:class|interface) (\w+)", block, re.MULTILINE)[1]
        package = re.match(r"package ([\w.]+);", block)[1]
        path = folder.joinpath(*package.split("."), f"{name}.java")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
        yield path


@needs_javac
def test_the_sample_compiles_without_a_warning_against_androids_signatures(tmp_path):
    compile_java([*android_api(tmp_path / "api"), *JAVA.glob("*.java")], tmp_path / "out")
    made = {path.stem for path in (tmp_path / "out" / "com" / "example" / "odpsample").glob("*.class")}
    assert made >= {"MainActivity", "SampleService", "SampleWorker", "TfExample"}


@needs_javac
def test_the_samples_examples_parse_as_what_was_put_in(tmp_path):
    compile_java([JAVA / "TfExample.java", DATA / "TfExampleBytes.java"], tmp_path)
    done = subprocess.run(
        ["java", "-cp", tmp_path, "com.example.odpsample.TfExampleBytes"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    feature = tensorflow_pb2.Example.FromString(base64.b64decode(done.stdout)).features.feature
    assert set(feature) == {"x", "y", "floats", "ints", "none", "bytes"}
    np.testing.assert_allclose(feature["x"].float_list.value, np.arange(784) / 783, rtol=1e-6)
    float32 = np.finfo(np.float32)
    assert list(feature["floats"].float_list.value) == [-0.0, float32.smallest_subnormal, float32.max, -np.inf]
    assert list(feature["y"].int64_list.value) == [7]
    assert list(feature["ints"].int64_list.value) == [0, 127, 128, -1, -(2**63), 2**63 - 1]
    assert feature["none"].HasField("int64_list")
    assert list(feature["bytes"].bytes_list.value) == [b"", b"\x00\xff", b"text"]


def test_our_reader_finds_the_samples_service_and_the_servers_default_url():
    found = read_manifest(SAMPLE)
    assert (found.package, found.service) == (SAMPLE_PACKAGE, f"{SAMPLE_PACKAGE}.SampleService")
    assert (found.server, found.download) == (BASE_URL, None)
    assert (JAVA / "SampleService.java").read_text().startswith(f"package {SAMPLE_PACKAGE};")


def test_the_build_file_names_the_manifests_package_and_folders_that_exist():
    build = (SAMPLE / "build.gradle.kts").read_text()
    assert re.findall(r'(?:namespace|applicationId) = "(.+)"', build) == [SAMPLE_PACKAGE] * 2
    named = re.findall(r'(?:srcFile|listOf)\("(.+?)"\)', build)
    assert len(named) == 3
    assert all((SAMPLE / name).exists() for name in named)


def test_the_guide_prints_the_commands_of_the_server_that_it_starts():
    guide = GUIDE.read_text()
    expected = adb_commands(BASE_URL, f"{BASE_URL}/.well-known/odp/v1/public-keys", encryption=True)
    assert "\n".join(expected) in guide
    assert "fedcompute server --android" in guide


def test_the_guide_and_the_sample_say_that_no_phone_has_run_them():
    for page in (GUIDE, SAMPLE / "README.md"):
        assert "has not run on a phone" in page.read_text().replace("\n", " ")


def test_the_guides_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#:]+)\)", GUIDE.read_text())
    assert targets
    assert [target for target in targets if not (GUIDE.parent / target).exists()] == []


def test_the_guides_task_is_valid_and_of_the_samples_population():
    text = re.search(r"<!-- file: task_config.pbtxt -->\n```\w+\n(.*?)\n```", GUIDE.read_text(), re.DOTALL)[1]
    settings = validate(read_config(text.encode()).config, task_builder_pb2.ExperimentFlags(skip_dp_check=True))
    assert settings.population == re.search(r'POPULATION = "(.+)"', (JAVA / "SampleWorker.java").read_text())[1]
