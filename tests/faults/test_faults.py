import pytest

pytestmark = pytest.mark.faults
pytest.importorskip("resource", reason="the faults are those of a POSIX system")

from bench import Bench  # noqa: E402 - after what they need is known to be there

from faults import FAULTS  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_survives(fault, bench):
    row = fault(bench)
    assert row.wrong == []
    assert row.lost <= 1
