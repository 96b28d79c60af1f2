"""Exact arithmetic: the entropy path gives the same bits on every machine.

A decoder must find the very scales and means that the encoder had. In floating point it does not: the order in which
a kernel adds up a convolution depends on the instruction set, the number of threads, the device and the library's
version, every order rounds differently, and one scale that falls into another table turns the rest of the file into
noise.

Here the entropy path is made of two kinds of operations, and neither leaves anything to chance.

1. **Sums over many terms** (convolutions, the two products of attention, the sum of the attention weights) add
   integers held in floating-point tensors. If the terms are integers and the sum of their magnitudes stays below
   2^24, then every partial sum, in whatever order, blocked, vectorised or fused (FMA), is an integer below 2^24,
   which float32 holds exactly: nothing is ever rounded, so every order gives the same result. Below 2^53 the same
   holds for float64. For a convolution with integer weights w, bias b and inputs clamped to |x| <= limit that is, for
   every output channel,

       sum |w| * limit + |b| < 2^24        (`layers.container`, computed from the integers when a model is loaded)

2. **Elementwise operations** (scaling by a power of two, LeakyReLU, residual additions, the step per channel,
   rounding half to even, clamping, comparing, one division) are each a single IEEE 754 operation on identical inputs,
   or a look-up in a table of integers. IEEE 754 prescribes the correctly rounded result of + - * / for every input,
   so there is only one possible result. Nothing is fused across operations: the path runs eagerly, never compiled,
   and the factors of the scalings are powers of two, for which fusing with an addition would change nothing. Values
   are 0 or far above the denormal range (every one is a sum of multiples of 2^-60 or larger), so flushing denormals
   changes nothing either. exp, pow, gammainc and the softmax of a library are not prescribed by IEEE 754 and do not
   occur.

So a layer takes its input to integers by x_int = clamp(round(x * 2^e), -limit, limit), with an exponent e for every
input channel, convolves, and multiplies by a power of two for every output channel. Exponents and limits are chosen
once, by `convert`, from the ranges seen on a few images, and stored in the checkpoint; the integers follow from them
and the stored weights by one exact scaling and rounding. An image that exceeds the ranges is clamped alike on both
sides: it costs rate, never correctness.

What could still break the first point is a library that does not compute what it was asked for: reduced precision
(TF32 or bfloat16 modes) or transforms (Winograd, FFT). `guard.exactly` switches off what can be switched off,
whatever the caller has set, and `guard.check` compares convolutions and products with known answers once per process
and device; a machine that fails gets an error, not noise.
"""

from hpcmref.exact.convert import attach, calibrate
from hpcmref.exact.guard import exactly

__all__ = ["attach", "calibrate", "exactly"]
