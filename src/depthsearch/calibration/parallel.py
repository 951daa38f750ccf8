"""Read texts with the answers that are wanted to them, such as sentences and their translations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from depthsearch.calibration.text import Documents, load_columns
from depthsearch.errors import DataError

SOURCE = "{source}"
"""What stands for the source in a template."""

_TODAY = "strftime_now"
_SOME_DAY = "{%- macro strftime_now(form) -%}01 Jan 2025{%- endmacro %}"


@dataclass(frozen=True)
class Pair:
    """A prompt as the model reads it, and the text that it should write."""

    prompt: str
    reference: str


@dataclass(frozen=True)
class ParallelText:
    """Each different source with its target, in the order read."""

    targets: Mapping[str, str]
    source: str

    def prompted(
        self, template: str, tokenizer: Any, chat: bool
    ) -> tuple[Documents, dict[str, Pair]]:
        """Documents of a prompt and its target each, and the pair that each of them holds.

        Source, prompt and target are the parts of a document.
        `template` holds `{source}`; with `chat` the prompt is a user's message in the tokenizer's
        chat template. Raises DataError where the tokenizer has none.
        """
        if chat and not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "calibration.chat is true, but the model's tokenizer has no chat template: set it "
                "to false and write what the model needs into calibration.prompt"
            )
        pairs: dict[str, Pair] = {}
        for source, target in self.targets.items():
            prompt = template.replace(SOURCE, source)
            if chat:
                message = [{"role": "user", "content": prompt}]
                prompt = str(
                    tokenizer.apply_chat_template(
                        message,
                        chat_template=_undated(tokenizer.get_chat_template()),
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                )
            glue = "" if chat or prompt[-1:].isspace() else " "
            pairs[f"{prompt}{glue}{target}"] = Pair(prompt, target)
        sides = (side for pair in pairs.values() for side in (pair.prompt, pair.reference))
        return Documents.of(pairs, self.source, (*self.targets, *sides)), pairs


def _undated(template: str) -> str:
    """A chat template to which every day is the same one.

    Templates that tell the model the date would make other documents of one text every day.
    """
    return _SOME_DAY + template if _TODAY in template else template


def load_parallel(
    text: str,
    column: str | None,
    target_column: str,
    split: str = "train",
    subset: str | None = None,
) -> ParallelText:
    """Read sources and targets row by row, from what `load_documents` reads but txt.

    Rows with a blank side are left out, and of a repeated source all but the first, so that none
    can stand on both sides of a split. Raises DataError where nothing usable is found, or where one
    column would be both.
    """
    (sources, targets), name = load_columns(text, (column, target_column), split, subset)
    found: dict[str, str] = {}
    for source, target in zip(sources, targets, strict=True):
        left, right = (str(side or "").strip() for side in (source, target))
        if left and right:
            found.setdefault(left, right)
    if not found:
        raise DataError(
            f"{text}: no row has text both in calibration.column and in {target_column!r}; name "
            "the columns of the source and of the target"
        )
    return ParallelText(found, name)
