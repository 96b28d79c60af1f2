"""Deterministic weights for HPCM models, so that golden values need no weight file.

This file defines the weights that the golden vectors in data/golden were recorded with: change nothing.

    fill_state_dict({"g_a.branch.0.weight": (96, 3, 4, 4), ...})
        -> {"g_a.branch.0.weight": float32 ndarray, ...}

Every entry depends only on its own key and shape, and on M (the number of
latent channels, taken from "adaptive_params_list.0").  Random numbers come
from numpy.random.RandomState(zlib.crc32(key)).random_sample(): the legacy
MT19937 stream, frozen by NumPy's policy, 53 random bits per number.  Only
+ - * / sqrt are applied to them, in float64, then one rounding to float32, so
the weights are the same bit for bit on every IEEE-754 machine.

Notation: u(key) is that uniform array in [0, 1), v(key) = 2 u(key) - 1.

key                                     value
--------------------------------------  ----------------------------------------
any key with an empty shape (0,)        empty
entropy_estimation.beta                 1.5
entropy_estimation.scale_lower_bound.bound       0.12
entropy_estimation.likelihood_lower_bound.bound  1e-9
means_hyper                             v
scales_hyper                            0.3 + 2 u
adaptive_params_list.*                  1 + 0.1 v
*.weight                                v sqrt(3 gain / fan_in)   (variance gain / fan_in)
*.bias                                  0.05 v

fan_in is I kh kw for a convolution (O, I, kh, kw) and I kh kw / 4 for a
transposed one (I, O, kh, kw) of stride 2.  Transposed are the weights under
"g_s." and "h_s." with an even kernel.

The latents get a spread of amplitudes, the same for what is coded and for the
predicted scales: channel c has amplitude A[c] = 0.1 + 5 u^3 with
u = u("latent-amplitude")[c], for c < M.  "Output channels times A" below means
that the weights of output channel c (or of c and M + c) are multiplied by A[c].

layer                                   gain     then
--------------------------------------  -------  -------------------------------
g_a., input channels 3                  4
g_a., even kernel, output channels M    1        output channels times A, bias 0.05 v A
last 1x1 of a residual block            0.15
h_a., even kernel, input channels M     0.5
h_s., transposed, output channels 2M    0.05     times [A, A]; bias = head bias
h_s., last 1x1 of a residual block,
      output channels 2M                0.01     times [A, A]; bias 0
y_spatial_prior_adaptor_list_*          0.3
y_spatial_prior_*, 1x1, 3M -> 2M        [0.06, 0.4]  times [A, A]; bias = head bias
attn_*.conv_q, conv_k                   0.25
attn_*.conv_v, conv_out                 0.5
g_s., transposed, input channels M      0.1
g_s., transposed, output channels 3     0.02     bias = 0.5 + 0.05 v
all others                              1

[a, b]: a for the first M output channels (scales), b for the last M (means).
Head bias: A (0.5 + 0.5 u) for the first M channels, 0.3 v A for the last M.
"""

import re
import zlib

import numpy as np

CONSTANTS = {
    "entropy_estimation.beta": 1.5,
    "entropy_estimation.scale_lower_bound.bound": 0.12,
    "entropy_estimation.likelihood_lower_bound.bound": 1e-9,
}


def uniform(key, shape):
    """u(key): uniform numbers in [0, 1), float64, in C order."""
    return np.random.RandomState(zlib.crc32(key.encode())).random_sample(shape)


def signed(key, shape):
    """v(key): uniform numbers in [-1, 1)."""
    return 2.0 * uniform(key, shape) - 1.0


def latent_amplitude(m):
    """A: one amplitude per latent channel."""
    u = uniform("latent-amplitude", m)
    return 0.1 + 5.0 * (u * u * u)


def is_transposed(key, shape):
    return key.startswith(("g_s.", "h_s.")) and shape[2] % 2 == 0


def is_block_end(key, shape):
    return re.search(r"\.branch\.3\.weight$", key) is not None and shape[2] == 1


