from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from depthsearch.config import RunConfig, config_from_mapping, load_config, resolved_yaml, to_yaml
from depthsearch.errors import ConfigError

MINIMAL = """
model: {path: some/model}
space:
  budget: {keep_params: 0.75, of: blocks}
calibration: {text: notes}
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults(write: Write) -> None:
    config = load_config(write(MINIMAL))
    assert config.model.dtype == "auto"
    assert config.space.granularity == "sublayer"
    assert config.space.budget.to_budget_json() == {
        "metric": "params",
        "ratio": 0.75,
        "cap": None,
        "drop": None,
        "of": "blocks",
    }
    assert config.calibration.select_tokens == 8192
    assert config.objective.kind == "kl"
    assert config.search.method == "surrogate"
    assert config.compare is None


def test_resolved_yaml_reads_back_to_an_equal_configuration(write: Write, tmp_path: Path) -> None:
    text = MINIMAL + (
        "search: {cost_tokens: 1e6, options: {parents: 4, rate: 1e-5}}\n"
        "compare: {arms: {a: {}, greedy: {method: greedy}}, seeds: [3, 4], cost_tokens: greedy}\n"
    )
    config = load_config(write(text), ["space.protect=[first, 3, decoder.12.attention]"])
    again = tmp_path / "elsewhere.yaml"
    again.write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(again) == config
    assert config_from_mapping(config.to_json()) == config


@pytest.mark.parametrize("text", ["12e45678", "1e3", "-2.e+5", "1.5e3", "7", "null", "0x1f", "="])
def test_texts_that_look_like_something_else_stay_texts(write: Write, text: str) -> None:
    data: dict[str, Any] = yaml.safe_load(MINIMAL)
    data["model"]["revision"] = text
    data["search"] = {"method": "optuna", "options": {"study_name": text, text: 1.0}}
    config = config_from_mapping(data)
    assert config.model.revision == text
    assert load_config(write(resolved_yaml(config))) == config
    assert load_config(write(to_yaml(data))) == config


def test_frozen(write: Write) -> None:
    config = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.search.seed = 4  # type: ignore[misc]


def test_numbers_with_an_exponent_need_no_dot(write: Write) -> None:
    config = load_config(write(MINIMAL + "search: {cost_tokens: 2e5, max_evaluations: 1e3}"))
    assert config.search.cost_tokens == 200_000.0
    assert config.search.max_evaluations == 1000
    assert isinstance(config.search.max_evaluations, int)


def test_overrides_are_yaml_and_apply_in_order(write: Write) -> None:
    config = load_config(
        write(MINIMAL),
        [
            "search.seed=3",
            "search.seed=5",
            "search.options.population=16",
            "objective.kind=cross_entropy",
            "space.budget={drop_sites: 4}",
        ],
    )
    assert config.search.seed == 5
    assert config.search.options == {"population": 16}
    assert config.objective.kind == "cross_entropy"
    assert config.space.budget.to_budget_json()["drop"] == 4


def test_mapping_handed_in_stays_as_it_was() -> None:
    mapping = yaml.safe_load(MINIMAL)
    config_from_mapping(mapping, overrides=["space.budget.keep_params=0.5"])
    assert mapping == yaml.safe_load(MINIMAL)


def test_space_from_a_file_beside_the_run_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / "mine.yaml").write_text("granularity: block\nbudget: {drop_blocks: 7}\n")
    path = write("model: {path: m}\nspace: spaces/mine.yaml\ncalibration: {text: t}\n")
    assert load_config(path).space.budget.drop_blocks == 7
    assert load_config(path, ["space.budget.drop_blocks=2"]).space.budget.drop_blocks == 2
    (tmp_path / "spaces" / "mine.yaml").write_text("granularity: blocks\nbudget: {drop_blocks: 7}")
    message = error_of(path)
    assert message.startswith(str(tmp_path / "spaces" / "mine.yaml"))
    assert "did you mean 'block'?" in message
    assert "space: no such file: spaces/other.yaml" in error_of(path, "space=spaces/other.yaml")


def test_what_exists_beside_the_run_file_becomes_absolute(write: Write, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    config = load_config(write(MINIMAL))
    assert config.calibration.text == str(tmp_path / "notes")
    assert config.model.path == "some/model"


def test_a_link_keeps_its_name(write: Write, tmp_path: Path) -> None:
    """A cache of the hub holds links to files that are named by their hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/5e3b").write_text("a text", encoding="utf-8")
    (tmp_path / "snapshot").symlink_to("blobs")
    (tmp_path / "snapshot/notes.txt").symlink_to("5e3b")
    text = MINIMAL.replace("notes", "snapshot/notes.txt").replace("some/model", "blobs/..")
    config = load_config(write(text))
    assert config.calibration.text == str(tmp_path / "blobs/notes.txt")
    assert config.model.path == str(tmp_path)


