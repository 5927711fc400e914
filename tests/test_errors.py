from fedcompute.errors import CATALOGUE, FedComputeError, Reason


def test_every_reason_has_an_entry_with_a_status_and_a_remedy():
    assert set(CATALOGUE) == set(Reason)
    assert all(400 <= entry.status < 600 and entry.remedy for entry in CATALOGUE.values())


def test_an_error_carries_its_code_its_numbers_and_what_to_do():
    error = FedComputeError(Reason.NORM_TOO_LARGE, "update norm 3.2 exceeds clip norm 1.0")
    assert str(error) == "update norm 3.2 exceeds clip norm 1.0 [norm_too_large]"
    assert (error.status, error.remedy) == (400, CATALOGUE[Reason.NORM_TOO_LARGE].remedy)
