"""What a run file may hold: frozen models, each key explained where it is declared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS: Mapping[str, Mapping[str, int]] = {
    "params": {"k": 10**3, "m": 10**6, "b": 10**9},
    "bytes": {f"{p}b": f for p, f in _DECIMAL.items()}
    | {f"{p}ib": 1024**n for n, p in enumerate("kmgt", start=1)},
    "flops": {f"{p}flop": f for p, f in _DECIMAL.items()},
    "latency": {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9},
}
_UNIT_NAMES = {
    "params": "K, M or B, such as '100M'",
    "bytes": "B, kB, MB, GB, KiB, MiB or GiB, such as '180MB'",
    "flops": "FLOP, kFLOP, MFLOP, GFLOP or TFLOP (per token), such as '0.2GFLOP'",
    "latency": "ns, us, ms or s, such as '12ms'",
}
_PROTECTED = re.compile(r"first|last|[a-z_]+\.[0-9]+(\.(attention|cross_attention|ffn))?")


def _whole(value: object) -> object:
    """Let `1e4` stand where a whole number is wanted."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _frozen(value: object) -> object:
    """Let a YAML list stand where a tuple is wanted."""
    return tuple(value) if isinstance(value, list) else value


def _mapped(value: object) -> object:
    """Let `racing: true` and `false` stand for the default race and for none."""
    if isinstance(value, bool):
        return {} if value else {"method": "none"}
    if isinstance(value, Mapping | RacingConfig):
        return value
    raise ValueError("must be true, false, or a mapping such as {method: paired, error_rate: 0.05}")


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
Tokens = Annotated[Whole, Field(ge=2)]
Repair = Literal["none", "table", "gap", "sequential"]
Finish = Literal["none", "gap", "sequential"]
Loss = Literal["kl", "cross_entropy", "angular", "norm", "js", "chrf"]


def parse_amount(text: str, metric: str) -> int:
    """An absolute cap such as "100M", "180MB", "0.2GFLOP" or "12ms", in the metric's own unit.

    That of latency is the nanosecond. Upper and lower case are one. Raises ValueError, naming the
    units of the metric.
    """
    kind = "bytes" if metric == "kv_bytes" else metric
    match = _AMOUNT.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    if unit not in _UNITS[kind]:
        unit = unit.removesuffix("s")
    if match is None or unit not in _UNITS[kind]:
        raise ValueError(f"a cap is a number with a unit: {_UNIT_NAMES[kind]}")
    amount = math.floor(float(match[1]) * _UNITS[kind][unit])
    if amount < 1:
        raise ValueError("a cap is at least 1")
    return amount


class _Section(BaseModel):
    """What every part of a run file shares: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class ModelConfig(_Section):
    """The pretrained model to start from."""

    path: Annotated[str, Field(min_length=1)]
    """a folder, a GGUF file, or a hub id"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """number format of the weights; auto takes bfloat16 where the machine is fast at it"""
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|(cuda|mps|xpu)(:[0-9]+)?|cuda:[0-9]+(,cuda:[0-9]+)+)$")
    ] = "auto"
    """auto, cpu, cuda, cuda:1, ...; cuda:0,cuda:1 spreads one model's blocks over both"""
    revision: str | None = None
    """branch, tag or commit of a hub model"""
    trust_remote_code: bool = False
    """run the Python code that a hub model brings along"""
    streamed: bool = False
    """bring one block at a time to the device, for a model that it can't hold whole; workers of a
    cluster read the checkpoint themselves, once each for every set of masks"""
    host_gb: Annotated[float, Field(gt=0)] | None = None
    """memory for hidden states that wait while streaming, of each worker; less takes more passes"""


