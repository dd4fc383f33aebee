"""What older releases of torch cannot do; docs/guide.md says so to users."""

import pytest

from separate_loss._torch import RELEASE, compiler_moves_buffers

# Before 2.8 a module that moves its centers runs uncompiled within compiled code.
COMPILES_UPDATES = compiler_moves_buffers()
# FSDP2 of 2.6 needs streams, which the CPU has none of.
needs_sharding_on_cpu = pytest.mark.skipif(RELEASE < (2, 7), reason="FSDP2 on the CPU came in 2.7")
