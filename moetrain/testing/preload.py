"""What every rank of a test imports, in a process that ranks are forked off.

Importing costs each of them seconds otherwise. No thread may start here.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on the CPU, on a machine with a GPU too

from moetrain.testing import ranks  # noqa: F401
