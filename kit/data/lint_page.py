"""The page of `kit lint --html`: one HTML file that shows which tokens of each row are trained."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

# What could end the script element, is no part of a JavaScript line, or (half a surrogate pair) of UTF-8.
UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def page(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The whole document; it asks the network for nothing, and no text of a row can become markup."""
    template = Path(__file__).with_name("lint_page.html").read_text(encoding="utf-8")
    data = json.dumps({"report": report, "rows": rows}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", data)
    # The policy names the page's one script by its digest, so that no other could run.
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.replace("SCRIPT-DIGEST", digest).replace("PAGE-DATA", data)
