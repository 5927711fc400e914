import subprocess
import sys

import pytest

from fedcompute.errors import OperationFailed, Reason
from fedcompute.storage.claim import Claim

HOLD = (
    "import sys, time, pathlib\n"
    "from fedcompute.storage.claim import Claim\n"
    "claim = Claim(pathlib.Path(sys.argv[1]))\n"
    "print('claimed', flush=True)\n"
    "time.sleep(60)\n"
)


def test_a_claim_is_refused_to_the_second_and_free_again_after_the_first(tmp_path):
    path = tmp_path / "data.lock"
    with Claim(path), pytest.raises(OperationFailed) as refused:
        Claim(path)
    assert refused.value.reason is Reason.DATA_IN_USE
    Claim(path).close()


def test_kill_9_gives_a_claim_back_and_the_refusal_names_the_process(tmp_path):
    path = tmp_path / "data.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"claimed\n"
        with pytest.raises(OperationFailed, match=f"process {holder.pid}"):
            Claim(path)
    finally:
        holder.kill()
        holder.communicate()
    Claim(path).close()


def test_a_folder_that_cannot_be_written_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OperationFailed) as refused:
        Claim(tmp_path / "file" / "data.lock")
    assert refused.value.reason is Reason.STORAGE_FAILED
