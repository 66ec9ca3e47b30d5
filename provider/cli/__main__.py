"""``python -m provider.cli`` is the ``vault-csi-provider`` program."""

import sys

from provider.cli import main

sys.exit(main())
