"""What a run file may hold: frozen models, each key explained where it is declared."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from depthsearch.config.budgets import FrontConfig, SpaceConfig, check_timed
from depthsearch.config.searches import CompareConfig, Loss, SearchConfig
from depthsearch.config.section import LEAST_RESOURCE, MOST_THREADS, Count, Section, Tokens, Whole


class ModelConfig(Section):
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


class CalibrationConfig(Section):
    """The text that candidates are judged on, and how much of it."""

    text: Annotated[str, Field(min_length=1)]
    """a file (txt, jsonl, json, csv, parquet), a folder of them, or a hub dataset id"""
    column: str | None = None
    """the column that holds the text; not needed where there is only one candidate"""
    target_column: str | None = None
    """the column with what the model should write, such as the translation of `column`: each row
    becomes a prompt and its target, for the loss chrf and as text for all others"""
    prompt: str = "{source}\n"
    """with target_column: what the model reads, {source} standing for the text in `column`;
    encoder-decoders read it without line breaks at its end"""
    chat: bool = False
    """with target_column: the prompt is a user's message in the tokenizer's chat template"""
    source_language: str | None = None
    """with target_column: the language of `column`, by the name that the tokenizer of an
    encoder-decoder has for it, such as eng_Latn; not needed where it knows no languages"""
    target_language: str | None = None
    """with target_column: the language of target_column, likewise"""
    split: str = "train"
    """split of a hub dataset"""
    subset: str | None = None
    """configuration name of a hub dataset"""
    window_tokens: Tokens = 256
    """length of one sequence; an encoder-decoder reads and writes as many tokens each, of one row
    with its target, longer ones cut off and shorter ones padded"""
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

    @property
    def languages(self) -> tuple[str | None, str | None]:
        """Those of `column` and of `target_column`."""
        return self.source_language, self.target_language

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target_column is None:
            for key in ("prompt", "chat", "source_language", "target_language"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} needs target_column: name one, or leave {key} out")
        elif self.target_column == self.column:
            raise ValueError(f"column and target_column are both {self.column!r}: name two")
        return self

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        for key in ("fit_column", "fit_share") if self.fit_text is None else ():
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} needs fit_text: name one, or leave {key} out")
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


class ObjectiveConfig(Section):
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


class ClusterConfig(Section):
    """Who computes: this process, or workers on a Ray cluster. The results are the same."""

    backend: Literal["in-process", "ray"] = "in-process"
    """in-process, or ray (needs the extra `ray`)"""
    address: str | None = None
    """auto joins the Ray cluster of this machine; left out, one is started here and ended again"""
    workers: Count | None = None
    """workers to start; left out, as many as the cluster has room for, now and later"""
    num_cpus: Annotated[float, Field(ge=LEAST_RESOURCE)] = 1
    """processor cores of one worker"""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one worker, or a share of one; over several, such as 2, its model's blocks spread"""
    resources: dict[str, Annotated[float, Field(ge=LEAST_RESOURCE)]] = Field(default_factory=dict)
    """custom resources of one worker, by Ray's name for them"""
    threads: Annotated[Count, Field(le=MOST_THREADS)] | None = None
    """processor threads of one worker, or of this process; left out: num_cpus, or torch's choice"""
    weights: Literal["path", "store"] = "path"
    """workers load model.path themselves, or share the driver's weights through Ray's store"""
    unit_timeout_s: Annotated[float, Field(gt=0)] = 600
    """seconds after which a worker that has not answered is taken for hung and replaced, and what
    it had is tried in halves; they must last for one mask on one batch (on all of them where masks
    are repaired), with model.streamed for a pass over all weights"""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600
    """seconds to wait for a first worker"""
    restarts: Annotated[Whole, Field(ge=0)] = 3
    """how often in a row, with nothing computed in between, a worker may be replaced"""

    @field_validator("num_gpus", mode="after")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        if gpus > 1 and not gpus.is_integer():
            raise ValueError("must be a share of one GPU, such as 0.5, or a whole number")
        if 0 < gpus < LEAST_RESOURCE:
            raise ValueError(f"must be 0, or at least {LEAST_RESOURCE:g}")
        return gpus

    @field_validator("resources", mode="after")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            if name in resources:
                raise ValueError(f"must not name {name}: set cluster.{key} instead")
        return resources


class TrackingConfig(Section):
    """An experiment tracker that shows the course of the search; results don't depend on it."""

    kind: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """which one; its library is installed with pip"""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "depthsearch"
    """letters, digits, _ . and -: what related runs are collected under there"""
    where: Annotated[str, Field(min_length=1)] | None = None
    """a folder, relative ones below the run directory (tracking/ by default); for mlflow also a
    server such as http://host:5000; credentials belong in the tracker's environment variables"""


class RunConfig(Section):
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
        check_timed((*front.budgets, *front.second), space.latency)
        return front

    @field_validator("compare", mode="after")
    @classmethod
    def _check_compare(
        cls, compare: CompareConfig | None, info: ValidationInfo
    ) -> CompareConfig | None:
        if compare is not None and info.data.get("space") is not None:
            check_timed(compare.budgets, info.data["space"].latency)
        return compare

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON, defaults included."""
        return self.model_dump(mode="json")
