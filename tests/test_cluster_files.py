"""The files of scripts/cluster: they parse, and what they call exists.

Slurm and Kubernetes are not here: the batch script runs with stand-ins for the commands of Slurm
and Ray, the manifest is held against the field names of the RayJob definition.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tests.tiny_runs import SETTINGS

from depthsearch.cli import app
from depthsearch.config import config_from_mapping

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "scripts" / "cluster"
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
TOKEN = re.compile(r"[0-9a-f]{64}")

# KubeRay 1.5, ray-operator/apis/ray/v1: JSON names of the fields used here or likely to be added.
RAYJOB_SPEC = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy",
    "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode",
    "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
RAYCLUSTER_SPEC = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
    "headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend",
    "workerGroupSpecs",
}  # fmt: skip
AUTOSCALER_OPTIONS = {
    "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources",
    "securityContext", "upscalingMode", "version", "volumeMounts",
}  # fmt: skip
HEAD = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER = {
    "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "scaleStrategy", "suspend", "template",
}  # fmt: skip
CONTAINER = {
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "name", "ports",
    "resources", "securityContext", "volumeMounts",
}  # fmt: skip


def loaded(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CLUSTER / name).read_text())
    assert isinstance(found, dict)
    return found


def stand_in(folder: Path, name: str, body: str) -> None:
    """A command on PATH that writes its arguments, and the token mode, to the file `calls`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    # One write a line, since stand-ins run side by side.
    log = (
        f'printf -v line "%s\\t" {name} "$@" "mode=${{RAY_AUTH_MODE:-}}"\n'
        'printf "%s\\n" "$line" >>"$CALLS"'
    )
    path.write_text(f"#!/usr/bin/env bash\n{log}\n{body}\n")
    path.chmod(0o755)


def start(script: str, *arguments: object, place: Path, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(CLUSTER / script), *map(str, arguments)],
        cwd=ROOT,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "HOME": str(place),
            "CALLS": str(place / "calls"),
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *arguments: object, place: Path, **env: str) -> tuple[int, str]:
    started = start(script, *arguments, place=place, **env)
    _, err = started.communicate(timeout=60)
    return started.returncode, err


def calls(place: Path, name: str) -> list[list[str]]:
    """The arguments of each call of a stand-in, in order, the token mode last."""
    path = place / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split("\t")[1:-1] for line in lines if line.split("\t")[0] == name]


