"""``python -m liquid_llm``: the ``liquid`` command where its script is not on the path."""

import sys

from liquid_llm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
