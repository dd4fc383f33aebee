"""Features that older releases of torch lack; docs/guide.md lists them."""

import pytest

from separate_loss._torch import RELEASE, compiler_moves_buffers

# Before 2.8, a module that updates its centers runs uncompiled within compiled code.
COMPILES_UPDATES = compiler_moves_buffers()
# FSDP2 of 2.6 needs streams, which a CPU does not have.
needs_sharding_on_cpu = pytest.mark.skipif(
    RELEASE < (2, 7), reason="FSDP2 on the CPU needs torch 2.7"
)
needs_compiled_transforms = pytest.mark.skipif(
    RELEASE < (2, 11), reason="torch.func with batched labels compiles from torch 2.11 on"
)
