from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.commands import Cli, Result
from tests.processes import start_command
from tests.tiny_models import save_tiny, tiny_tokenizer
from tests.tiny_runs import write_config, write_text, write_workplace

from depthsearch import __version__
from depthsearch.journal import read_journal, without_times

COMMANDS = (
    "inspect", "search", "resume", "compare", "export", "evaluate", "report", "watch", "feed",
    "overfit", "calibrate-check", "front", "latency",
)  # fmt: skip
LONG = {"method": "evolution", "max_evaluations": 120, "finalists": 4}
LONG_SETTINGS: dict[str, Any] = {
    "search": LONG,
    "calibration": {"select_tokens": 512, "batch_tokens": 32},
}


def finish(running: subprocess.Popen[str]) -> Result:
    out, err = running.communicate(timeout=120)
    return Result(running.returncode, out, err)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama checkpoint, a text and run files."""
    folder = tmp_path_factory.mktemp("workplace")
    write_workplace(folder)
    packable = {"packable": True}
    write_config(folder / "packable.yaml", space=packable, search={"method": "windows"})
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of six blocks, and a search that takes some seconds."""
    folder = tmp_path_factory.mktemp("big")
    save_tiny(folder / "model", "llama", blocks=6)
    write_text(folder / "text.txt")
    write_config(folder / "run.yaml", **LONG_SETTINGS)
    return folder


@pytest.fixture(scope="module")
def undisturbed(big: Path) -> Path:
    """That search, run to its end in one go."""
    from depthsearch.config import load_config
    from depthsearch.run.search import search

    search(load_config(big / "run.yaml"), big / "undisturbed")
    return big / "undisturbed"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def journal_of(run: Path) -> str:
    return without_times(read_journal(run / "journal.jsonl"))


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, cli: Cli, command: str) -> None:
        found = cli(command, "--help")
        assert (found.code, found.err) == (0, "")
        assert "Usage" in found.out
        assert command in found.out

    def test_all_commands_are_listed(self, cli: Cli) -> None:
        for arguments in ([], ["--help"]):
            found = cli(*arguments)
            assert all(command in found.out + found.err for command in COMMANDS)

    def test_the_version(self, cli: Cli) -> None:
        found = cli("--version")
        assert (found.code, found.out, found.err) == (0, f"{__version__}\n", "")

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["serach"], "serach"),
            (["search"], "config"),
            (["search", "x.yaml"], "--out"),
            (["inspect", "x", "--nope"], "--nope"),
            (["calibrate-check", "x.yaml", "--out", "x", "--masks", "y"], "--masks"),
            (["export", "x", "y", "--point", "0"], "--point"),
        ],
    )
    def test_wrong_usage_ends_with_two_and_one_line(
        self, cli: Cli, arguments: list[str], named: str
    ) -> None:
        found = cli(*arguments)
        assert found.code == 2
        assert named in found.message

    def test_ctrl_c_in_a_command_ends_with_130(
        self, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("depthsearch.run.front.read_front", interrupt)
        found = cli("front", tmp_path)
        assert found.code == 130
        assert found.message.startswith("interrupted; ")


def truncated(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])


def empty_text(folder: Path) -> None:
    (folder / "text.txt").write_text("\n\n \n")


def no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


def no_config(folder: Path) -> None:
    (folder / "run.yaml").unlink()


def not_yaml(folder: Path) -> None:
    (folder / "run.yaml").write_text("model: {path: [\n")


