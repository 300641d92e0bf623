"""What the suite of test_ops.py runs: every op, with the options that take other paths through its kernels.

A new op adds a file here with its cases, which follow `pattern.Case`; a new option of an op adds one line to its cases.
"""

from .counts import COUNTS
from .losses import LOSSES, LossCase, assert_not_less_exact, make_case, problem, quarter, record, value_and_grad
from .norms import NORMS
from .pattern import DTYPES, Case, layouts, runs
from .refinement import SRMS

__all__ = [
    "CASES", "COUNTS", "DTYPES", "LOSSES", "NORMS", "SRMS", "Case", "LossCase", "assert_not_less_exact", "layouts",
    "make_case", "problem", "quarter", "record", "runs", "value_and_grad",
]  # fmt: skip

CASES = (*LOSSES, *NORMS, *SRMS, *COUNTS)
"""The cases of all ops."""
