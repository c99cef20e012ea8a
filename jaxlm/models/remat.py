"""What the backward pass recomputes, by name (`--remat`)."""

from collections.abc import Callable

import jax

from jaxlm.config.errors import UserError
from jaxlm.models.attention import SAVED_NAME
from jaxlm.models.runtime import Runtime

SAVED = ("attention_out", "mlp_out", SAVED_NAME)
"""Named tensors that `selective` keeps: the outputs of both sublayers, and attention's before its projection with the
log-sum-exp, without which attention would run its forward pass again."""


def checkpoint(block: Callable, runtime: Runtime, *, scanned: bool) -> Callable:
    """`block` with the rematerialisation of `runtime`.

    none keeps every intermediate (`layers.Linear` sees to copies of weights); full keeps only the block's input; dots
    keeps matmul results and recomputes the elementwise rest (and attention); selective keeps `SAVED`; offload keeps
    them in host memory.

    Args:
        scanned: whether it runs in a loop of more than one turn, apart from its backward.

    Raises:
        UserError: offload on a device that cannot address pinned host memory.
    """
    policies = jax.checkpoint_policies
    policy, device = runtime.remat, runtime.layout.mesh.devices.flat[0]
    if policy == "none":
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
            "full": policies.nothing_saveable,
            "dots": policies.dots_with_no_batch_dims_saveable,
            "selective": policies.save_only_these_names(*SAVED),
        }[policy]
    # XLA cannot merge what two loops compute: between them the barrier against that would only cost.
    return jax.checkpoint(block, policy=chosen, prevent_cse=not scanned)
