"""Triton kernels of the fused chain; installed as `fused.kernels`.

One direction only:

    row.py, row_backward.py → row_sums.py, column_sum.py, row_epilogue.py
    → activation.py, norm.py, dropout.py → elementary.py, tile.py, tuning.py → ..spec

    gemm_row.py → gemm_tma.py → gemm_tile.py, gemm_tuning.py → row_epilogue.py and what it uses
    gemm_channel.py → gemm_batch.py → gemm_tile.py, gemm_tuning.py → the channel kernels

    channel.py → channel_backward.py → channel_held.py, channel_loop.py (and their …_backward.py),
    channel_statistics.py, channel_apply.py, channel_gradient.py → channel_epilogue.py
    → channel_tile.py, channel_problem.py → channel_tuning.py → the above but row….py

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
