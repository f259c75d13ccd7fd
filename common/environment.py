"""Environment variables of our processes, and of those that they start; what the user has set stands."""

from __future__ import annotations

import os


def set_variables() -> list[str]:
    """Set those that are not set; gives their names."""
    # Python's processes that we and libraries start (ranks, decoders, torch's compilers) would look for modules in the
    # working folder first: the user's, where a queue.py may lie.
    ours = {"PYTHONSAFEPATH": "1"}
    # Kernels add and multiply in one rounding, as all that we measured; Triton 3.10 would not, and 3.9 warns of that.
    ours["TRITON_DEFAULT_FP_FUSION"] = "1"
    # Before torch is loaded: its threads soon sleep while they wait for one another. By default they spin 30 times as
    # long, and where other programs want the same cores, keep them from the very thread that they wait for. Never to
    # spin costs a sixth of a step's time where nobody else wants them (workshop/LEDGER.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        ours["GOMP_SPINCOUNT"] = "10000"
    ours = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(ours)
    return [*ours]
