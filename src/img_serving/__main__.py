"""`python -m img_serving`: the command line without the script."""

from __future__ import annotations

import sys

from img_serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
