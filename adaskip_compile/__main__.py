"""``python -m adaskip_compile``: the command line ``adaskip``."""

from __future__ import annotations

from adaskip_compile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
