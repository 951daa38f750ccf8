"""The model card: what was dropped, at which budget, with what result, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from depthsearch import __version__
from depthsearch.export.native import KIND_NAMES, NativePlan
from depthsearch.export.verify import Verification
from depthsearch.export.write import base_directory
from depthsearch.model.anatomy import describe
from depthsearch.model.load import LoadedModel
from depthsearch.sources import is_path
from depthsearch.space import Budget, Mask, Site
from depthsearch.space.packing import block_kinds, stacks_of

_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Figure:
    """One row of the card's table: a measure of the dense and of the pruned model."""

    name: str
    dense: str | float | int | None
    pruned: str | float | int | None


@dataclass(frozen=True)
class CardData:
    """What the run knows about the mask; everything is optional.

    `origin` is how the mask was found, `calibration` the text its loss was measured on, `command`
    and `config` what to type to repeat the run, `repair` which weights were refitted, and
    `fitted_on` the text that they were refitted on, `toward_text` by how many nats the targets
    leaned toward what predicts it. `languages` are those that an encoder-decoder was given to read
    and to write, and `starts` the tokens that what it writes begins with.
    """

    origin: str | None = None
    budget: Budget | None = None
    signature: Mapping[str, Any] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    calibration: str | None = None
    fitted_on: str | None = None
    toward_text: float = 0.0
    command: str | None = None
    config: str | None = None
    repair: Mapping[str, Any] | None = None
    languages: tuple[str, str] | None = None
    starts: tuple[int, ...] = ()


def model_card(
    loaded: LoadedModel,
    sites: Sequence[Site],
    mask: Mask,
    plan: NativePlan,
    card: CardData,
    parameters: tuple[int, int],
    check: Verification | None,
    title: str,
) -> str:
    """README.md of the export; `parameters` are the dense model's and the small model's."""
    base = base_name(loaded)
    dense, small = parameters
    dropped = dropped_text(sites, mask)
    parts = [
        _front_matter(loaded),
        f"# {title}",
        f"[{base}](https://huggingface.co/{base})" if "/" in base else f"`{base}`",
    ]
    parts[-1] += (
        f" without {len(mask.dropped)} of its {len(mask)} {_kinds(sites)} sublayers: "
        f"{_blocks(plan)}, {small:,} parameters instead of "
        f"{dense:,} ({100 * small / dense:.1f} %). It is an ordinary checkpoint of its family and "
        "needs no code of its own."
    )
    loading = _loading_two_stacks(title, card) if len(plan.stacks) > 1 else _loading(title)
    parts += ["## Load it", loading]
    parts += ["## What was dropped", "\n".join(f"- {run}" for run in dropped) or "Nothing."]
    if repaired := _repaired(sites, plan):
        parts.append("What remains was paired anew, numbers of the base model:")
        parts.append("\n".join(f"- {line}" for line in repaired))
    if card.repair is not None:
        parts += ["## What was refitted", _refitted(loaded, card)]
    if card.figures:
        parts += ["## Figures", _table(card.figures)]
    parts += ["## How it was made", _making(mask, card, check)]
    parts += ["## Limits", _limits(card)]
    return "\n\n".join(parts) + "\n"


def dropped_text(sites: Sequence[Site], mask: Mask) -> tuple[str, ...]:
    """Each run of dropped sites of a stack as a phrase, whole blocks named as such."""
    found = []
    for start, stop in _runs(sites, mask):
        first, last = sites[start], sites[stop - 1]
        whole = first.kind == "attention" and last.kind == "ffn"
        if whole and first.block == last.block:
            found.append(f"{first.stack} block {first.block}")
        elif whole:
            count = last.block - first.block + 1
            found.append(f"{first.stack} blocks {first.block} to {last.block} ({count} blocks)")
        elif stop - start == 1:
            found.append(f"`{first.name}`")
        else:
            found.append(f"`{first.name}` to `{last.name}` ({stop - start} sublayers)")
    return tuple(found)


def _runs(sites: Sequence[Site], mask: Mask) -> list[tuple[int, int]]:
    """The runs of dropped sites `(start, stop)`, cut where one stack ends and the next begins."""
    found: list[tuple[int, int]] = []
    for start, stop in mask.runs:
        cuts = [i for i in range(start + 1, stop) if sites[i - 1].stack != sites[i].stack]
        found += pairwise([start, *cuts, stop])
    return found


def _kinds(sites: Sequence[Site]) -> str:
    """The kinds of sublayers as a list in words."""
    present = {site.kind for site in sites}
    names = [name for kind, name in KIND_NAMES.items() if kind in present]
    return " and ".join([", ".join(names[:-1]), names[-1]])


def _blocks(plan: NativePlan) -> str:
    """How many blocks remain, by stack."""
    if len(plan.stacks) == 1:
        return f"{len(plan.pairs)} blocks instead of {plan.dense_blocks}"
    encoder, decoder = plan.stacks
    return (
        f"{len(encoder.pairs)} encoder blocks instead of {encoder.dense_blocks} and "
        f"{len(decoder.pairs)} decoder blocks instead of {decoder.dense_blocks}"
    )


def _repaired(sites: Sequence[Site], plan: NativePlan) -> list[str]:
    """The new blocks that are made of several dense ones, a phrase each."""
    found = []
    for stack, part in zip(stacks_of(sites), plan.stacks, strict=True):
        prefix = f"{stack[0].stack} " if len(plan.stacks) > 1 else ""
        for new, sources in enumerate(part.pairs):
            if len(set(sources)) > 1:
                named = zip(block_kinds(stack), sources, strict=True)
                origins = ", ".join(f"{KIND_NAMES[k]} of block {block}" for k, block in named)
                found.append(f"{prefix}block {new}: {origins}")
    return found