def pegasus(folder: Path) -> None:
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    config = PegasusConfig(
        vocab_size=300, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    replaced(folder, PegasusForConditionalGeneration(config))


def t5(folder: Path) -> None:
    save_tiny(folder / "model", "t5")


def bert(folder: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, is_decoder=True,
    )  # fmt: skip
    replaced(folder, BertLMHeadModel(config))


def replaced(folder: Path, model: Any) -> None:
    shutil.rmtree(folder / "model")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")


def nothing(_folder: Path) -> None:
    pass


BAD_SEARCHES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "missing config": (no_config, [], "run.yaml: no such file"),
    "broken config": (not_yaml, [], "not valid YAML"),
    "missing model": (nothing, ["model.path=./missing"], "./missing': no such file or directory"),
    "missing text": (nothing, ["calibration.text=missing.txt"], "missing.txt': no such file"),
    "empty text": (empty_text, [], "holds no text"),
    "too little text": (nothing, ["calibration.select_tokens=1e6"], "lower select_tokens"),
    "unknown key": (nothing, ["serach.seed=3"], "unknown key 'serach'; did you mean 'search'"),
    "unknown nested key": (nothing, ["search.sead=3"], "did you mean 'seed'"),
    "wrong override": (nothing, ["search.seed"], "expected key=value"),
    "wrong value": (nothing, ["search.seed=-1"], "search.seed is -1"),
    "wrong method": (nothing, ["search.method=evolutoin"], "did you mean 'evolution'"),
    "wrong option": (nothing, ["search.options={parants: 3}"], "did you mean 'parents'"),
    "endless option value": (
        nothing,
        ["search={method: mcts, max_evaluations: 9, options: {exploration: .inf}}"],
        "takes a number: got inf",
    ),
    "wrong option value": (nothing, ["search.options={parents: 0}"], "at least 1: got 0"),
    "budget out of reach": (
        nothing,
        ["space.budget={keep_params: 0.1}"],
        "the cheapest mask of this space costs 38,464",
    ),
    "cost limit out of reach": (nothing, ["search.cost_tokens=10"], "give at least"),
    "unknown site": (nothing, ["space.protect=[decoder.9.ffn]"], "no site 'decoder.9.ffn'"),
    "truncated weights": (truncated, [], "damaged or cut short"),
    "missing weights": (no_weights, [], "no model.safetensors"),
    "encoder-decoder": (
        pegasus,
        [],
        "PegasusForConditionalGeneration is an encoder-decoder of the model type 'pegasus'",
    ),
    "encoder-decoder without targets": (t5, [], "calibration.column and calibration.target_column"),
    "unsupported architecture": (bert, [], "BertLMHeadModel (model type 'bert') is not supported"),
    "wrong device": (nothing, ["model.device=cuda:99"], "CUDA devices are visible"),
    "unwritable place": (nothing, [], "cannot create"),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_SEARCHES)
    def test_a_search_says_in_one_line_what_is_wrong_and_leaves_nothing(
        self, cli: Cli, workplace: Path, tmp_path: Path, case: str
    ) -> None:
        damage, overrides, message = BAD_SEARCHES[case]
        for name in ("run.yaml", "text.txt"):
            shutil.copy(workplace / name, tmp_path)
        shutil.copytree(workplace / "model", tmp_path / "model")
        damage(tmp_path)
        before = listing(tmp_path)
        out = tmp_path / ("text.txt/run" if case == "unwritable place" else "run")
        sets = [part for override in overrides for part in ("--set", override)]
        found = cli("search", tmp_path / "run.yaml", "--out", out, *sets)
        assert found.code == 2
        assert message in found.message
        assert listing(tmp_path) == before

    def test_a_comparison_leaves_nothing_either(
        self, cli: Cli, workplace: Path, tmp_path: Path
    ) -> None:
        arms = "compare={arms: {a: {method: greedy}, b: {method: windows}}}"
        wrong = [
            ([], "has no 'compare' part"),
            ([arms, "model.path=./missing"], "no such file"),
            ([arms, "calibration.text=missing.txt"], "no such file"),
            ([arms, "space.budget={keep_params: 0.1}"], "cheapest mask"),
            (["compare={arms: {a: {method: greedi}}}"], "did you mean 'greedy'"),
            (["compare={arms: {a: {method: greedy}}, cost_tokens: b}"], "the name of an arm: a"),
        ]
        for overrides, message in wrong:
            sets = [part for override in overrides for part in ("--set", override)]
            found = cli("compare", workplace / "run.yaml", "--out", tmp_path / "out", *sets)
            assert found.code == 2
            assert message in found.message
            assert listing(tmp_path) == []

    def test_other_commands(self, cli: Cli, workplace: Path, tmp_path: Path) -> None:
        model, text = workplace / "model", workplace / "text.txt"
        (tmp_path / "empty.txt").write_text("")
        before = listing(tmp_path)
        wrong: list[tuple[list[object], str]] = [
            (["inspect", tmp_path / "missing"], "no such file"),
            (["inspect", tmp_path], "has no config.json"),
            (["inspect", text], "is a file"),
            (["inspect", model, "--dtype", "float8"], "dtype is 'float8'"),
            (["inspect", model, "--device", "tpu"], "device"),
            (["inspect", model, "--context-tokens", "0"], "context_tokens"),
            (["resume", tmp_path], "is not a run directory"),
            (["resume", tmp_path / "missing"], "is not a run directory"),
            (["export", tmp_path, tmp_path / "small"], "is not a run directory"),
            (["report", tmp_path], "is not a run directory"),
            (["report", tmp_path / "missing"], "is not a run directory"),
            (["report", tmp_path / ("x" * 300)], "File name too long"),
            (["resume", tmp_path / ("x" * 300)], "File name too long"),
            (["watch", tmp_path / ("x" * 300), "--once"], "File name too long"),
            (["evaluate", model, "--text", tmp_path / "missing.txt"], "no such file"),
            (["evaluate", model, "--text", tmp_path / "empty.txt"], "holds no text"),
            (["evaluate", model, "--text", text, "--column", "body"], "'body'"),
            (["evaluate", tmp_path / "missing", "--text", text], "no such file"),
        ]
        for arguments, message in wrong:
            found = cli(*arguments)
            assert found.code == 2, arguments
            assert message in found.message
        assert listing(tmp_path) == before

    def test_names_in_square_brackets_are_printed_as_they_are(
        self, cli: Cli, workplace: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "own[v2][b]:smile:.jsonl"
        found = cli("generate", workplace / "model", out, "--tokens", 20, "--window-tokens", 10)
        assert found.code == 0
        assert str(out) in found.out

    def test_one_line_from_a_real_start_command(self, workplace: Path, tmp_path: Path) -> None:
        arguments = ("--out", tmp_path / "run", "--set", "model.path=./missing")
        found = finish(start_command("search", "run.yaml", *arguments, cwd=workplace))
        assert found.code == 2
        assert "no such file or directory" in found.message
        assert listing(tmp_path) == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of `TestWholeWay` leave what the next ones need."""
    return tmp_path_factory.mktemp("way")


class TestWholeWay:
    """One packable run from its configuration to figures, and what stands in its way."""

    def test_search(self, cli: Cli, workplace: Path, place: Path) -> None:
        found = cli(
            "search", workplace / "packable.yaml", "--out", place / "run",
            "--set", "search.seed=3", "--set", "search.racing=false",
        )  # fmt: skip
        assert found.code == 0
        assert "Best mask" in found.out
        assert "Traceback" not in found.err
        assert listing(place / "run") == [
            "best.json",
            "config.yaml",
            "journal.jsonl",
            "report.html",
        ]
        best = json.loads((place / "run" / "best.json").read_text())
        assert (best["seed"], best["cost"] <= best["cap"]) == (3, True)
        assert f"cap {best['cap']:,}" in found.out

    def test_an_existing_run_is_not_touched(self, cli: Cli, workplace: Path, place: Path) -> None:
        before = {name: (place / "run" / name).read_bytes() for name in listing(place / "run")}
        found = cli("search", workplace / "packable.yaml", "--out", place / "run")
        assert found.code == 2
        assert "exists already and is never overwritten" in found.message
        assert f"depthsearch resume {place / 'run'}" in found.message
        after = {name: (place / "run" / name).read_bytes() for name in listing(place / "run")}
        assert after == before

    def test_resuming_a_finished_run_shows_it_again(self, cli: Cli, place: Path) -> None:
        before = journal_of(place / "run")
        best = (place / "run" / "best.json").read_bytes()
        found = cli("resume", place / "run")
        assert found.code == 0
        assert "Best mask" in found.out
        assert "Traceback" not in found.err
        assert journal_of(place / "run") == before
        assert (place / "run" / "best.json").read_bytes() == best

    def test_export(self, cli: Cli, place: Path) -> None:
        found = cli("export", place / "run", place / "small", "--no-measure", "--json")
        assert found.code == 0
        summary = json.loads(found.out)
        assert summary["path"] == str(place / "small")
        assert summary["verification"]
        assert (place / "small" / "model.safetensors").is_file()

    def test_export_to_what_exists(self, cli: Cli, place: Path) -> None:
        before = listing(place)
        for target in (place / "small", place / "run"):
            found = cli("export", place / "run", target, "--no-measure")
            assert found.code == 2
            assert "exists" in found.message
        assert listing(place) == before

    def test_export_of_an_unfinished_run(self, cli: Cli, place: Path, tmp_path: Path) -> None:
        shutil.copytree(place / "run", tmp_path / "run")
        (tmp_path / "run" / "best.json").unlink()
        found = cli("export", tmp_path / "run", tmp_path / "small")
        assert found.code == 2
        assert "has not finished; continue it with `depthsearch resume" in found.message
        assert not (tmp_path / "small").exists()

    def test_evaluate_prints_one_document(self, cli: Cli, workplace: Path, place: Path) -> None:
        found = cli(
            "evaluate", place / "small", "--beside", workplace / "model",
            "--text", workplace / "text.txt", "--tokens", 256, "--window-tokens", 16,
            "--dtype", "float32", "--repeats", 1, "--json",
        )  # fmt: skip
        assert found.code == 0
        dense, small = json.loads(found.out)["rows"]
        assert (dense["name"], small["name"]) == ("dense", "model")
        assert small["parameters"] < dense["parameters"]
        assert small["peak_memory_bytes"] > 0
        assert small["perplexity"] > 1

    def test_report(self, cli: Cli, place: Path) -> None:
        (place / "run" / "report.html").unlink()
        found = cli("report", place / "run")
        assert (found.code, found.err) == (0, "")
        assert found.out.strip() == str(place / "run" / "report.html")
        assert "<html" in (place / "run" / "report.html").read_text()


class TestJson:
    def test_inspect_from_a_real_start_command(self, workplace: Path) -> None:
        found = finish(start_command("inspect", "model", "--json", cwd=workplace))
        assert (found.code, found.err) == (0, "")
        document = json.loads(found.out)
        assert document["model_class"] == "LlamaForCausalLM"
        assert len(document["sites"]) == 8

    def test_inspect_for_people(self, cli: Cli, workplace: Path) -> None:
        found = cli("inspect", workplace / "model")
        assert found.code == 0
        assert "decoder.0.attention" in found.out + found.err
        assert "Self-check passed" in found.out + found.err

    def test_compare(self, cli: Cli, workplace: Path, tmp_path: Path) -> None:
        arms = "compare={arms: {w: {method: windows}, b: {method: block_influence}}, seeds: [0]}"
        arguments = (workplace / "run.yaml", "--out", tmp_path / "out", "--set", arms)
        found = cli("compare", *arguments, "--json")
        assert found.code == 0
        document = json.loads(found.out)
        assert [row["arm"] for row in document["summary"]] == ["w", "b"]
        assert document == json.loads((tmp_path / "out" / "compare.json").read_text())
        assert (tmp_path / "out" / "report.html").is_file()
        again = cli("compare", *arguments)
        assert again.code == 2
        assert "finished comparison" in again.message
        (tmp_path / "out" / "report.html").unlink()
        assert cli("report", tmp_path / "out").code == 0
        assert (tmp_path / "out" / "report.html").is_file()

    def test_compare_at_several_budgets(self, cli: Cli, workplace: Path, tmp_path: Path) -> None:
        arms = "{w: {method: windows}, g: {method: greedy, max_evaluations: 9}}"
        budgets = "[{keep_params: 0.7, of: blocks}, {drop_sites: 1}]"
        settings = f"compare={{arms: {arms}, seeds: [0, 1], budgets: {budgets}}}"
        out = tmp_path / "out"
        found = cli("compare", workplace / "run.yaml", "--out", out, "--set", settings)
        assert found.code == 0
        assert "g failed with seed 1, params at most 70 % of the dense model's blocks" in found.out
        assert "Held-out figures, 1 sites dropped" in found.out
        assert "Ranks, and held-out loss minus search loss (gap)" in found.out
        document = json.loads((out / "compare.json").read_text())
        assert [part["budget"] for part in document["budgets"]] == [
            "keep_params-0.7-of-blocks", "drop_sites-1",
        ]  # fmt: skip
        assert document["verdict"] in found.out.replace("\n", " ")
        assert "<h3>Held-out quality</h3>" in (out / "report.html").read_text()
        bad = settings.replace("drop_sites: 1", "keep_params: 0.01")
        refused = cli(
            "compare", workplace / "run.yaml", "--out", tmp_path / "no", "--set", bad, "--json"
        )
        assert (refused.code, refused.out) == (2, "")
        assert "the budget cannot be met" in refused.message
        assert not (tmp_path / "no").exists()


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[], None]]:
    """`place` on a disk of 28 kB; what it yields makes room.

    A real one where this process may mount it, else a limit on the size of files.
    """
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True)
    if mounted and mounted.returncode == 0:
        try:
            yield lambda: subprocess.run(
                ["mount", "-o", "remount,size=10m", str(place)], check=True
            ) and None  # fmt: skip
        finally:
            subprocess.run(["umount", str(place)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_a_search_that_can_go_on(
    cli: Cli, big: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk") as make_room:
        run = tmp_path / "disk" / "run"
        found = cli("search", big / "run.yaml", "--out", run)
        assert found.code == 2
        assert "cannot write" in found.message
        assert f"depthsearch resume {run}" in found.message
        written = (run / "journal.jsonl").read_bytes()
        assert written.endswith(b"\n")
        assert len(read_journal(run / "journal.jsonl")) > 1
        assert len(written) < (undisturbed / "journal.jsonl").stat().st_size
        again = cli("resume", run)
        assert again.code == 2
        assert "cannot write" in again.message
        assert (run / "journal.jsonl").read_bytes() == written
        make_room()
        assert cli("resume", run).code == 0
        assert journal_of(run) == journal_of(undisturbed)
        assert (run / "best.json").read_bytes() == (undisturbed / "best.json").read_bytes()


def wait_for_journal(running: subprocess.Popen[str], run: Path, size: int) -> bool:
    """Until the journal holds `size` bytes, or the process has ended on its own (False)."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journal = run / "journal.jsonl"
        if journal.exists() and journal.stat().st_size >= size:
            return True
        if running.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("the journal did not grow")


def test_ctrl_c_ends_with_130_and_the_search_can_go_on(
    cli: Cli, big: Path, undisturbed: Path
) -> None:
    run = big / "interrupted"
    size = (undisturbed / "journal.jsonl").stat().st_size
    running = start_command("search", "run.yaml", "--out", run, cwd=big)
    assert wait_for_journal(running, run, size // 3)
    running.send_signal(signal.SIGINT)
    found = finish(running)
    assert found.code == 130
    assert found.out == ""
    assert "Traceback" not in found.err
    last = found.err.splitlines()[-1]
    assert last.startswith("depthsearch: interrupted; ")
    assert "depthsearch resume RUN" in last
    assert not (run / "best.json").exists()
    assert len(read_journal(run / "journal.jsonl")) < len(
        read_journal(undisturbed / "journal.jsonl")
    )
    assert cli("resume", run).code == 0
    assert journal_of(run) == journal_of(undisturbed)
    assert (run / "best.json").read_bytes() == (undisturbed / "best.json").read_bytes()


def test_killed_at_random_moments_the_result_is_the_same(
    cli: Cli, big: Path, undisturbed: Path
) -> None:
    rng = random.Random(20)
    run = big / "killed"
    size = (undisturbed / "journal.jsonl").stat().st_size
    killed = 0
    sizes = []
    for target in sorted(rng.uniform(0.1, 0.9) for _ in range(3)):
        command = ("resume", run) if run.exists() else ("search", "run.yaml", "--out", run)
        running = start_command(*command, cwd=big)
        if wait_for_journal(running, run, int(target * size)):
            time.sleep(rng.uniform(0, 0.03))
        running.kill()
        found = finish(running)
        assert found.code in (-signal.SIGKILL, 0), found.err
        killed += found.code != 0
        sizes.append((run / "journal.jsonl").stat().st_size)
    assert killed >= 2
    assert sizes == sorted(sizes)
    assert cli("resume", run).code == 0
    assert journal_of(run) == journal_of(undisturbed)
    assert (run / "best.json").read_bytes() == (undisturbed / "best.json").read_bytes()


def test_two_processes_do_not_write_one_run(cli: Cli, big: Path, undisturbed: Path) -> None:
    from depthsearch.journal import Journal

    before = (undisturbed / "journal.jsonl").read_bytes()
    with Journal(undisturbed / "journal.jsonl"):
        found = cli("resume", undisturbed)
    assert found.code == 2
    assert "in use by another process" in found.message
    assert (undisturbed / "journal.jsonl").read_bytes() == before
