"""The battery on every shape of every family, its results as JSON, and the table of docs/huggingface.md.

python -m tests.checkpoint.measure        a few minutes; needs the extra hf-test
"""

import json
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


def measure() -> list[dict[str, Any]]:
    """Every shape, one after the other."""
    from tests.checkpoint.battery import Pair
    from tests.checkpoint.folders import tensors
    from tests.checkpoint.shapes import EVERY

    results = []
    for family, shape in EVERY:
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(family, shape, Path(folder), seed=1)
            found = {**pair.outputs(), **pair.stepped(), **pair.greedy()}
            found["bit_for_bit"] = tensors(pair.their_folder) == tensors(pair.folder / "export")
        results.append({"family": family, "shape": shape, **found})
        print(json.dumps(results[-1]), flush=True)
    return results


def table(results: Sequence[dict[str, Any]], software: str) -> Iterator[str]:
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
    yield f"Measured with {software}."


def render(page: str, measured: dict[str, Any]) -> str:
    """`page` with the table of these results between its marks."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n".join(table(measured["results"], measured["software"])) + "\n" + END + after


def main() -> None:
    packages = ("transformers", "torch", "jax")
    date = datetime.now(UTC).date()
    software = f"{', '.join(f'{name} {version(name)}' for name in packages)} on one CPU core, {date}"
    measured = {"software": software, "results": measure()}
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), measured), encoding="utf-8")


if __name__ == "__main__":
    main()
