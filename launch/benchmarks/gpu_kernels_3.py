"""Part "heads" of the kernel benchmark, under the name by which launch/gpu.sh finds it."""

from .kernels import main

if __name__ == "__main__":
    main("heads")
