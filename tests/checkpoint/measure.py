"""The battery on every shape of every family, its results as JSON, and the table of docs/huggingface.md.

python -m tests.checkpoint.measure        a few minutes; needs the extra hf-test
python -m tests.checkpoint.measure t5     some families alone; of the others what is written stays
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "huggingface.json"
PAGE = ROOT / "docs" / "huggingface.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"

MODELS = {
    "gpt2": "GPT-2",
    "llama": "Llama 2, 3, 3.1, 3.2",
    "mistral": "Mistral",
    "qwen2": "Qwen 2, 2.5",
    "qwen3": "Qwen 3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen 3 MoE",
    "bert": "BERT, MiniLM",
    "roberta": "RoBERTa",
    "t5": "T5, T5 v1.1",
}


def measure(families: Sequence[str]) -> list[dict[str, Any]]:
    """Every shape of these families, one after the other."""
    from tests.checkpoint.battery import Pair
    from tests.checkpoint.folders import tensors
    from tests.checkpoint.shapes import EVERY

    packages = ("transformers", "torch", "jax")
    software = ", ".join(f"{name} {version(name)}" for name in packages)
    software = f"{software} on one CPU core, {datetime.now(UTC).date()}"
    results = []
    for family, shape in (one for one in EVERY if one[0] in families):
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(family, shape, Path(folder), seed=1)
            found = {**pair.outputs(), **pair.stepped(), **pair.greedy()}
            found["bit_for_bit"] = tensors(pair.their_folder) == tensors(pair.folder / "export")
        results.append({"family": family, "shape": shape, **found, "software": software})
        print(json.dumps(results[-1]), flush=True)
    return results


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of the page: the worst of each family."""
    yield "| family | `model_type` | shapes | there and back | logits | loss | gradient | AdamW step | greedy text |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for family, models in MODELS.items():
        rows = [row for row in results if row["family"] == family]
        worst = [max(row[key] for row in rows) for key in ("logits", "loss", "gradient", "parameter")]
        bits = "bit for bit" if all(row["bit_for_bit"] for row in rows) else "**not the same**"
        same, prompts = (sum(row[key] for row in rows) for key in ("same_prompts", "prompts"))
        errors = " | ".join(f"{error:.1e}" for error in worst)
        yield f"| {models} | `{family}` | {len(rows)} | {bits} | {errors} | {same} of {prompts} |"
    yield ""
    yield f"Measured with {'; '.join(sorted({row['software'] for row in results}))}."


def render(page: str, results: Sequence[dict[str, Any]]) -> str:
    """`page` with the table of these results between its marks."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n".join(table(results)) + "\n" + END + after


def main(families: Sequence[str]) -> None:
    held = {(row["family"], row["shape"]): row for row in json.loads(RESULTS.read_text())}
    results = list((held | {(row["family"], row["shape"]): row for row in measure(families or [*MODELS])}).values())
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
