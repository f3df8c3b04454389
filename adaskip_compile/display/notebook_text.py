"""How values look in a notebook: as their text, in lines, with the notebook's own colours."""

from __future__ import annotations

import html


class ShownAsText:
    """What a notebook shows as its ``str()``, and not as one long line."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