@pytest.mark.parametrize(
    ("url", "placed"),
    [
        ("sqlite:///study.db", "sqlite:///{}/study.db"),
        ("sqlite+pysqlite:///a/study.db?timeout=3", "sqlite+pysqlite:///{}/a/study.db?timeout=3"),
        ("journal:study.log", "journal:{}/study.log"),
        *((url, url) for url in ("sqlite:////a/b.db", "sqlite:///:memory:", "sqlite://")),
        *((url, url) for url in ("sqlite:///file:x?uri=true", "journal:/a/b", "mysql://h/db")),
    ],
)
def test_files_of_optuna_are_those_of_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, placed: str
) -> None:
    """Wherever a run is resumed, it goes on with the study that it began."""
    monkeypatch.chdir(tmp_path)
    search = {"method": "optuna", "options": {"storage": url}}
    data = yaml.safe_load(MINIMAL) | {"search": search, "compare": {"arms": {"a": search}}}
    config = load_config(write(to_yaml(data)))
    monkeypatch.chdir("/")
    assert config.compare is not None
    for found in (config, config_from_mapping(config.to_json())):
        assert found.compare is not None
        for settings in (found.search, found.compare.arms["a"]):
            assert settings.options["storage"] == placed.format(tmp_path)


def test_paths_are_looked_for_in_the_working_directory_too(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert load_config(write(MINIMAL)).model.path == str(here / "some" / "model")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("serch.seed=1", ["unknown key 'serch'", "did you mean 'search'?", "calibration"]),
        ("search.sede=1", ["unknown key 'search.sede'", "did you mean 'seed'?", "max_evaluations"]),
        ("model.path=", ["model.path", "None", "string"]),
        ("model.dtype=float61", ["model.dtype is 'float61'", "did you mean 'float16'?"]),
        ("model.device=gpu", ["model.device is 'gpu'", "cuda:1"]),
        ("model.trust_remote_code=1", ["model.trust_remote_code is 1", "true or false"]),
        ("model=gpt2", ["model is 'gpt2'", "mapping with the keys path, dtype"]),
        ("space.packable='yes'", ["space.packable is 'yes'"]),
        ("space.protect=[first, -1]", ["space.protect", "-1", "decoder.12.attention"]),
        ("space.protect=[true]", ["space.protect", "True"]),
        ("space.protect=first", ["space.protect is 'first'", "must be a list"]),
        ("space.budget.keep_params=1.5", ["space.budget.keep_params is 1.5", "(0, 1]", "'100M'"]),
        ("space.budget.keep_params=true", ["space.budget.keep_params is True"]),
        ("space.budget.keep_params=100MB", ["'100MB'", "K, M or B"]),
        ("space.budget.drop_sites=4", ["exactly one of", "space.budget={drop_sites: 4}"]),
        ("space.budget={}", ["exactly one of"]),
        ("space.budget={drop_blocks: 0}", ["space.budget.drop_blocks is 0", "greater than"]),
        ("space.budget={keep_energy: 1}", ["unknown key 'space.budget.keep_energy'"]),
        ("calibration.select_tokens=100", ["select_tokens is 100", "window_tokens = 256"]),
        ("calibration.heldout_fraction=1", ["calibration.heldout_fraction is 1", "less than 1"]),
        ("objective.positions=0", ["objective.positions is 0", "greater than 0"]),
        ("search.cost_tokens=.inf", ["search.cost_tokens is inf", "finite"]),
        ("search.seed=1.5", ["search.seed is 1.5", "a whole number"]),
        ("search.seed.deep=1", ["search.seed", "no mapping"]),
        ("compare.arms={}", ["compare.arms", "at least 1"]),
        ("compare.arms.a.method.x=1", ["compare.arms.a.method is {'x': 1}"]),
        ("compare={arms: {a: {metod: x}}}", ["compare.arms.a.metod", "did you mean 'method'?"]),
        ("compare={arms: {dense model: {}}}", ["dense model", "tables call the model itself"]),
        ("compare={arms: {a: {}}, seeds: [1, 1]}", ["compare.seeds", "each seed may appear once"]),
        ("compare={arms: {a: {}}, cost_tokens: b}", ["compare.cost_tokens is 'b'", "arm: a"]),
        ("compare={arms: {w/o sweep: {}}}", ["a name in compare.arms is 'w/o sweep'", "_ . + -"]),
        ("compare={arms: {../x: {}}}", ["a name in compare.arms is '../x'", "letter or digit"]),
        ("compare={arms: {1: {}}}", ["a name in compare.arms is 1; must be a string"]),
        ("compare={arms: {a: {seed: 7}}}", ["compare.arms.a.seed is 7", "compare.seeds"]),
        ("calibration.column=2024-13-45", ["not valid YAML: month", "in quotes"]),
        ("calibration.column=!!int x", ["not valid YAML: invalid literal", "in quotes"]),
        ("search", ["--set search", "key=value"]),
        ("search.=3", ["key=value"]),
        ("search.seed=[", ["--set search.seed=[", "not valid YAML"]),
        pytest.param(f"search.seed={'[' * 3000}", ["nested too deeply"], id="nested"),
        pytest.param(
            f"compare={{arms: {{a: {{}}}}, cost_tokens: {'9' * 400}}}",
            ["compare.cost_tokens", "that a float can hold"],
            id="a cost beyond floats",
        ),
        ("cluster.num_cpus=0.00001", ["cluster.num_cpus is 1e-05", "0.0001"]),
        (
            "cluster.num_gpus=0.00001",
            ["cluster.num_gpus is 1e-05", "must be 0, or at least 0.0001"],
        ),
        ("cluster.resources={x: -1}", ["cluster.resources.x is -1", "0.0001"]),
        ("cluster.resources={CPU: 2}", ["cluster.resources", "set cluster.num_cpus instead"]),
        ("cluster.threads=100000", ["cluster.threads is 100000", "less than or equal to 4096"]),
    ],
)
def test_one_line_names_key_value_and_what_is_allowed(
    write: Write, override: str, expected: list[str]
) -> None:
    path = write(MINIMAL + "search: {seed: 0}\n")
    message = error_of(path, override)
    for part in expected:
        assert part in message, message


