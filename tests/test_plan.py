"""`cbnb plan` against the memory of real steps."""
import pytest
from plan_peak import CASES, given, measured

from cbnb.plan import plan_step


@pytest.mark.parametrize("case", CASES)
def test_the_planned_memory_is_that_of_a_real_step(case):
    config, shape = given(case)
    planned, peak = plan_step(config, shape=shape, device="cpu").total, measured(case)
    assert abs(planned / peak - 1) < 0.1, f"{planned / 1e6:.0f} MB planned, {peak / 1e6:.0f} MB held"
