"""`python -m tests.train.worker`: reads names of rows, answers each with its errors; `matrix` starts and watches it."""

import json
import sys

import jax  # noqa: I001

import tests.conftest  # noqa: F401  first: 8 simulated devices, strict arrays, checked shapes, as in the test suite
from jaxlm.config.errors import CommandError
from tests.train.rows import ROWS

RESULT = "result "
"""Begins the line of an answer; whatever else is printed is XLA's."""

FAILURES = (CommandError, ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def main() -> None:
    rows = {str(row): row for row in ROWS}
    for line in sys.stdin:
        try:
            answer = rows[line.strip()].errors()._asdict()
        except FAILURES as error:
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(RESULT + json.dumps(answer), flush=True)
        jax.clear_caches()  # hundreds of programs of eight devices would fill the memory


if __name__ == "__main__":
    main()
