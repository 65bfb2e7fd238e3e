"""How glibc treats the memory of worker processes; other C libraries do not look at it.

A training step frees and takes the same gigabytes again and again, which glibc would hand back to the system in
between: keeping them saves up to a seventh of a step. Huge pages save a fifth of a Fisher, which runs through gradients
of megabytes (`python -m benchmarks.epoch` and `benchmarks.fisher`, with and without `--as-worker`). A worker stays as
large as it ever was.
"""

import resource
import sys

ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
}


def peak_mebibytes() -> float:
    """Give the most memory that this process has had at once, in MiB. macOS counts it in bytes, others in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