def test_the_origin_of_the_wrong_value_is_named(write: Write) -> None:
    path = write(MINIMAL + "search: {seed: -1}\n")
    assert error_of(path).startswith(f"{path}: search.seed is -1")
    path = write(MINIMAL)
    assert error_of(path, "search.seed=-1").startswith("--set search.seed=-1: search.seed is -1")
    assert error_of(path, "serch.seed=1").startswith("--set serch.seed=1: unknown key 'serch'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds None; expected a mapping"),
        ("- a\n- b\n", "expected a mapping"),
        ("model: {path: [\n", "line 2"),
        ("model: {path: a}\nmodel: {path: b}\n", "line 2, column 1: not valid YAML: key 'model'"),
        ("{1: 2}\n", "unknown key"),
        ("model: {path: m}\ncalibration: {text: t}\n", "'space' is missing: the search space"),
        ("space: {budget: {drop_sites: 1}}\ncalibration: {text: t}\nmodel: {}", "'model.path' is"),
    ],
)
def test_files_that_are_no_run_file(write: Write, text: str, expected: str) -> None:
    path = write(text)
    message = error_of(path)
    assert message.startswith(str(path))
    assert expected in message


@pytest.mark.parametrize(
    ("budget", "of"),
    [
        ("{<<: *a}", "model"),
        ("{<<: *a, of: blocks}", "blocks"),
        ("{of: blocks, <<: *a}", "blocks"),
        ("{<<: [{of: blocks}, *a]}", "blocks"),
        ("{<<: {<<: *a, of: blocks}}", "blocks"),
    ],
)
def test_mappings_merge(write: Write, budget: str, of: str) -> None:
    text = "search: {method: front}\nfront: {budgets: [&a {keep_params: 0.9, of: model}]}\n"
    text += f"model: {{path: m}}\ncalibration: {{text: t}}\nspace: {{budget: {budget}}}\n"
    found = load_config(write(text)).space.budget
    assert (found.keep_params, found.of) == (0.9, of)


