"""The schemas of the raw operators, by name.

Nothing is imported, so that setup.py can read them: the extension defines the operators for
programs without Python, and ops.py defines them where the extension is not loaded.
"""

from __future__ import annotations

# statistics is (2, rows) for layer (mean, rstd), (1, rows) for rms (rstd), (0, rows) without norm.
# wanted is a sum of the WANT_ constants of spec.py; a sum over the rows that is not wanted comes
# back empty. dbias may be wanted without bias: z then contains it already. A gated activation
# halves the columns: z and the parameters have 2N of them, residual, y and dy have N, over which
# the mask lies; row_forward_ does not take one. shortcut, of z's shape and contiguous, is added in
# front of the activation, which is then no gated one; dshortcut is empty, (0,), without it, and
# without a norm, where it is dz.
_CHANNEL_PARAMETERS = "Tensor? norm_weight, Tensor? norm_bias"
_PARAMETERS = f"Tensor? bias, {_CHANNEL_PARAMETERS}"
_SCALARS = "int norm, float eps, int activation, float alpha, float beta, int threshold"
_SHORTCUT = "Tensor? shortcut=None"
_ROW = (
    f"row_forward(Tensor z, {_PARAMETERS}, Tensor? residual, Tensor? seed, {_SCALARS},"
    f" {_SHORTCUT}) -> (Tensor y, Tensor statistics)",
    f"row_forward_(Tensor(a!) z, {_PARAMETERS}, Tensor? residual, Tensor? seed, {_SCALARS},"
    f" {_SHORTCUT}) -> ()",
    f"row_backward(Tensor dy, Tensor z, {_PARAMETERS}, Tensor statistics, Tensor? seed, int wanted,"
    f" {_SCALARS}, {_SHORTCUT})"
    " -> (Tensor dz, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dbias, Tensor dshortcut)",
    # The same from a Linear's input on, z = x · weightᵀ + bias, for CUDA tensors alone and where
    # gemm.py has a kernel for it. z comes back empty, (0,), unless save_z.
    f"linear_row_forward(Tensor x, Tensor weight, {_PARAMETERS}, Tensor? residual, Tensor? seed,"
    f" bool save_z, {_SCALARS}) -> (Tensor y, Tensor z, Tensor statistics)",
)

# h = residual + dropout(x), y = norm(h) along the rows; dh is what h gets from elsewhere. dx comes
# back empty, (0,), where nothing is dropped: it is dresidual.
_ADD = "Tensor? seed, int norm, float eps, int threshold"
_ADD_NORM = (
    f"add_norm_forward(Tensor x, Tensor residual, {_CHANNEL_PARAMETERS}, {_ADD})"
    " -> (Tensor y, Tensor h, Tensor statistics)",
    f"add_norm_backward(Tensor dy, Tensor? dh, Tensor h, {_CHANNEL_PARAMETERS}, Tensor statistics,"
    " Tensor? seed, int wanted, int norm, float eps, int threshold)"
    " -> (Tensor dx, Tensor dresidual, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dbias)",
)

# The channel operators take contiguous z: (samples, channels, positions), or with channels_last
# (samples, positions, channels). mean and variance (biased) are (samples, groups) for group and
# instance norm, (1, channels) for batch norm; None without a norm. mask (samples, positions), bool,
# needs channels_last: positions where it is false take no part in statistics, gradients and sums,
# and come out as zero. count is (samples,), for batch norm (1,): the elements behind each
# statistic; empty (as an argument None) where the shape says it, which is without mask.
# channel_dropout lays the mask of dropout over (samples, channels).
_CHANNEL_SCALARS = (
    "int norm, int groups, bool channels_last, float eps, int activation, float alpha, float beta,"
    " int threshold, bool channel_dropout"
)
_APPLY = (
    f"Tensor? mean, Tensor? variance, {_CHANNEL_PARAMETERS}, Tensor? residual, Tensor? mask,"
    f" Tensor? seed, {_CHANNEL_SCALARS}, {_SHORTCUT}"
)
_CHANNEL = (
    "channel_statistics(Tensor z, Tensor? mask, int norm, int groups, bool channels_last)"
    " -> (Tensor mean, Tensor variance, Tensor count)",
    f"channel_forward(Tensor z, {_CHANNEL_PARAMETERS}, Tensor? residual, Tensor? mask,"
    f" Tensor? seed, {_CHANNEL_SCALARS}, {_SHORTCUT})"
    " -> (Tensor y, Tensor mean, Tensor variance, Tensor count)",
    f"channel_apply(Tensor z, {_APPLY}) -> Tensor y",
    f"channel_apply_(Tensor(a!) z, {_APPLY}) -> ()",
    # constant: mean and variance do not depend on z (evaluation). dbias is the gradient of a bias
    # (one per channel) that z contains already, in z's dtype; zero where the norm takes it out
    # again. Group norm does not offer it.
    "channel_backward(Tensor dy, Tensor z, Tensor? mean, Tensor? variance, Tensor? count,"
    f" {_CHANNEL_PARAMETERS}, Tensor? mask, Tensor? seed, int wanted, bool constant,"
    f" {_CHANNEL_SCALARS}, {_SHORTCUT})"
    " -> (Tensor dz, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dbias, Tensor dshortcut)",
    # The two halves of batch norm's backward, between which processes add up sums and count: sums
    # is (2, channels), of g and of g · x̂, where g is the gradient of the norm's output. Behind a
    # shortcut the second half takes its gradient for dy, and no activation and dropout.
    f"channel_sums(Tensor dy, Tensor z, Tensor mean, Tensor variance, {_CHANNEL_PARAMETERS},"
    f" Tensor? mask, Tensor? seed, {_CHANNEL_SCALARS}, {_SHORTCUT})"
    " -> (Tensor sums, Tensor dshortcut)",
    "channel_gradient(Tensor dy, Tensor z, Tensor mean, Tensor variance, Tensor sums, Tensor count,"
    f" {_CHANNEL_PARAMETERS}, Tensor? mask, Tensor? seed, {_CHANNEL_SCALARS}) -> Tensor dz",
    # From a Linear's input on, as linear_row_forward; channels_last alone, without mask.
    f"linear_channel_forward(Tensor x, Tensor weight, {_PARAMETERS}, Tensor? residual,"
    f" Tensor? seed, bool save_z, {_CHANNEL_SCALARS})"
    " -> (Tensor y, Tensor z, Tensor mean, Tensor variance)",
)

# A gate of two tensors: y = dropout(value · act(gate)) over (rows, cols), by the code of the gated
# activation, each tensor with a row stride of its own. joined: gate and value are, in this order,
# the halves of one tensor; dvalue is the gradient of all of it, (rows, 2 cols), and dgate is empty.
_PAIR = "Tensor value, Tensor gate, Tensor? seed, int activation, int threshold"
_GATE = (
    f"gate_forward({_PAIR}) -> Tensor y",
    f"gate_backward(Tensor dy, {_PAIR}, bool joined) -> (Tensor dvalue, Tensor dgate)",
)

SCHEMAS = {schema.partition("(")[0]: schema for schema in (*_ROW, *_ADD_NORM, *_CHANNEL, *_GATE)}