class BudgetConfig(_Section):
    """What the smaller model must not exceed: exactly one key besides `of` and `context_tokens`."""

    keep_params: float | str | None = None
    """parameters to keep: a ratio in (0, 1], or a cap such as '100M'"""
    keep_bytes: float | str | None = None
    """bytes of weights to keep: a ratio in (0, 1], or a cap such as '180MB'"""
    keep_flops: float | str | None = None
    """FLOPs per token to keep: a ratio in (0, 1], or a cap such as '0.2GFLOP'"""
    keep_kv_bytes: float | str | None = None
    """KV-cache bytes per token to keep: a ratio in (0, 1], or a cap such as '12kB'"""
    keep_latency: float | str | None = None
    """time of one decoding step to keep, by the table that space.latency names: a ratio in (0, 1],
    or a cap such as '12ms'"""
    drop_sites: Count | None = None
    """number of sublayers to drop"""
    drop_blocks: Count | None = None
    """number of blocks to drop"""
    of: Literal["model", "blocks"] = "model"
    """what a ratio refers to: the whole model, or its blocks without embeddings and head"""
    context_tokens: Count = 2048
    """context length at which FLOPs per token are counted; that of space.latency, where given"""

    @field_validator(
        "keep_params", "keep_bytes", "keep_flops", "keep_kv_bytes", "keep_latency", mode="before"
    )
    @classmethod
    def _check_amount(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return None
        metric = str(info.field_name).removeprefix("keep_")
        if isinstance(value, str):
            parse_amount(value, metric)
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            kind = "bytes" if metric == "kv_bytes" else metric
            raise ValueError(
                f"a ratio lies in (0, 1]; an absolute cap carries a unit: {_UNIT_NAMES[kind]}"
            )
        return float(value)

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if len(self._given()) != 1:
            raise ValueError(
                "a budget takes exactly one of keep_params, keep_bytes, keep_flops, keep_kv_bytes, "
                "keep_latency, drop_sites, drop_blocks; to exchange it, set the whole budget, such "
                "as space.budget={drop_sites: 4}"
            )
        return self

    def _given(self) -> dict[str, float | str]:
        extras = {"of", "context_tokens"}
        return {k: v for k, v in self if k not in extras and v is not None}

    @property
    def metric(self) -> str:
        """What is counted, such as params."""
        (key,) = self._given()
        return key.split("_", 1)[1]

    @property
    def label(self) -> str:
        """A short name for folders, such as keep_params-0.75-of-blocks; equal only for equals."""
        ((key, value),) = self._given().items()
        # A unit means the same in upper and lower case, which not every disk tells apart.
        amount = "".join(value.split()).lower() if isinstance(value, str) else str(value)
        parts = [key, amount]
        if self.of != "model" and isinstance(value, float):
            parts.append(f"of-{self.of}")
        if key == "keep_flops":
            parts.append(f"at-{self.context_tokens}")
        return "-".join(parts)

    def to_budget_json(self) -> dict[str, Any]:
        """The budget as `depthsearch.space.Budget.from_json` reads it."""
        ((key, value),) = self._given().items()
        verb, metric = key.split("_", 1)[0], self.metric
        return {
            "metric": metric,
            "ratio": value if verb == "keep" and isinstance(value, float) else None,
            "cap": parse_amount(value, metric) if isinstance(value, str) else None,
            "drop": value if verb == "drop" else None,
            "of": self.of,
        }


def _check_timed(budgets: Sequence[BudgetConfig], table: str | None) -> None:
    """Raise ValueError where one of the budgets needs measured times and there are none."""
    if table is None and any(budget.keep_latency is not None for budget in budgets):
        raise ValueError(
            "keep_latency needs measured times: set space.latency to a file that "
            "`depthsearch latency MODEL --out FILE` wrote on the machine to serve on"
        )


class SpaceConfig(_Section):
    """Which sublayers may go, together or one by one, and the budget the rest must meet."""

    granularity: Literal["sublayer", "block", "attention", "ffn"] = "sublayer"
    """what is dropped at once: single sublayers of any kind, whole blocks, one kind only"""
    packable: bool = False
    """keep only what re-pairs into ordinary blocks, so that the result needs no special code"""
    protect: tuple[str | int, ...] = ()
    """never dropped: first, last, a block number, or a site such as decoder.12.attention"""
    latency: Annotated[str, Field(min_length=1)] | None = None
    """times of this model's parts that keep_latency counts in: a file that `depthsearch latency`
    wrote on the machine which is to serve the result; other machines may search"""
    budget: BudgetConfig
    """the budget, such as {keep_params: 0.75, of: blocks}"""

    @field_validator("budget", mode="after")
    @classmethod
    def _check_budget(cls, budget: BudgetConfig, info: ValidationInfo) -> BudgetConfig:
        if "latency" in info.data:
            _check_timed([budget], info.data["latency"])
        return budget

    @field_validator("protect", mode="before")
    @classmethod
    def _check_protect(cls, value: object) -> object:
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list, such as [first, 3, decoder.12.attention]")
        for entry in value:
            block = isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0
            if not block and not (isinstance(entry, str) and _PROTECTED.fullmatch(entry)):
                raise ValueError(
                    f"{entry!r} is none of first, last, a block number from 0, "
                    "or a site such as decoder.12.attention"
                )
        return tuple(value)


class CalibrationConfig(_Section):
    """The text that candidates are judged on, and how much of it."""

    text: Annotated[str, Field(min_length=1)]
    """a file (txt, jsonl, json, csv, parquet), a folder of them, or a hub dataset id"""
    column: str | None = None
    """the column that holds the text; not needed where there is only one candidate"""
    target_column: str | None = None
    """the column with what the model should write, such as the translation of `column`: each row
    becomes a prompt and its target, for the loss chrf and as text for all others"""
    prompt: str = "{source}\n"
    """with target_column: what the model reads, {source} standing for the text in `column`"""
    chat: bool = False
    """with target_column: the prompt is a user's message in the tokenizer's chat template"""
    split: str = "train"
    """split of a hub dataset"""
    subset: str | None = None
    """configuration name of a hub dataset"""
    window_tokens: Tokens = 256
    """length of one sequence"""
    select_tokens: Tokens = 8192
    """tokens that candidates are compared on during the search"""
    finals_tokens: Tokens = 16384
    """fresh tokens that the finalists are ranked on again"""
    fit_tokens: Tokens = 8192
    """tokens that repairs are fitted on in the search; no mask is judged on them. The dense model's
    stream there is kept in memory: tokens x (sublayers + 1) x hidden size numbers"""
    finals_fit_tokens: Tokens = 32768
    """tokens that the repairs of the finalists and of the result are fitted on"""
    fit_text: Annotated[str, Field(min_length=1)] | None = None
    """text of another kind for repairs to be fitted on beside `text`, such as what `depthsearch
    generate` has the model write: they carry over only to kinds of text that they have seen"""
    fit_column: str | None = None
    """the column of fit_text that holds the text"""
    fit_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """share of the fit tokens that is taken from fit_text"""
    heldout_tokens: Tokens = 16384
    """tokens that no decision sees, for the figures of the result"""
    batch_tokens: Tokens = 1024
    """tokens of one forward pass; part of the result, since racing decides after each batch"""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """share of the documents set aside for held-out figures"""

    @field_validator("prompt", mode="after")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if "{source}" not in prompt:
            raise ValueError("must hold {source}, such as 'Translate into German: {source}'")
        return prompt

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target_column is None:
            for key in ("prompt", "chat"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} needs target_column: name one, or leave {key} out")
        elif self.target_column == self.column:
            raise ValueError(f"column and target_column are both {self.column!r}: name two")
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for key in (
            "select_tokens",
            "finals_tokens",
            "fit_tokens",
            "finals_fit_tokens",
            "heldout_tokens",
            "batch_tokens",
        ):
            if getattr(self, key) < self.window_tokens:
                raise ValueError(
                    f"{key} is {getattr(self, key)}, less than one window of window_tokens = "
                    f"{self.window_tokens}"
                )
        return self


class ObjectiveConfig(_Section):
    """What "loss" means. Lower is better."""

    kind: Loss = "kl"
    """KL divergence to the dense model (kl), cross-entropy on the text itself, or a distance of the
    masked model's logits to the dense model's: their angle (angular), the norm of their difference
    (norm), or the Jensen-Shannon divergence of the probabilities (js); or 100 less chrF++ of what
    the masked model writes (chrf), against calibration.target_column, else against what the dense
    model writes after the first half of each window; needs the extra `translation`"""
    positions: Annotated[float, Field(gt=0, le=1)] = 0.25
    """share of the token positions that the loss is computed on; chrf has none"""
    max_new_tokens: Count = 64
    """chrf: tokens that the model writes for each prompt at most"""


class RacingConfig(_Section):
    """How candidates that a search need not know exactly are stopped early."""

    method: Literal["paired", "halving", "none"] = "paired"
    """paired stops a candidate once it is worse with confidence than as many masks as matter;
    halving keeps a share of the best at each rung, whatever they differ by; none stops nobody"""
    error_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """paired: probability that a race loses a mask which is among the best on all search text"""
    eta: Annotated[Whole, Field(ge=2)] = 2
    """halving: one candidate in so many goes on, to so many times as much text"""

    def __bool__(self) -> bool:
        return self.method != "none"


class SearchConfig(_Section):
    """Which searcher, from which seed, and how much it may spend."""

    method: Annotated[str, Field(min_length=1)] = "evolution"
    """name of the searcher"""
    seed: Annotated[Whole, Field(ge=0)] = 0
    """everything random follows from it"""
    cost_tokens: Annotated[float, Field(gt=0)] | None = None
    """budget in dense-equivalent tokens: one is a token through the whole dense model"""
    max_evaluations: Count | None = None
    """budget in candidates judged"""
    finalists: Count = 8
    """candidates ranked again on fresh text at the end"""
    score: Loss | None = None
    """what masks are compared by in the search, as in objective.kind, which still ranks the
    finalists; left out: the same"""
    racing: Annotated[RacingConfig, BeforeValidator(_mapped)] = RacingConfig()
    """stop judging a candidate once it can't win any more: true, false, or a mapping such as
    {method: paired, error_rate: 0.05}"""
    batch: Count | None = None
    """candidates asked for at once; the searcher's own choice when left out"""
    repair: Repair = "none"
    """what is refitted before a mask is judged: nothing; the output projection before each gap,
    once in a search for each gap and then looked up (table), or for each mask anew (gap); or also
    every projection after the first gap (sequential)"""
    finish: Finish | None = None
    """the same for the finalists and the result; left out: as in the search, gap for table"""
    options: dict[str, Any] = {}
    """settings of the searcher itself"""

    @property
    def finished(self) -> Finish:
        """How the finalists and the result are repaired."""
        if self.finish is None:
            return "gap" if self.repair == "table" else self.repair
        return self.finish


class CompareConfig(_Section):
    """Several searchers side by side at equal cost, each with several seeds."""

    arms: Annotated[dict[str, SearchConfig], Field(min_length=1)]
    """name of the arm: what it changes in `search`"""
    seeds: Annotated[
        tuple[Annotated[Whole, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_frozen)
    ] = (0, 1, 2)
    """each arm runs once with each seed"""
    budgets: tuple[BudgetConfig, ...] = ()
    """each arm and seed runs once at each of these budgets, such as [{keep_params: 0.875},
    {keep_kv_bytes: 0.6}]; left out: at space.budget"""
    cost_tokens: float | str | None = None
    """what each arm may spend, or the arm whose own cost the others get, at each budget and with
    each seed anew; else search.cost_tokens"""
    anytime: Annotated[Whole, Field(ge=0)] = 6
    """best-so-far masks of each run, spaced in log cost, that are measured on held-out text to show
    what it was worth to stop earlier; 0 measures none"""

    @field_validator("budgets", mode="before")
    @classmethod
    def _check_list(cls, budgets: object) -> object:
        if not isinstance(budgets, list | tuple):
            raise ValueError("must be a list, such as [{keep_params: 0.875}, {keep_params: 0.75}]")
        return tuple(budgets)

    @field_validator("budgets", mode="after")
    @classmethod
    def _check_budgets(cls, budgets: tuple[BudgetConfig, ...]) -> tuple[BudgetConfig, ...]:
        if len({budget.label for budget in budgets}) != len(budgets):
            raise ValueError("each budget may appear once")
        return budgets

    @field_validator("seeds", mode="after")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("each seed may appear once")
        return seeds

    @field_validator("cost_tokens", mode="before")
    @classmethod
    def _check_cost(cls, value: object, info: ValidationInfo) -> object:
        arms = list(info.data.get("arms", ()))
        if value is None or (isinstance(value, str) and (value in arms or not arms)):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"must be a number above 0 or the name of an arm: {', '.join(arms)}")
        return float(value)


class ClusterConfig(_Section):
    """Who computes: this process, or workers on a Ray cluster. The results are the same."""

    backend: Literal["in-process", "ray"] = "in-process"
    """in-process, or ray (needs the extra `ray`)"""
    address: str | None = None
    """auto joins the Ray cluster of this machine; left out, one is started here and ended again"""
    workers: Count | None = None
    """workers to start; left out, as many as the cluster has room for, now and later"""
    num_cpus: Annotated[float, Field(gt=0)] = 1
    """processor cores of one worker"""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one worker, or a share of one; over several, such as 2, its model's blocks spread"""
    resources: dict[str, float] = {}
    """custom resources of one worker, by Ray's name for them"""
    threads: Count | None = None
    """processor threads of one worker, or of this process; left out: num_cpus, or torch's choice"""
    weights: Literal["path", "store"] = "path"
    """workers load model.path themselves, or share the driver's weights through Ray's store"""
    unit_timeout_s: Annotated[float, Field(gt=0)] = 600
    """seconds after which a worker that has not answered is taken for hung and replaced; with
    model.streamed it must last for a pass over all weights"""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600
    """seconds to wait for a first worker"""
    restarts: Annotated[Whole, Field(ge=0)] = 3
    """how often in a row, with nothing computed in between, a worker may be replaced"""

    @field_validator("num_gpus", mode="after")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError("must be a share of one GPU, such as 0.5, or a whole number")
        return gpus


class FrontConfig(_Section):
    """Further budgets that one search serves besides `space.budget`; for the methods front and
    optuna."""

    budgets: Annotated[tuple[BudgetConfig, ...], BeforeValidator(_frozen)] = ()
    """budgets such as {keep_params: 0.9}, of any metrics; what they leave out of `of` and
    `context_tokens` is that of space.budget"""
    second: Annotated[tuple[BudgetConfig, ...], BeforeValidator(_frozen)] = ()
    """budgets of a second cost, such as {keep_kv_bytes: 0.6}: masks meet one of these and one of
    space.budget and `budgets`, in every combination that can be met"""

    @model_validator(mode="after")
    def _check_costs(self) -> Self:
        if not (self.budgets or self.second):
            raise ValueError("budgets or second holds at least 1 item, such as {keep_params: 0.9}")
        if len({budget.metric for budget in self.second}) > 1:
            raise ValueError("second takes budgets of one cost, such as keep_kv_bytes")
        return self


class TrackingConfig(_Section):
    """An experiment tracker that shows the course of the search; results don't depend on it."""

    kind: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """which one; its library is installed with pip"""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "depthsearch"
    """letters, digits, _ . and -: what related runs are collected under there"""
    where: Annotated[str, Field(min_length=1)] | None = None
    """a folder, relative ones below the run directory (tracking/ by default); for mlflow also a
    server such as http://host:5000; credentials belong in the tracker's environment variables"""


class RunConfig(_Section):
    """One run: model, space, calibration, objective, search, and a comparison if wanted."""

    model: ModelConfig
    """the pretrained model, such as {path: HuggingFaceTB/SmolLM2-135M}"""
    space: SpaceConfig
    """the search space: a mapping, or the path of a YAML file that holds it"""
    calibration: CalibrationConfig
    """the text, such as {text: notes.txt}"""
    objective: ObjectiveConfig = ObjectiveConfig()
    """what is minimized"""
    cluster: ClusterConfig = ClusterConfig()
    """who computes"""
    search: SearchConfig = SearchConfig()
    """the searcher and its budget"""
    compare: CompareConfig | None = None
    """for `depthsearch compare`"""
    front: FrontConfig | None = None
    """for several budgets at once, such as {budgets: [{keep_params: 0.9}, {keep_params: 0.8}]}, or
    for pairs of two costs: {budgets: [{keep_params: 0.9}], second: [{keep_kv_bytes: 0.6}]}"""
    tracking: TrackingConfig = TrackingConfig()
    """an experiment tracker, such as {kind: tensorboard}"""

    @property
    def score(self) -> Loss:
        """What masks are compared by in the search; its finalists are ranked by the objective."""
        return self.search.score or self.objective.kind

    @field_validator("front", mode="after")
    @classmethod
    def _check_front(cls, front: FrontConfig | None, info: ValidationInfo) -> FrontConfig | None:
        space, search = info.data.get("space"), info.data.get("search")
        if front is None or space is None or search is None:
            return front
        if search.method not in ("front", "optuna"):
            raise ValueError(
                f"search.method is {search.method!r}, which serves one budget: set it to 'front' "
                "or 'optuna', or leave this section out"
            )
        if info.data.get("compare") is not None:
            raise ValueError("a comparison is made at one budget: leave out front or compare")
        context = space.budget.context_tokens
        if any(b.context_tokens != context for b in (*front.budgets, *front.second)):
            raise ValueError(f"context_tokens must be that of space.budget, {context}")
        first = {space.budget.metric, *(budget.metric for budget in front.budgets)}
        if front.second and (len(first) > 1 or first & {b.metric for b in front.second}):
            raise ValueError(
                "with second, space.budget and budgets are of one cost, and second of another: "
                f"got {', '.join(sorted(first))} and {front.second[0].metric}"
            )
        _check_timed((*front.budgets, *front.second), space.latency)
        return front

    @field_validator("compare", mode="after")
    @classmethod
    def _check_compare(
        cls, compare: CompareConfig | None, info: ValidationInfo
    ) -> CompareConfig | None:
        if compare is not None and info.data.get("space") is not None:
            _check_timed(compare.budgets, info.data["space"].latency)
        return compare

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON, defaults included."""
        return self.model_dump(mode="json")
