"""The genome: which sites are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, count
from operator import not_

from depthsearch.errors import MaskError
from depthsearch.space.site import Site, parse_site_name


@dataclass(frozen=True)
class Mask:
    """Which sites are kept, `keep[site.index]`; `key` is its only identity."""

    keep: tuple[bool, ...]

    @cached_property
    def key(self) -> str:
        """The canonical text form, one character a site: '1' kept, '0' dropped."""
        return "".join("1" if kept else "0" for kept in self.keep)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """Indices of the kept sites, ascending."""
        return tuple(compress(count(), self.keep))

    @cached_property
    def dropped(self) -> tuple[int, ...]:
        """Indices of the dropped sites, ascending."""
        return tuple(compress(count(), map(not_, self.keep)))

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Maximal runs of dropped sites as half-open index ranges `(start, stop)`."""
        found: list[tuple[int, int]] = []
        for index in self.dropped:
            if found and found[-1][1] == index:
                found[-1] = (found[-1][0], index + 1)
            else:
                found.append((index, index + 1))
        return tuple(found)

    def __len__(self) -> int:
        return len(self.keep)

    def without(self, indices: Iterable[int]) -> Mask:
        """This mask with the sites `indices` dropped as well."""
        return self._set(indices, False)

    def with_(self, indices: Iterable[int]) -> Mask:
        """This mask with the sites `indices` put back."""
        return self._set(indices, True)

    def _set(self, indices: Iterable[int], kept: bool) -> Mask:
        keep = list(self.keep)
        for i in indices:
            if 0 <= i < len(keep):
                keep[i] = kept
        return Mask(tuple(keep))

    def to_json(self) -> str:
        """The key."""
        return self.key

    @classmethod
    def from_json(cls, data: str) -> Mask:
        """Rebuild a mask from its key."""
        return cls.from_key(data)

    @classmethod
    def from_key(cls, key: str) -> Mask:
        """Parse a key such as '110011'; raises MaskError on any other character."""
        if not key or set(key) - {"0", "1"}:
            raise MaskError(f"'{key}' is not a mask key: expected one '1' or '0' for each site")
        return cls(tuple(c == "1" for c in key))

    @classmethod
    def dense(cls, sites: int) -> Mask:
        """The mask that keeps all of `sites` sites."""
        return cls((True,) * sites)

    @classmethod
    def dropping(cls, sites: int, indices: Iterable[int]) -> Mask:
        """The mask over `sites` sites that drops exactly `indices`."""
        return cls.dense(sites).without(indices)


def mask_from_names(sites: Sequence[Site], dropped: Iterable[str]) -> Mask:
    """The mask that drops the named sites; `decoder.12` names every site of that block.

    Raises MaskError for a name that is no site of the model.
    """
    by_name = {site.name: site.index for site in sites}
    blocks: dict[str, list[int]] = {}
    for site in sites:
        blocks.setdefault(f"{site.stack}.{site.block}", []).append(site.index)
    gone: set[int] = set()
    for name in dropped:
        if name in blocks:
            gone.update(blocks[name])
            continue
        if name not in by_name:
            parse_site_name(name)
            raise MaskError(
                f"the model has no site '{name}': its sites run from {sites[0].name} "
                f"to {sites[-1].name}"
            )
        gone.add(by_name[name])
    return Mask.dropping(len(sites), gone)
