"""`python -m flowdata` is the `flowdata` command."""

import sys

from flowdata.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
