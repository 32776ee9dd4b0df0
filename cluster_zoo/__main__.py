"""``python -m cluster_zoo``: the ``cluster-zoo`` command."""

import sys

from .cli import main

if __name__ == '__main__':
    sys.exit(main())
