"""FSDP2 on a CPU, and ZeRO-3 that partitions small weights too: for tests alone.

accelerate 1.15 looks at its FSDP plugin only for device types that do not include multi-CPU (`AcceleratorState.__init__`), so an
FSDP2 configuration on a CPU silently runs DDP. The patch does what that branch does on a GPU. Never import it from the package.
"""

from __future__ import annotations

import os
from typing import Any


def allow_fsdp_on_cpu() -> None:
    """Call before the first `TrainingArguments` or `Accelerator`; does nothing where no FSDP was asked for."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    stock = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        plugin = kwargs.get("fsdp_plugin")
        fresh = "deepspeed_plugins" not in AcceleratorState._shared_state
        stock(self, *args, **kwargs)
        if fresh and plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def partition_small_weights() -> None:
    """ZeRO-3 keeps parameters of less than 100,000 numbers whole, which is all of a tiny model; call before the first trainer."""
    from accelerate.utils import DeepSpeedPlugin

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    stock = DeepSpeedPlugin.__post_init__

    def patched(self: Any) -> None:
        stock(self)
        zero = self.hf_ds_config.config.get("zero_optimization", {})
        if zero.get("stage") == 3:
            zero["stage3_param_persistence_threshold"] = 0
            zero["stage3_model_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = patched
