"""python -m fxcompress"""

import sys

from fxcompress.cli import main

sys.exit(main())