def base_name(loaded: LoadedModel) -> str:
    """The hub id of the base model, or the name of its file or directory."""
    if is_path(loaded.source, (".gguf", ".safetensors")):
        return Path(loaded.source).expanduser().resolve().name
    return loaded.source


def _front_matter(loaded: LoadedModel) -> str:
    inherited = _base_front_matter(base_directory(loaded))
    # What an encoder-decoder is for (to translate, to summarize) only its own card knows.
    two = bool(loaded.model.config.is_encoder_decoder)
    task = inherited.get("pipeline_tag") if two else "text-generation"
    data: dict[str, Any] = {
        "base_model": base_name(loaded),
        "library_name": "transformers",
        **({"pipeline_tag": task} if task else {}),
        "tags": ["depthsearch", "depth-pruning", "pruned"],
    }
    data |= {name: inherited[name] for name in _INHERITED if name in inherited}
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _base_front_matter(base: Path | None) -> Mapping[str, Any]:
    """The metadata of the base model's own card, or nothing where there is none to read."""
    try:
        text = (base / "README.md").read_text(encoding="utf-8") if base else ""
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _loading(title: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{title}")
model = AutoModelForCausalLM.from_pretrained("{title}")
tokens = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```"""


def _loading_two_stacks(title: str, card: CardData) -> str:
    lines = [
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        f'model = AutoModelForSeq2SeqLM.from_pretrained("{title}")',
    ]
    further = ""
    if card.languages is not None:
        read, written = card.languages
        lines.insert(0, "import torch")
        lines.append(f'tokenizer.src_lang = "{read}"')
        lines.append(f"start = torch.tensor([{list(card.starts)}])  # {written}")
        further = ", decoder_input_ids=start"
    lines += [
        'tokens = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)',
        f"written = model.generate(**tokens{further}, max_new_tokens=40)[0]",
        "print(tokenizer.decode(written, skip_special_tokens=True))",
    ]
    return "\n".join(["```python", *lines, "```"])


def _table(figures: Sequence[Figure]) -> str:
    rows = ["| | dense | pruned |", "|---|---:|---:|"]
    rows += [f"| {f.name} | {_cell(f.dense)} | {_cell(f.pruned)} |" for f in figures]
    return "\n".join(rows)


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _making(mask: Mask, card: CardData, check: Verification | None) -> str:
    lines = [f"By [depthsearch](https://pypi.org/project/depthsearch/) {__version__}."]
    facts = []
    if card.budget is not None:
        facts.append(f"Budget: {card.budget.text}")
    if card.origin:
        facts.append(f"Found by: {card.origin}")
    if card.calibration:
        facts.append(f"Calibration text: {card.calibration}")
    facts.append(f"Mask (1 kept, 0 dropped, in execution order): `{mask.key}`")
    if check is not None:
        facts.append(f"Checked against the masked base model in a clean interpreter: {check.text}")
    lines.append("\n".join(f"- {fact}" for fact in facts))
    if card.signature:
        text = json.dumps(card.signature, indent=2, ensure_ascii=False, default=str)
        lines.append(f"Signature of the figures:\n\n```json\n{text}\n```")
    if card.command:
        lines.append(f"```console\n{card.command}\n```")
    if card.config:
        lines.append(f"```yaml\n{card.config.strip()}\n```")
    return "\n\n".join(lines)


def _refitted(loaded: LoadedModel, card: CardData) -> str:
    assert card.repair is not None
    sites: Mapping[str, Mapping[str, float]] = card.repair["sites"]
    if not sites:
        return (
            "Nothing: no refit was better on tokens held back, or nothing stands before what was "
            "dropped."
        )
    lines = [
        f"{_projections(loaded, len(sites))} refitted by ridge least squares, so that the residual "
        f"stream follows the base model's{_leaning(card)} behind what was dropped; "
        f"{card.repair['fit_tokens']:,} tokens of {_fit_text(card)} were used, none of which "
        "judged a mask. No parameter was added."
    ]
    lines += [
        f"- `{name}`: {100 * found['left']:.0f} % of the squared error left on tokens held back, "
        f"ridge {found['ridge']:g}"
        for name, found in sites.items()
    ]
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _leaning(card: CardData) -> str:
    """What the stream follows besides, nothing where it follows the base model alone."""
    if not card.toward_text:
        return ""
    return f", moved toward what predicts that text by {card.toward_text:g} nats to first order,"


def _projections(loaded: LoadedModel, count: int) -> str:
    """The beginning of the sentence that says what of so many sublayers was refitted."""
    norms = any(row.norm_after for row in describe(loaded.model).rows)
    if count == 1:
        norm = ", and the size of the norm behind it," if norms else ""
        which = f"The output projection{norm} of 1 sublayer (number of the base model)"
        return f"{which} {'were' if norms else 'was'}"
    norm = ", and the size of the norms behind them," if norms else ""
    return f"The output projections{norm} of {count} sublayers (numbers of the base model) were"


def _fit_text(card: CardData) -> str:
    return card.fitted_on or card.calibration or "the calibration text"


def _limits(card: CardData) -> str:
    text = card.calibration or "a small calibration text"
    but = ""
    if card.repair is not None and card.repair["sites"]:
        but = f" but for those refitted, in closed form, on tokens of {_fit_text(card)}"
    return (
        f"The sublayers were chosen on {text}: other languages, domains and tasks may have lost "
        "more, and long generation and reasoning suffer before perplexity shows it. The weights "
        f"are the base model's own{but}; the model was not trained after pruning. Whatever the "
        "base model's card says about its risks and licence holds here too."
    )
