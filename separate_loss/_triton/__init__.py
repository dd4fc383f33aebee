"""The step in four Triton kernels; `backend` decides where it takes the place of `_step`'s."""
