"""The search of higher efforts: it improves the latents before a file is written. Decoders are not affected.

g_a gives latents that are good for photographs on average, but for a single picture there are better ones. The search
changes y in rounds, so that bits + lambda * squared error becomes smaller:

    y --compress--> symbols, scales, means, bytes, picture         exact, as it would be written: the best file is kept
    y <--anneal---- scales and means held fixed, gradients through g_s and the bits of symbols

Neither g_a nor gradients through the context model are needed, so a round takes as long as a few encodings. `anneal`
has the inner loop, `efforts` the rounds of each effort, `synthesis` the gradient of the picture.
"""

from hpcmref.search.efforts import Goal, Options, Watch, search

__all__ = ["Goal", "Options", "Watch", "search"]
