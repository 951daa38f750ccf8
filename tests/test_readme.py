"""Every command of the README runs, in its order, on the real model with less text and cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DEPTHSEARCH_DATA", ROOT / ".data"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

SMALL = {
    "calibration.window_tokens": 64,
    "calibration.select_tokens": 128,
    "calibration.finals_tokens": 128,
    "calibration.heldout_tokens": 256,
    "calibration.batch_tokens": 128,
    "search.finalists": 2,
}
COST_TOKENS = 3000.0


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for kind, body in BLOCK.findall(text) if kind == language]


def commands() -> list[str]:
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands refer to, with the README's run file made small."""
    if not (DATA / "smollm2-135m").is_dir():
        pytest.skip("the real model is not fetched: run scripts/fetch")
    place = tmp_path_factory.mktemp("readme")
    (place / ".data").symlink_to(DATA, target_is_directory=True)
    (place / "search_spaces").symlink_to(ROOT / "search_spaces", target_is_directory=True)
    config = yaml.safe_load(blocks("yaml")[0])
    for key, value in SMALL.items():
        part, name = key.split(".")
        config.setdefault(part, {})[name] = value
    config["search"]["cost_tokens"] = COST_TOKENS
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    return place


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # As a person would: with this environment's commands, and with all threads.
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return done


def test_the_readme_names_both_scripts() -> None:
    assert {"scripts/quickstart", "scripts/test"} <= set(commands())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_depthsearch_commands_run_in_order(folder: Path) -> None:
    wanted = [command for command in commands() if command.startswith("depthsearch ")]
    assert {command.split()[1] for command in wanted} >= {
        "inspect", "search", "watch", "feed", "resume", "export", "evaluate", "compare", "report",
    }  # fmt: skip
    for command in wanted:
        words = command.split()
        if words[1] == "compare":
            words[2] = str(shrunk(ROOT / "scripts" / "quickstart.yaml", folder))
        done = run(words, folder)
        if "--json" in words:
            json.loads(done.stdout)
    assert (folder / "runs" / "first" / "report.html").is_file()
    assert (folder / "runs" / "first" / "best.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_python_example_runs(folder: Path) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    assert run([sys.executable, "-c", example], folder).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_does_the_main_job(folder: Path) -> None:
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    # Two cheap arms in the place of greedy's hundreds of masks.
    arms = "{windows: {method: windows, finalists: 1}, surrogate: {method: surrogate}}"
    settings += ["--set", f"compare.arms={arms}", "--set", f"compare.cost_tokens={COST_TOKENS}"]
    out = folder / "quick"
    done = run([str(ROOT / "scripts" / "quickstart"), str(out), *settings], folder)
    assert f"Report:  {out}/report.html" in done.stdout
    assert "LlamaForCausalLM" in done.stdout
    result = json.loads((out / "compare.json").read_text())
    assert {arm["name"] for arm in result["arms"]} == {"windows", "surrogate"}
    rows = json.loads((out / "arms" / "surrogate-seed0" / "export.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "pruned"]
    assert rows[1]["parameters"] < rows[0]["parameters"]
    assert (
        "<svg" in (out / "report.html").read_text()
        or "data:image" in (out / "report.html").read_text()
    )
    shutil.rmtree(out)


def shrunk(source: Path, folder: Path) -> Path:
    """The quickstart's run file with less text and two cheap arms, in one process."""
    config = yaml.safe_load(source.read_text())
    config.pop("cluster")
    config["calibration"] |= {
        key.split(".")[1]: value for key, value in SMALL.items() if key.startswith("calibration")
    }
    config["compare"] = {
        "seeds": [0],
        "cost_tokens": COST_TOKENS,
        "arms": {"windows": {"method": "windows"}, "surrogate": {"method": "surrogate"}},
    }
    for part, key in (("model", "path"), ("calibration", "text")):
        config[part][key] = config[part][key].removeprefix("../")
    target = folder / "compare.yaml"
    target.write_text(yaml.safe_dump(config))
    return target
