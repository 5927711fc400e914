"""What becomes of downloaded data."""

import pytest

from fedcompute.device.developer.errors import Status


def test_a_download_keeps_what_the_hook_names_and_deletes_the_rest(bench):
    bench.install(
        """
        def on_download_completed(self, request):
            contents = request.downloaded_contents
            print(sorted(contents.key_set()), contents.get("new"), sorted(self.remote.key_set()))
            return DownloadCompletedOutput(["old", "new", "never"])
        """
    )
    bench.remote(old=b"old", gone=b"gone")
    assert bench.download({"new": b"new", "unwanted": b""}) == 2
    assert bench.values("remote_data") == {"old": b"old", "new": b"new"}
    assert bench.entries()[0].output == "['new', 'unwanted'] b'new' ['gone', 'old']\n"
    with bench.database.read() as tx:
        assert tx.execute("SELECT sync_token FROM app").fetchall() == [(3600,)]


def test_a_download_that_nobody_keeps_empties_remote_data_and_the_log_warns(bench):
    bench.install()
    bench.remote(old=b"old")
    assert bench.download({"new": b"new"}) == 0
    assert bench.values("remote_data") == {}
    warning, _ = bench.entries()
    assert (warning.outcome, "empty" in warning.detail) == ("warning", True)


@pytest.mark.parametrize("answer", ["return None", "return DownloadCompletedOutput(None)", "raise KeyError"])
def test_a_download_hook_without_an_answer_leaves_everything_as_it_was(bench, answer):
    bench.install(f"def on_download_completed(self, request): {answer}")
    bench.remote(old=b"old")
    assert bench.refused(bench.download, {"new": b"new"}).platform_status == Status.SERVICE_FAILED
    assert bench.values("remote_data") == {"old": b"old"}
    with bench.database.read() as tx:
        assert tx.execute("SELECT sync_token FROM app").fetchall() == [(None,)]