def understood(arguments: list[str]) -> dict[str, Any]:
    """What the command line makes of the arguments of `depthsearch`; fails on unknown options."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    parsed = command.make_context(arguments[0], arguments[1:]).params
    assert isinstance(parsed, dict)
    return parsed


def ray_options(command: list[str]) -> None:
    """Fails unless the installed Ray knows the options of `ray start`, `ray job submit`, ..."""
    scripts = pytest.importorskip("ray.scripts.scripts")
    found = scripts.cli
    while command and not command[0].startswith("-") and hasattr(found, "commands"):
        found = found.commands[command[0]]
        command = command[1:]
    known = {option for parameter in found.params for option in parameter.opts}
    for argument in command:
        if argument == "--":
            break
        if argument.startswith("--"):
            assert argument.partition("=")[0] in known, argument


@pytest.fixture
def place(tmp_path: Path) -> Path:
    stand_in(tmp_path / "bin", "depthsearch", "exit 7")
    return tmp_path


class TestRunOrResume:
    def test_a_new_run_is_searched(self, place: Path) -> None:
        config = place / "run.yaml"
        code, _ = run(
            "run-or-resume.sh", config, place / "run", "--set", "search.seed=3", place=place
        )
        assert code == 7
        (arguments,) = calls(place, "depthsearch")
        parsed = understood(arguments[:-1])
        assert (parsed["config"], parsed["out"]) == (config, place / "run")
        assert list(parsed["override"]) == [
            "cluster.backend=ray",
            "cluster.address=auto",
            "search.seed=3",
        ]

    def test_its_settings_are_ones_that_the_configuration_knows(self, place: Path) -> None:
        run("run-or-resume.sh", "run.yaml", place / "run", place=place)
        (arguments,) = calls(place, "depthsearch")
        config = config_from_mapping(SETTINGS, overrides=understood(arguments[:-1])["override"])
        cluster = config.to_json()["cluster"]
        assert (cluster["backend"], cluster["address"]) == ("ray", "auto")

    def test_an_interrupted_run_is_resumed(self, place: Path) -> None:
        (place / "run").mkdir()
        (place / "run" / "journal.jsonl").touch()
        code, _ = run("run-or-resume.sh", "run.yaml", place / "run", place=place)
        assert code == 7
        (arguments,) = calls(place, "depthsearch")
        assert understood(arguments[:-1]) == {"run": place / "run"}

    def test_a_finished_run_is_left_alone(self, place: Path) -> None:
        (place / "run").mkdir()
        (place / "run" / "journal.jsonl").touch()
        (place / "run" / "best.json").touch()
        code, err = run("run-or-resume.sh", "run.yaml", place / "run", place=place)
        assert code == 0
        assert "has finished" in err
        assert calls(place, "depthsearch") == []


class TestRayJobScript:
    def test_it_submits_the_entry_point_with_its_folder(self, place: Path) -> None:
        stand_in(place / "bin", "ray", "exit 0")
        (place / ".ray").mkdir()
        (place / ".ray" / "auth_token").write_text("secret")
        code, err = run("ray-job.sh", "/s/a b.yaml", "/s/run", place=place)
        assert (code, err) == (0, "")
        ((*arguments, mode),) = calls(place, "ray")
        assert mode == "mode=token"
        assert arguments[-5:] == ["--", "bash", "run-or-resume.sh", "/s/a b.yaml", "/s/run"]
        assert "http://127.0.0.1:8265" in arguments
        assert str(CLUSTER) in arguments
        assert (CLUSTER / "run-or-resume.sh").is_file()
        ray_options(arguments)

    def test_the_runtime_environment_is_one(self) -> None:
        env = loaded("runtime-env.yaml")
        assert set(env) == {"env_vars"}
        assert all(isinstance(value, str) for value in env["env_vars"].values())

    @pytest.mark.parametrize("arguments", [[], ["/s/run.yaml"], ["run.yaml", "/s/run"]])
    def test_wrong_usage(self, place: Path, arguments: list[str]) -> None:
        code, err = run("ray-job.sh", *arguments, place=place)
        assert code == 2
        assert "absolute paths" in err

    def test_without_a_token_nothing_is_sent(self, place: Path) -> None:
        stand_in(place / "bin", "ray", "exit 0")
        code, err = run("ray-job.sh", "/s/run.yaml", "/s/run", place=place)
        assert code == 2
        assert "no token" in err
        assert calls(place, "ray") == []


class TestSlurm:
    @pytest.fixture
    def slurm(self, place: Path) -> Path:
        options = "while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done"
        stand_in(place / "bin", "srun", f'{options}; exec "$@"')
        stand_in(place / "bin", "scontrol", 'if [[ $1 == show ]]; then printf "%s\\n" n1 n2 n3; fi')
        stand_in(place / "bin", "hostname", "echo 10.0.0.1 fe80::1")
        stand_in(
            place / "bin",
            "ray",
            # What starts nodes may be ended in the middle of a line; the rest is waited for.
            'if [[ $1 == start ]]; then exec sleep 50; fi; '
            'cp "$RAY_AUTH_TOKEN_PATH" "$HOME/seen"; '
            'stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$HOME/rights"',
        )  # fmt: skip
        return place

    ENV: Mapping[str, str] = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "2",
    }

    def test_head_workers_and_search(self, slurm: Path) -> None:
        both = 'for _ in {1..600}; do (($(grep -c "^ray.start" "$CALLS") < 2)) || break; '
        stand_in(slurm / "bin", "depthsearch", f"{both} sleep 0.05; done; exit 7")
        code, err = run("slurm.sbatch", "run.yaml", slurm / "run", place=slurm, **self.ENV)
        assert code == 7, err  # the exit code of the search
        (head, worker) = [call for call in calls(slurm, "ray") if call[0] == "start"]
        assert "--head" in head
        assert {"--node-ip-address=10.0.0.1", "--port=24711", "--include-dashboard=false"} <= {
            *head
        }
        assert "--address=10.0.0.1:24711" in worker
        for call in (head, worker):
            assert {"--num-cpus=8", "--num-gpus=2", "--block", "mode=token"} <= {*call}
        for call in calls(slurm, "ray"):
            ray_options(call[:-1])
        (search,) = calls(slurm, "depthsearch")
        assert search[-1] == "mode=token"
        assert understood(search[:-1])["out"] == slurm / "run"
        (workers,) = [call for call in calls(slurm, "srun") if "--exclude=n1" in call]
        assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= {*workers}

    def test_the_token_is_the_jobs_own_and_does_not_stay(self, slurm: Path) -> None:
        run("slurm.sbatch", "run.yaml", slurm / "run", place=slurm, **self.ENV)
        assert TOKEN.fullmatch((slurm / "seen").read_text().strip())
        assert (slurm / "rights").read_text().strip() == "600"
        assert list((slurm / ".ray").iterdir()) == []

    def test_near_the_time_limit_it_is_queued_again(self, slurm: Path) -> None:
        stand_in(slurm / "bin", "depthsearch", "exec sleep 50")
        job = start("slurm.sbatch", "run.yaml", slurm / "run", place=slurm, **self.ENV)
        deadline = time.monotonic() + 30
        while not calls(slurm, "depthsearch"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        job.send_signal(signal.SIGUSR1)
        _, err = job.communicate(timeout=30)
        assert job.returncode == 0, err
        assert ["requeue", "4711", "mode=token"] in calls(slurm, "scontrol")
        assert list((slurm / ".ray").iterdir()) == []

    def test_its_directives(self) -> None:
        lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
        directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
        assert {"--ntasks-per-node=1", "--requeue", "--signal=B:USR1@120"} <= {*directives}
        # Slurm reads directives up to the first command only.
        first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
        assert all(not line.startswith("#SBATCH") for line in lines[first:])


class TestClusterLauncher:
    def test_ray_accepts_it(self) -> None:
        util = pytest.importorskip("ray.autoscaler._private.util")
        prepared = util.prepare_config(loaded("cluster.yaml"))
        util.validate_config(prepared)
        (node_type,) = prepared["available_node_types"].values()
        assert (node_type["min_workers"], node_type["max_workers"]) == (3, 3)

    def test_its_commands_use_the_token_and_stay_on_loopback(self) -> None:
        config = loaded("cluster.yaml")
        starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
        started = [shlex.split(line) for line in starts if " start " in line]
        assert len(started) == 2
        for mode, program, *arguments in started:
            assert (mode, program) == ("RAY_AUTH_MODE=token", "ray")
            ray_options(arguments)
        assert "--dashboard-host=127.0.0.1" in started[0]
        assert "~/.ray/auth_token" in config["file_mounts"]


class TestRayJobManifest:
    def test_its_fields_are_those_of_the_definition(self) -> None:
        manifest = loaded("rayjob.yaml")
        assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
        spec = manifest["spec"]
        assert set(spec) <= RAYJOB_SPEC
        cluster = spec["rayClusterSpec"]
        assert set(cluster) <= RAYCLUSTER_SPEC
        assert set(cluster["autoscalerOptions"]) <= AUTOSCALER_OPTIONS
        assert set(cluster["headGroupSpec"]) <= HEAD
        for group in cluster["workerGroupSpecs"]:
            assert set(group) <= WORKER
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            ray_options(["start", *(f"--{key}" for key in group["rayStartParams"])])
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert set(container) <= CONTAINER
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes

    def test_access_takes_a_token(self) -> None:
        cluster = loaded("rayjob.yaml")["spec"]["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert cluster["rayVersion"] == CONSTRAINTS["ray"]

    def test_the_image_holds_what_the_entry_point_names(self) -> None:
        manifest = loaded("rayjob.yaml")
        program, script, config, out = shlex.split(manifest["spec"]["entrypoint"])
        assert program == "bash"
        assert Path(script).name == "run-or-resume.sh"
        assert (CLUSTER / Path(script).name).is_file()
        assert Path(config).parts[1] == Path(out).parts[1] == "shared"
        instructions = (CLUSTER / "Dockerfile").read_text()
        workdir = re.findall(r"^WORKDIR (\S+)$", instructions, re.M)[0]
        assert "COPY scripts/cluster ./cluster" in instructions
        assert str(Path(script).parent) == f"{workdir}/cluster"
        env = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])
        assert env == loaded("runtime-env.yaml")


class TestDockerfile:
    def test_what_it_copies_exists_and_its_torch_is_the_pinned_one(self) -> None:
        text = (CLUSTER / "Dockerfile").read_text()
        assert text.split("\n", 8)[0].startswith("#")
        assert re.findall(r"^FROM (\S+)$", text, re.M) == ["python:3.11-slim"]
        for line in re.findall(r"^COPY (.+)$", text, re.M):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists(), source
        assert f"torch=={CONSTRAINTS['torch']}" in text

    def test_it_does_not_run_as_root(self) -> None:
        users = re.findall(r"^USER (\S+)$", (CLUSTER / "Dockerfile").read_text(), re.M)
        assert users[-1] == "1000"


def test_every_file_is_explained() -> None:
    text = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in text, path.name


@pytest.mark.parametrize("name", ["run-or-resume.sh", "ray-job.sh", "slurm.sbatch"])
def test_scripts_parse_and_may_be_run(name: str) -> None:
    assert (CLUSTER / name).stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)
