"""`cbnb plan` against the memory of real steps."""
import pytest
from plan_peak import CASES, given, measured

from cbnb.plan import plan_step


SHORTER = {"large vocabulary": (128,), "bfloat16 from block 4": (128,)}  # tokens a row, for time: nbs/bench/plan.ipynb has these cases at their own length


@pytest.mark.parametrize("case", CASES)
def test_the_planned_memory_is_that_of_a_real_step(case):
    config, shape = given(case, *SHORTER.get(case, ()))
    planned, peak = plan_step(config, shape=shape, device="cpu").total, measured(case, *SHORTER.get(case, ()))
    assert abs(planned / peak - 1) < 0.1, f"{planned / 1e6:.0f} MB planned, {peak / 1e6:.0f} MB held"
