"""The step in five Triton kernels; `backend` decides where it takes the place of `_step`'s."""