def layer_rule(key, shape, m):
    """(kind, gain) of the layer that owns the weight `key`."""
    even = shape[2] % 2 == 0
    inputs, outputs = shape[1], shape[0]
    if is_transposed(key, shape):
        inputs, outputs = outputs, inputs
    if key.startswith("g_a."):
        if inputs == 3:
            return "plain", 4.0
        if even and outputs == m:
            return "latent", 1.0
    if key.startswith("h_s.") and outputs == 2 * m:
        if even:
            return "params", (0.05, 0.05)
        if is_block_end(key, shape):
            return "params_end", (0.01, 0.01)
    if is_block_end(key, shape):
        return "plain", 0.15
    if key.startswith("h_a.") and even and inputs == m:
        return "plain", 0.5
    if key.startswith("y_spatial_prior_adaptor_list_"):
        return "plain", 0.3
    if key.startswith("y_spatial_prior_") and (outputs, inputs) == (2 * m, 3 * m):
        return "params", (0.06, 0.4)
    if re.match(r"attn_.*\.conv_[qk]\.", key):
        return "plain", 0.25
    if re.match(r"attn_.*\.conv_(v|out)\.", key):
        return "plain", 0.5
    if key.startswith("g_s.") and even:
        if inputs == m:
            return "plain", 0.1
        if outputs == 3:
            return "image", 0.02
    return "plain", 1.0


def fill_weight(key, shape, m):
    kind, gain = layer_rule(key, shape, m)
    transposed = is_transposed(key, shape)
    fan_in = shape[0 if transposed else 1] * shape[2] * shape[3]
    if transposed:
        fan_in = fan_in / 4
    if kind in ("params", "params_end"):
        gain = np.repeat(np.array(gain), m)
    factor = np.sqrt(3.0 * np.asarray(gain) / fan_in)
    amplitude = latent_amplitude(m)
    if kind == "latent":
        factor = factor * amplitude
    elif kind in ("params", "params_end"):
        factor = factor * np.concatenate([amplitude, amplitude])
    if factor.ndim:
        factor = factor.reshape((1, -1, 1, 1) if transposed else (-1, 1, 1, 1))
    return signed(key, shape) * factor


def fill_bias(key, shape, m, kind):
    v = signed(key, shape)
    amplitude = latent_amplitude(m)
    if kind == "latent":
        return 0.05 * v * amplitude
    if kind == "params":
        scales = amplitude * (0.5 + 0.25 * (v[:m] + 1.0))
        means = 0.3 * v[m:] * amplitude
        return np.concatenate([scales, means])
    if kind == "params_end":
        return np.zeros(shape)
    if kind == "image":
        return 0.5 + 0.05 * v
    return 0.05 * v


def fill_state_dict(keys_and_shapes):
    """Weights for the given {key: shape}, as {key: float32 array}, in sorted key order."""
    shapes = {key: tuple(int(n) for n in shape) for key, shape in keys_and_shapes.items()}
    m = shapes["adaptive_params_list.0"][1] // 3
    filled = {}
    for key in sorted(shapes):
        shape = shapes[key]
        if shape == (0,):
            value = np.zeros(shape)
        elif key in CONSTANTS:
            value = np.full(shape, CONSTANTS[key])
        elif key == "means_hyper":
            value = signed(key, shape)
        elif key == "scales_hyper":
            value = 0.3 + 2.0 * uniform(key, shape)
        elif key.startswith("adaptive_params_list."):
            value = 1.0 + 0.1 * signed(key, shape)
        elif key.endswith(".weight"):
            value = fill_weight(key, shape, m)
        elif key.endswith(".bias"):
            weight_key = key[: -len("bias")] + "weight"
            kind, _ = layer_rule(weight_key, shapes[weight_key], m)
            value = fill_bias(key, shape, m, kind)
        else:
            raise KeyError(f"no rule for {key} {shape}")
        filled[key] = value.astype(np.float32)
    return filled
