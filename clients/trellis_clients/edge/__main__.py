"""``python -m trellis_clients.edge serve MODEL.onnx``: the command, without the command line's libraries."""

import sys

from trellis_clients.edge.command import main

sys.exit(main())
