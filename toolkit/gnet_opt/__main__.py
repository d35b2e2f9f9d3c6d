"""`python -m gnet_opt` is the command `gnet-opt`."""

from __future__ import annotations

from gnet_opt.cli import main

if __name__ == "__main__":
    main()
