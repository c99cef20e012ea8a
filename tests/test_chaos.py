"""The soak of benchmarks/chaos.py: what the page says of the last one, and a short one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "chaos.json").read_text())


def test_nothing_was_lost() -> None:
    assert (RESULTS["differences"], RESULTS["wrong"], RESULTS["left_over"]) == ([], [], [])
    assert RESULTS["logged_steps_compared"] == RESULTS["steps"]
    assert all(row["lost_steps"] <= RESULTS["save_every_steps"] for row in RESULTS["rows"] if not row["missed_saves"])
    assert all(fault["times"] for fault in RESULTS["faults"].values())


def test_the_page_says_what_was_measured() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for kind, fault in RESULTS["faults"].items():
        lost, seconds = RESULTS["lost_steps"].get(kind), RESULTS["seconds_until_steps_again"].get(kind)
        lost = f"{lost['most']} ({lost['mean']:g})" if lost else ""
        assert f"| {fault['what']} | {fault['times']} | {lost} | {seconds or ''} |" in page
    for number, words in {
        "minutes": "{} minutes with",
        "steps": "{} steps,",
        "save_every_steps": "a save every {} ",
        "starts_of_processes": "{} starts",
    }.items():
        assert words.format(f"{RESULTS[number]:,g}") in page, number
    assert f"{RESULTS['goodput']:.0%}" in page
    for who in ("supervisor, disturbed", "supervisor, undisturbed"):
        growth = RESULTS["growth"][who]
        assert f"{growth['rss_megabytes_an_hour']:g} MB" in page and f"{growth['open_files_an_hour']:g} files" in page
    rank, long = RESULTS["growth"]["rank, undisturbed"], RESULTS["endurance"]
    assert f"{rank['rss_megabytes_an_hour']:.0f} MB and {rank['open_files_an_hour']:.1f} files" in page
    assert f"{long['steps']:,}" in page and f"{long['saves']} saves" in page
    a_save = rank["rss_megabytes_an_hour"] * long["minutes"] / 60 / long["saves"]
    assert f"{a_save:.2f} MB a save" in page
    assert f"({RESULTS['most_lost_steps_where_each_save_counted']} at the most)" in page


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    options = ["--faults=3", "--pause=4", "--every=10", "--seed=3", "--endurance=0", f"--out={tmp_path / 'chaos.json'}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/chaos.py", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert len(found["rows"]) >= 3 and (found["differences"], found["wrong"], found["left_over"]) == ([], [], [])
    assert found["logged_steps_compared"] == found["steps"] > 0
