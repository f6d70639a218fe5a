"""`python -m jaxpost`: the command `jaxpost` by the interpreter that is named."""

import sys

from jaxpost.cli import main

if __name__ == "__main__":
    sys.exit(main())
