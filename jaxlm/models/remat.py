"""What the backward pass recomputes, by name (`--remat`)."""

from collections.abc import Callable

import jax

from jaxlm.config.errors import UserError
from jaxlm.models.runtime import GATHERED, Runtime

SAVED = ("attention_out", "mlp_out")
"""Named tensors that `selective` keeps: the outputs of both sublayers, [B, T, D] each."""


def checkpoint(block: Callable, runtime: Runtime) -> Callable:
    """`block` with the rematerialisation of `runtime`.

    none keeps every intermediate but gathered or cast copies of parameters; full keeps only the block's input; dots
    keeps matmul results and recomputes the elementwise rest (and attention); selective keeps `SAVED`; offload keeps
    them in host memory.

    Raises:
        UserError: offload on a device that cannot address pinned host memory.
    """
    policies = jax.checkpoint_policies
    policy, device = runtime.remat, runtime.layout.mesh.devices.flat[0]
    if policy == "none" and not runtime.copies_parameters:
        return block
    if policy == "offload":
        memories = {memory.kind for memory in device.addressable_memories()}
        if device.platform == "cpu" or "pinned_host" not in memories:
            raise UserError(
                f"remat 'offload': {device.platform} has no host memory apart from its own; use selective (--remat)"
            )
        chosen = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(SAVED),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        chosen = {
            "none": policies.save_anything_except_these_names(GATHERED),
            "full": policies.nothing_saveable,
            "dots": policies.dots_with_no_batch_dims_saveable,
            "selective": policies.save_only_these_names(*SAVED),
        }[policy]
    # Inside a scan XLA cannot merge the recomputation with the forward pass, so the barrier against that only costs.
    return jax.checkpoint(block, policy=chosen, prevent_cse=False)
