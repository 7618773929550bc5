"""`python -m koff_lightning` is the same as `koff`."""

import sys

from koff_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
