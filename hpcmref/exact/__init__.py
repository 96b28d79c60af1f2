"""Exact arithmetic: the entropy path gives the same bits on every machine.

A decoder must find the very scales and means that the encoder had. In floating point it does not: the order in which
a kernel adds up a convolution depends on the instruction set, the number of threads, the device and the library's
version, every order rounds differently, and one scale that falls into another table turns the rest of the file into
noise. Here the entropy path consists of two kinds of operations, and neither leaves anything to chance.

1. **Sums over many terms** (convolutions, both products of attention, the sum of its weights) add integers held in
   floating-point tensors. If the magnitudes of the terms add up to less than 2^24, every partial sum, in whatever
   order, blocked, vectorised or fused (FMA), is an integer below 2^24. float32 holds all of those, so nothing is ever
   rounded and every order gives the same result. Below 2^53 the same holds for float64. For a convolution with integer
   weights w, an integer bias b and inputs clamped to |x| <= limit that is, for every output channel,

       sum |w| * limit + |b| < 2^24   (or 2^53)

   `layers.container` computes the left side from the weights themselves whenever a model is loaded, picks the type, and
   refuses a layer that fits neither. (Its own sums are exact below 2^53, and rounding cannot bring a larger one below.)
   A power of two that multiplies all terms of a sum changes their exponents and nothing else, so weights and bias are
   held multiplied by the power of two that the output needs.

   Most sums are those of 1x1 convolutions, with weights of 8 bits and inputs of 16. They are added up in 32-bit
   integers, below 2^31: the two bytes of the inputs one after the other, in the processor's units for products of
   bytes, or in float32, where the sum of either is below 2^24 (`words`). Which of them a machine has decides how long
   it takes, not what comes out. The whole sum becomes a float32 number by one conversion, rounded as IEEE 754 says.

2. **Single operations on one or two numbers** (products with a power of two, a learned step or LeakyReLU's slope,
   additions, one division per attended value, rounding half to even, clamping, comparing, conversion of float64 and
   int32 to float32, look-up in a stored table) get the same operands everywhere, and IEEE 754 prescribes the result:
   the exact one, correctly rounded. Two operations could only be contracted into one (FMA) inside a kernel, and the
   path runs eagerly, never compiled: every operation is a kernel of its own. Those that PyTorch writes as a + alpha * b
   have alpha = 1 or integers, for which contraction changes nothing. exp, pow, exp2, ldexp (a pow in PyTorch), gammainc
   and softmax are not prescribed by IEEE 754 and do not occur: powers of two are made of their bits, the exponential of
   attention is a table of 201 integers, and the CDF tables are stored. Square roots are prescribed, but PyTorch's are
   not always so rounded (MKL); where a memory bank needs them, an integer test corrects the whole part
   (`memory._root`).

So a layer takes its input to integers, x_int = clamp(round(x * 2^e), -limit, limit) with an exponent e for every input
channel, convolves, and the sums come out as numbers with an exponent for every output channel. Exponents and limits are
chosen once, by `convert`, from the ranges seen on a few images, and stored in the checkpoint; the integer weights
follow from them and the stored weights by one exact scaling and one rounding. An image that exceeds the ranges is
clamped alike on both sides: it costs rate, never correctness.

What might still differ, and why it does not:

- *Denormals, overflow.* Exponents are within +-40 and learned numbers multiples of 2^-24 up to 2^15, checked at load.
  So every number that is not rounded to an integer next is 0 or between 2^-110 and 2^120: flushing denormals changes
  nothing, and there is no infinity to subtract from another. (What a memory bank adds to a context can be smaller, but
  the context is rounded to multiples of 2^-40 next, and a denormal moves no number that is not rounded to 0 anyway.)
  What priors write to a state are integers below 2^31 times 2^-e, e within +-40: multiples of 2^-40 below 2^71, and so
  are their float32 sums, rounded or not, but for their bound. The at most ten additions stay below 2^75.
- *Which references a memory bank recalls* is a comparison of integers, and of equal ones the oldest is taken.
- *The sign of zero* depends on the order of a sum. Nothing divides by it or reads its sign.
- *Symbols* are integers in the file. Encoder and decoder add the same integer to the same mean.
- *Constants* come from the checkpoint or from + - * / sqrt of numbers in it, one operation at a time.
- *Reduced precision and transforming algorithms* (TF32, bfloat16; Winograd, FFT) do not compute the sums that they were
  asked for. `guard.exactly` switches off what can be switched off, whatever the caller has set, `layers.depthwise`
  keeps away from a Winograd kernel that cannot, and `guard.check` compares convolutions, products and single operations
  with known answers once per process and device: terms of 1 to 20 bits, and sums close to the bound. A machine that
  fails gets an error.
- *Whatever was overlooked* meets the checksum over the decoded symbols in every file: an error again, not noise.
"""

from hpcmref.exact.convert import attach, calibrate
from hpcmref.exact.guard import exactly, repeatably

__all__ = ["attach", "calibrate", "exactly", "repeatably"]
