"""What a preparation leaves out: named, counted, and kept below the share that the user allows.

Two shares are looked at, of documents and of files, since a broken file may hold any number of documents. Documents
that hold nothing but white space are counted and are not bad. Not here: what makes a file or record unreadable
(`inputs`, `documents`).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from CoDALanguageModel.errors import UserError

from .documents import Document
from .inputs import OWN_OUTPUT, SAME_FOLDER, Listing, printable

COUNTS = ("documents", "tokens", "empty", "undecodable")
NAMED_PER_PIECE = 1000
NAMED = 10_000  # items in a manifest; counts are always whole
LISTED = 20  # items in a message
EARLY_FACTOR = 2  # a run is stopped before its end when it is this far beyond the share, by the input's size


class TooMuchUnreadableError(UserError):
    """More of the input than `--max_bad_share` cannot be read."""


@dataclass
class Tally:
    """What was read from some of the input."""

    files: dict[str, Counter[str]] = field(default_factory=dict)
    """`COUNTS` of each file, by its printable name."""

    items: list[dict[str, str]] = field(default_factory=list)
    """What was skipped: `path`, `where` in it, `reason`; the first of them if there are very many."""

    broken: set[str] = field(default_factory=set)
    """Files that cannot be read, or not to their end."""

    def count(self, path: str, **counts: int) -> None:
        """Add to the counts of a file."""
        self.files.setdefault(printable(path), Counter()).update(counts)

    def skip(self, document: Document) -> None:
        """Count a document that has no text."""
        name = printable(document.path)
        self.count(document.path, **({} if document.problem == "unreadable" else {document.problem or "empty": 1}))
        if document.problem == "unreadable":
            self.broken.add(name)
        if document.problem != "empty" and len(self.items) < NAMED_PER_PIECE:
            self.items.append({"path": name, "where": document.where, "reason": _writable(document.reason)})

    def to_plain(self) -> dict[str, Any]:
        """As a record can hold it."""
        return {"files": self.files, "skipped": self.items, "broken": sorted(self.broken)}

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> "Tally":
        """All of several records together; those of before this was recorded have counts only."""
        whole = cls()
        for record in records:
            whole.add(cls(record["files"], record.get("skipped", []), set(record.get("broken", []))))
        return whole

    def add(self, other: "Tally") -> None:
        """Add what was read from more of the input."""
        for name, counts in other.files.items():
            self.files.setdefault(name, Counter()).update(counts)
        self.items += other.items[: max(0, NAMED - len(self.items))]
        self.broken |= other.broken

    def add_listing(self, listing: Listing) -> None:
        """Add the files of the input in which nothing was found, and those that could not be opened."""
        for path in listing.files:
            self.files.setdefault(printable(path), Counter())
        unusable = {printable(path): _writable(reason) for path, reason in sorted(listing.unusable.items())}
        self.broken |= unusable.keys()
        self.items = [{"path": path, "where": "", "reason": reason} for path, reason in unusable.items()] + self.items

    def totals(self) -> dict[str, int]:
        """The sum of each of `COUNTS`."""
        return {name: sum(counts[name] for counts in self.files.values()) for name in COUNTS}

    def check_share(self, allowed: float, *, expected: float = 1.0) -> None:
        """Compare what is bad with what may be.

        Args:
            allowed: `max_bad_share`.
            expected: at least how many times as many documents as here the whole input has.

        Raises:
            TooMuchUnreadableError: it is more; the message lists what.
        """
        totals = self.totals()
        bad = totals["undecodable"]
        documents = totals["documents"] + totals["empty"] + bad
        files = len(self.files.keys() | self.broken)
        for number, whole, noun in ((bad, documents * expected, "documents"), (len(self.broken), files, "files")):
            if number > allowed * whole:
                about = "" if expected == 1.0 else "about "
                raise TooMuchUnreadableError(
                    f"{number} of {about}{whole:.0f} {noun} cannot be read, more than --max_bad_share {allowed:g} "
                    f"allows; mend or --exclude them, or allow more:\n{self.listed()}"
                )

    def listed(self) -> str:
        """The first skipped items, one a line."""
        lines = [
            f"  {item['path']}{', ' if item['where'] else ''}{item['where']}: {item['reason']}"
            for item in self.items[:LISTED]
        ]
        more = self.totals()["undecodable"] + len(self.broken) - len(lines)
        return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)

    def manifest_entry(self, listing: Listing) -> dict[str, Any]:
        """What the manifest says about the input and what of it was left out."""
        passed_over = {printable(path): reason for path, reason in sorted(listing.passed_over.items())}
        return {
            "input_totals": self.totals(),
            "input_files": {
                path: {name: counts[name] for name in COUNTS} for path, counts in sorted(self.files.items())
            },
            "skipped": {
                "documents": self.totals()["undecodable"],
                "files": len(self.broken),
                "items": self.items,
            },
            "passed_over": {
                "files": len(passed_over),
                "reasons": dict(sorted(Counter(passed_over.values()).items())),
                "names": list(passed_over)[:NAMED],
                "excluded": listing.excluded,
            },
        }


def _writable(reason: str) -> str:
    """Without halves of surrogate pairs, which messages about bad text may quote and no file can hold."""
    return reason.encode("utf-8", "backslashreplace").decode("utf-8")


def described(listing: Listing) -> str:
    """One line on what of the input is passed over; empty if nothing is."""
    if not listing.passed_over:
        return ""
    reasons = Counter(listing.passed_over.values())
    others = [f"{reasons.pop(reason)} since {reason}" for reason in (SAME_FOLDER, OWN_OUTPUT) if reason in reasons]
    suffixes = ", ".join(f"{count} {suffix}" for suffix, count in reasons.most_common())
    parts = [f"by their suffix: {suffixes} (--text_suffixes reads more)"] if suffixes else []
    return f"passed over {'; '.join([*parts, *others])}; the manifest names them"