def test_what_merged_itself_merges(write: Write) -> None:
    options = "search: {options: &o {<<: {kind: none, project: p}, kind: wandb}}\n"
    config = load_config(write(MINIMAL + options + "tracking: {<<: *o, project: q}\n"))
    assert config.search.options == {"kind": "wandb", "project": "p"}
    assert (config.tracking.kind, config.tracking.project) == ("wandb", "q")


@pytest.mark.parametrize(
    "text",
    [
        "model: {<<: &m {path: a, path: b}}",
        "model: {<<: {path: a}, dtype: auto, dtype: auto}",
        "model: {<<: {path: a}, <<: {dtype: auto}}",
    ],
)
def test_a_key_given_twice_is_an_error_beside_and_within_what_is_merged(
    write: Write, text: str
) -> None:
    assert "is given twice" in error_of(write(text))


def test_options_that_are_no_mapping_are_one_line_beside_arms(write: Write) -> None:
    path = write(MINIMAL + "search: {options: [1]}\ncompare: {arms: {a: {}}}\n")
    assert "search.options is [1]; must be a" in error_of(path)


def test_what_cant_be_looked_at_is_left_as_it_is(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(MINIMAL)
    for name in ("/" + "n" * 300, "~nobody-of-that-name/x"):
        config = load_config(path, [f"calibration.text={name}", f"model.path={name}"])
        assert (config.calibration.text, config.model.path) == (name, name)
        assert f"no such file: {name}" in error_of(path, f"space={name}")

    def locked(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", locked)
    assert load_config(path).calibration.text == "notes"


def test_files_that_cant_be_read(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such file"
    assert "can't be read" in error_of(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(tmp_path / "binary")


def test_arms_take_what_they_leave_out_from_search(write: Write) -> None:
    text = MINIMAL + (
        "search: {method: evolution, finalists: 4, options: {parents: 3, offspring: 16}}\n"
        "compare:\n"
        "  arms: {same: {options: {parents: 5}}, greedy: {method: greedy, racing: false}}\n"
        "  cost_tokens: 1e6\n"
    )
    compare = load_config(write(text)).compare
    assert compare is not None
    assert compare.arms["same"].options == {"parents": 5, "offspring": 16}
    assert compare.arms["greedy"].options == {}
    assert compare.arms["greedy"].finalists == 4
    assert not compare.arms["greedy"].racing
    assert compare.seeds == (0, 1, 2)
    assert compare.cost_tokens == 1e6


def test_names_of_arms_that_can_name_a_folder(write: Write) -> None:
    names = ["searched, then repaired", "w-o_sweep (p=0.5)", "2.5 + größer"]
    given = {"compare": {"arms": {name: {"method": "windows"} for name in names}}}
    compare = load_config(write(MINIMAL + yaml.safe_dump(given, allow_unicode=True))).compare
    assert compare is not None
    assert list(compare.arms) == sorted(names)


@pytest.mark.parametrize("name", ["ä" * 76, "x" * 151])
def test_names_of_arms_that_no_file_system_holds(name: str, write: Write) -> None:
    given = {"compare": {"arms": {name: {"method": "windows"}}}}
    with pytest.raises(ConfigError, match="must have at most 150 bytes"):
        load_config(write(MINIMAL + yaml.safe_dump(given, allow_unicode=True)))


def test_every_key_of_the_schema_explains_itself() -> None:
    schema = RunConfig.model_json_schema()
    for name, section in {**schema["$defs"], "RunConfig": schema}.items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"space": {"budget": {"keep_latency": 0.75}}}, "space.budget"),
        ({"compare": {"arms": {"a": {}}, "budgets": [{"keep_latency": 0.75}]}}, "compare"),
        ({"search": {"method": "front"}, "front": {"budgets": [{"keep_latency": "9ms"}]}}, "front"),
    ],
)
def test_a_latency_budget_needs_a_table(changes: dict[str, Any], key: str) -> None:
    data: dict[str, Any] = {
        "model": {"path": "m"},
        "space": {"budget": {"keep_params": 0.75}},
        "calibration": {"text": "t"},
    } | changes
    with pytest.raises(ConfigError, match=rf"{key} is .*; keep_latency needs .* `depthsearch lat"):
        config_from_mapping(data)
    data["space"]["latency"] = "table.json"
    assert config_from_mapping(data).space.latency == "table.json"


