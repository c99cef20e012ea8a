"""Two processes of jax.distributed write one text: as training does for its sample at the end."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.generate.decode import generate
from tests.generate.tiny import GPT, make

RULE = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 3}
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
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(port), json.dumps(RULE)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    alone = generate(*make(GPT), [[5, 6], [7]], **RULE)
    for rank, (out, error) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, error
        (line,) = [line for line in out.splitlines() if line.startswith("new ")]
        assert json.loads(line[4:]) == alone
