"""Triton kernels of the fused chain; installed as `fused.kernels`.

One direction only: row/, channel/ and gemm/ (which takes the stages of the other two) → parts/ and
tuning/ → ..spec. parts/ has the activations, the norm along rows, dropout, tiles of memory, and
the output stage with its gradient.

Nothing here checks what a user passed (functional.py does) and nothing here knows autograd
(autograd.py does).
"""

# setuptools maps this folder to `fused.kernels` (package_dir): a top-level `kernels` in
# site-packages would overwrite Hugging Face's package of that name.
if __name__ != "fused.kernels":
    raise ImportError(
        f"this folder is the package fused.kernels and cannot be imported as {__name__!r}: "
        "install the project (pip install -e .) and import fused.kernels"
    )
