"""Warnings of Megatron and torch that tell a user nothing."""

import logging
import warnings


def hush() -> None:
    """Keep them back. Call before the first import of a Megatron module."""
    for message in (".*Apex is not installed.*", ".*Apex are not.*", ".*ransformer.?[Ee]ngine.*",
                    ".*DEPRECATED.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron.*")
    # torch.distributed.checkpoint warns of its own argument order, and that one process is one
    # process.
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint.*")
    # "No CUDA runtime is found" on machines with a toolkit and no GPU; Megatron's advice about its
    # own next API.
    for name in ("torch.utils.cpp_extension", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A save that fails is told once, by Checkpoints.save.
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    logging.getLogger(writer).setLevel(logging.CRITICAL)