FRONT: dict[str, Any] = {
    "model": {"path": "m"},
    "space": {"budget": {"keep_params": 0.75, "of": "blocks", "context_tokens": 512}},
    "calibration": {"text": "t"},
    "search": {"method": "front"},
}


def test_budgets_of_a_front_take_over_what_ratios_refer_to() -> None:
    budgets = [{"keep_params": 0.9}, {"keep_kv_bytes": 0.5, "of": "model"}, {"keep_bytes": "9MB"}]
    config = config_from_mapping({**FRONT, "front": {"budgets": budgets}})
    assert config.front is not None
    assert [budget.of for budget in config.front.budgets] == ["blocks", "model", "blocks"]
    assert {budget.context_tokens for budget in config.front.budgets} == {512}
    again = config_from_mapping(yaml.safe_load(resolved_yaml(config)))
    assert again == config


def test_a_second_cost_takes_over_what_ratios_refer_to_and_needs_no_first_ones() -> None:
    front = {"second": [{"keep_kv_bytes": 0.5}, {"keep_kv_bytes": "9kB", "of": "model"}]}
    for method in ("front", "optuna"):
        config = config_from_mapping({**FRONT, "search": {"method": method}, "front": front})
        assert config.front is not None
        assert [budget.of for budget in config.front.second] == ["blocks", "model"]
        assert config.front.budgets == ()
        assert config_from_mapping(yaml.safe_load(resolved_yaml(config))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"method": "evolution"}}, "search.method is 'evolution', which serves one"),
        ({"front": {"second": [{"keep_params": 0.5}]}}, "and second of another: got params and"),
        (
            {"front": {"budgets": [{"drop_sites": 2}], "second": [{"keep_kv_bytes": 0.5}]}},
            "are of one cost, and second of another: got params, sites and kv_bytes",
        ),
        (
            {"front": {"second": [{"keep_kv_bytes": 0.5}, {"keep_bytes": 0.5}]}},
            "second takes budgets of one cost",
        ),
        (
            {"front": {"second": [{"keep_kv_bytes": 0.5}, {"keep_kv_bytes": 0.50}]}},
            "each budget of second may appear once",
        ),
        ({"front": {"second": [{"keep_kv_bytes": 0.5, "context_tokens": 9}]}}, "must be that of"),
        ({"compare": {"arms": {"a": {}}}}, "leave out front or compare"),
        ({"front": {"budgets": []}}, "at least 1 item"),
        ({"front": {"budgets": [{"keep_parms": 0.9}]}}, "did you mean 'keep_params'"),
        ({"front": {"budgets": [{"keep_params": 9}]}}, "front.budgets.0.keep_params is 9"),
        ({"front": {"budgets": [0.9]}}, "front.budgets.0 is 0.9; must be a mapping"),
        ({"front": {"budgets": [{"drop_sites": 2, "context_tokens": 9}]}}, "must be that of"),
        ({"front": {"budgets": [{"keep_params": 0.9, "drop_sites": 2}]}}, "exactly one of"),
    ],
)
def test_a_front_that_can_not_be_is_one_line(changes: dict[str, Any], message: str) -> None:
    front = {"budgets": [{"keep_params": 0.9}]}
    with pytest.raises(ConfigError, match=message) as caught:
        config_from_mapping({**FRONT, "front": front, **changes})
    assert "\n" not in str(caught.value)
