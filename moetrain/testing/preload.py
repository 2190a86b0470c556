"""What ranks and commands of tests import, in a process that they are forked off.

Importing costs each of them 6 CPU seconds otherwise. No thread may start here, so `datasets` is not
among it.
"""

# ruff: noqa: E402
import gc
import os

from moetrain.distributions import skip_file_checks

gc.disable()  # a quarter of the time of these imports
skip_file_checks()
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo on the CPU, on a machine with a GPU too

import math_verify  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from moetrain import cli  # noqa: F401
from moetrain.loops import rl, supervised  # noqa: F401
from moetrain.planner import search  # noqa: F401
from moetrain.rollout import embedded  # noqa: F401
from moetrain.run import quickstart  # noqa: F401
from moetrain.testing import layouts, ranks  # noqa: F401
from moetrain.testing.pages import use_huge_pages

get_checkpoint_conversion_mapping("qwen3_moe")  # compiles 700 patterns, once
gc.freeze()  # what is here stays: no process goes through it again to look for garbage
gc.enable()
use_huge_pages()
