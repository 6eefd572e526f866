"""Chat templates made to do harm."""

from __future__ import annotations

import io
import zipfile

CRAFTED_TEMPLATES = {
    "times": "{{ 'x' * (10**10) }}",
    "a long text": "{{ 'x' * (10**8) }}",
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a format": "{{ '%1000000000d' | format(1) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "indent": "{{ 'x\ny' | indent(10**9) }}",
    "lipsum": "{% for i in range(1000) %}{{ lipsum(n=100000) }}{% endfor %}",
    "two calls in each call": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "doubling": "{% set ns = namespace(x='xxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a power, worked out while it is compiled": "{{ 9**(9**9) }}",
    "only where an answer is asked for": "{% if add_generation_prompt %}{{ messages[0].role * 10**10 }}{% endif %}",
    "only without thinking": "{% if enable_thinking is false %}{{ 'x' * (messages|length * 10**9) }}{% endif %}",
}


def workbook_parts(rows: str, columns: tuple[str, str] = ("a", "b")) -> dict[str, bytes]:
    """The parts of a small .xlsx with these columns, and these rows of a sheet's XML below their names."""
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006/relationships"
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    names = "".join(f'<c t="inlineStr"><is><t>{name}</t></is></c>' for name in columns)
    relations = {"sheet": ("worksheet", "worksheets/sheet1.xml"), "texts": ("sharedStrings", "sharedStrings.xml"),
                 "styles": ("styles", "styles.xml")}
    files = {
        "_rels/.rels": f'<Relationships xmlns="{package}"><Relationship Id="book" Type="{office}/officeDocument" '
                       'Target="xl/workbook.xml"/></Relationships>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}">' + "".join(
            f'<Relationship Id="{name}" Type="{office}/{kind}" Target="{target}"/>'
            for name, (kind, target) in relations.items()) + "</Relationships>",
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets><sheet name="a" sheetId="1" '
                           'r:id="sheet"/></sheets></workbook>',
        "xl/sharedStrings.xml": f'<sst xmlns="{main}"><si><t>shared</t></si></sst>',
        "xl/styles.xml": f'<styleSheet xmlns="{main}"><cellXfs><xf numFmtId="0"/><xf numFmtId="14"/></cellXfs>'
                         "</styleSheet>",
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData><row r="1">{names}</row>{rows}</sheetData>'
                                    "</worksheet>"}
    return {name: text.encode() for name, text in files.items()}


def zipped(parts: dict[str, bytes]) -> bytes:
    """An archive of these files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()
