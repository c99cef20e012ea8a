"""Two processes of jax.distributed write one text: as training does for its sample at the end."""

import json

import pytest

from jaxlm.generate.decode import generate
from tests.generate.tiny import GPT, make
from tests.processes import two_ranks

RULES = [
    {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 3},
    {"max_new_tokens": 12, "beams": 3, "stop_ids": [8]},
]
RANK = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
from jaxlm.generate.decode import generate
from tests.generate.tiny import GPT, make
print("new", json.dumps(generate(*make(GPT, "dp2,tp2"), [[5, 6], [7]], **json.loads(sys.argv[3]))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=["drawn", "searched"])
def test_two_processes(rule):
    alone = generate(*make(GPT), [[5, 6], [7]], **rule)
    for out in two_ranks(RANK, json.dumps(rule)):
        (line,) = [line for line in out.splitlines() if line.startswith("new ")]
        assert json.loads(line[4:]) == alone
