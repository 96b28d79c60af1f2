"""Exact arithmetic: the entropy path gives the same bits on every machine.

A decoder must compute exactly the scales and means that the encoder computed. Ordinary floating point does not ensure
that. The order in which a kernel adds up a convolution depends on the instruction set, the number of threads, the
device and the library's version, and every order rounds differently. A single scale that selects another CDF table
turns the rest of the file into noise. Therefore the entropy path consists of only two kinds of operations, and both
give the same results on every machine.

1. **Sums over many terms** (convolutions, both matrix products of attention, the sum of its weights) add integers that
   are held in floating-point tensors. If the magnitudes of the terms add up to less than 2^24, every partial sum, in
   whatever order, blocked, vectorised or fused (FMA), is an integer below 2^24. float32 holds all of those, so nothing
   is ever rounded and every order gives the same result. Below 2^53 the same holds for float64. For a convolution with
   integer weights w, an integer bias b and inputs clamped to |x| <= limit, the condition for every output channel is

       sum |w| * limit + |b| < 2^24   (or 2^53)

   Whenever a model is loaded, the left side is computed from the weights themselves, and `layers.float_type` picks the
   type and refuses a layer that fits neither. (The computed left side is exact below 2^53, and rounding cannot bring a
   larger value below that.) If all terms of a sum are multiplied by the same power of two, only their exponents change.
   So weights and bias are stored multiplied by the power of two that the output needs.

   Most sums are those of 1x1 convolutions, with 8-bit weights and 16-bit inputs. Each input is split into a high and a
   low half, both int8. Each half is multiplied by the weights in an int8 matrix product, and the two results are
   combined in 32-bit integers below 2^31 (`int16_matmul`). The int8 products run on the processor's int8 instructions
   (such as AVX-512 VNNI), or otherwise in float32, in which the sum of either half stays below 2^24. Which of the two a
   machine uses changes the run time and not the result. The total is converted to float32 once, with the rounding that
   IEEE 754 prescribes.

2. **Single operations on one or two numbers** (products with a power of two, a learned step or LeakyReLU's slope,
   additions, one division per attended value, rounding half to even, clamping, comparing, conversion of float64 and
   int32 to float32, look-up in a stored table) get the same operands everywhere, and IEEE 754 prescribes the result:
   the exact one, correctly rounded. A compiler could contract two operations into one (FMA) only inside one kernel. The
   entropy path runs in PyTorch's eager mode and is never compiled, so every operation is a kernel of its own. Where
   PyTorch's kernel computes a + alpha * b, either alpha is 1 or all operands are integers, and contraction changes
   nothing. IEEE 754 does not prescribe exp, pow, exp2, ldexp (a pow in PyTorch), gammainc and softmax, so they do not
   occur: powers of two are made from their bits, the exponential of attention is a table of 201 integers, and the CDF
   tables are stored. IEEE 754 does prescribe square roots, but PyTorch does not always round them correctly (MKL).
   Where a memory bank needs a square root, an integer test corrects its whole part (`memory_bank._root`).

So a layer first converts its input to integers, x_int = clamp(round(x * 2^e), -limit, limit), with an exponent e for
every input channel. Then it convolves. Its sums are numbers with an exponent for every output channel. `convert`
chooses exponents and limits once, from the ranges seen on a few images, and they are stored in the checkpoint. The
integer weights follow from them and from the stored weights by one exact scaling and one rounding. The values of an
image that exceed the ranges are clamped alike by the encoder and the decoder: this raises the rate, and never breaks a
file.

The following could still make two machines differ, but does not:

- *Denormals and overflow.* Exponents are within +-40, and learned numbers are multiples of 2^-24 up to 2^15; both are
  checked when a model is loaded. So every number that is not rounded to an integer in the next operation is 0 or
  between 2^-110 and 2^120. Therefore it does not matter whether a machine flushes denormals to zero, and infinities
  never occur. (What a memory bank adds to a context can be smaller. But the context is rounded to multiples of 2^-40
  next, and adding a denormal changes only numbers so small that they are rounded to 0 anyway.) The values that priors
  write to a state are integers below 2^31 times 2^-e with e within +-40, so they are multiples of 2^-40 below 2^71.
  Their float32 sums, rounded or not, are multiples of 2^-40 too, and after the at most ten additions below 2^75.
- *The references that a memory bank recalls* are chosen by comparing integers, and of equal ones the oldest is taken.
- *The sign of zero* depends on the order of a sum. No operation divides by such a zero or reads its sign.
- *Symbols* are integers in the file. Encoder and decoder add the same integer to the same mean.
- *Constants* come from the checkpoint or from + - * / sqrt of numbers in it, one operation at a time.
- *Reduced precision and transforming algorithms* (TF32, bfloat16; Winograd, FFT) compute other sums than those that
  were asked for. `guard.exactly` switches off those that can be switched off, whatever the caller has set.
  `layers.depthwise` avoids a Winograd kernel that cannot be switched off. `guard.check` compares convolutions, matrix
  products and single operations with known answers once per process and device; the terms have 1 to 20 bits, and the
  sums come close to the bound. A machine that fails this check raises an error.
- *Anything that was overlooked* is caught by the checksum over the decoded symbols in every file. The result is again
  an error and not noise.
"""

from hpcmref.exact.convert import attach, calibrate
from hpcmref.exact.guard import exactly, repeatably

__all__ = ["attach", "calibrate", "exactly", "repeatably"]
