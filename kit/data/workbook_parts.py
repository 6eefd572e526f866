"""The XML parts of an Excel workbook, an archive that may come from anyone: each is streamed, within limits.

The limits are far beyond what Excel, LibreOffice and the usual libraries write; a part beyond them is refused before it
takes memory or time.
"""

import itertools
import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from xml.parsers.expat import ParserCreate
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

MEGABYTE = 1_000_000
# Unpacked bytes that a part may have, for each byte of the file and in any case. Real sheets come to 4 to 20 a byte;
# one long text written out in every row can come near 100.
SHEET = (200, 100 * MEGABYTE)
TEXTS = (50, 200 * MEGABYTE)  # the cells' texts, each of which is there once: they are held in memory
ELEMENTS = (3, 2_000_000)  # the same of elements; a cell has two or three and takes at least two bytes of a sound file
SMALL = (0, 32 * MEGABYTE)  # which sheets there are, and the styles of cells
LONGEST_TAG = MEGABYTE  # bytes; also of a comment
DEEPEST = 100  # elements in one another; a sheet has about six
MOST_NAMES = 5_000  # of elements and attributes, each of which the parser remembers; a sheet has about a hundred
PIECE = 2**16


class Parts:
    """The XML parts of the archive, each within its limit; their names' case does not count."""

    def __init__(self, archive: ZipFile, size: int) -> None:
        self.archive, self.size = archive, size
        self.members = {member.filename.lower(): member for member in archive.infolist()}

    def relations(self, part: str) -> dict[str, dict[str, str]]:
        """The parts that a part names, by the last word of their kind and their id; "" is the workbook file itself."""
        folder, name = posixpath.split(part)
        found: dict[str, dict[str, str]] = {}
        for tag, attributes in self.elements(posixpath.join(folder, "_rels", f"{name}.rels")):
            if tag == "Relationship" and attributes.get("TargetMode") != "External":
                kind = attributes["Type"][attributes["Type"].rfind("/"):].lower()
                target = posixpath.normpath(posixpath.join("/", folder, attributes["Target"])).lstrip("/")
                found.setdefault(kind, {})[attributes["Id"]] = target
        return found

    def elements(self, name: str) -> Iterator[tuple[str, dict[str, str]]]:
        """The elements of a small part, in the order they begin."""
        found: list[tuple[str, dict[str, str]]] = []
        for _ in self.parsed(name, SMALL, lambda tag, attributes: found.append((tag, attributes))):
            yield from found
            found.clear()

    def parsed(self, name: str, limit: tuple[int, int], start: Callable[[str, dict[str, str]], object],
               end: Callable[[str], object] = str, data: Callable[[list[str], str], object] | None = None,
               ) -> Iterator[None]:
        """Call these with each tag and text of a part; yields when what they found may be taken away.

        `data` gets the tags that a text stands in, and the text or a piece of it.
        """
        member = self._within(name, limit)
        parser, names, path, elements = ParserCreate(), set[str](), list[str](), itertools.count(1)
        most = ELEMENTS[0] * self.size + ELEMENTS[1]

        def opened(tag: str, attributes: dict[str, str]) -> None:
            if next(elements) > most:
                raise ValueError(f"{name} has more than {most:,} elements, in a workbook of {self.size:,} bytes")
            names.add(tag)
            names.update(attributes)
            path.append(tag.rpartition(":")[2])
            if len(path) > DEEPEST:
                raise ValueError(f"{name} has more than {DEEPEST} elements in one another")
            start(path[-1], attributes)

        def refused(*_: Any) -> None:
            raise ValueError(f"{name} has a document type, which no workbook has")

        parser.StartElementHandler, parser.StartDoctypeDeclHandler = opened, refused
        parser.EndElementHandler = lambda _: end(path.pop())
        if data:
            parser.CharacterDataHandler, parser.buffer_text = partial(data, path), True
        given = 0
        with self.archive.open(member) as part:
            while piece := part.read(PIECE):
                parser.Parse(piece)
                given += len(piece)
                if len(names) > MOST_NAMES or given - parser.CurrentByteIndex > LONGEST_TAG:
                    raise ValueError(f"{name} holds what no workbook has: a tag of more than {LONGEST_TAG:,} bytes, or "
                                     f"more than {MOST_NAMES:,} names of elements")
                yield
            parser.Parse(b"", True)
            yield

    def _within(self, name: str, limit: tuple[int, int]) -> ZipInfo:
        member, (ratio, allowance) = self.members[name.lower()], limit
        most = ratio * self.size + allowance
        if member.file_size > most:
            raise ValueError(f"{name} unpacks to {member.file_size / MEGABYTE:,.0f} MB; in a workbook of "
                             f"{self.size / MEGABYTE:,.1f} MB it has at most {most / MEGABYTE:,.0f} MB")
        if member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise ValueError(f"{name} is packed in a way that no spreadsheet program uses")
        return member
