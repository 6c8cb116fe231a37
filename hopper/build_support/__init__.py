"""What the build adds to setuptools: the runtime library, the device headers, the ahead-of-time kernels."""
