"""How small, how good, how fast is a codec on your own images, against the codecs people use today?

    images --measure.py--> Measurement --curves.py--> Curve --bdrate.py--> BdRate
              | codecs.py, metrics.py                   |
                                                        +--report.py--> HTML, PNG

`codecs` wraps each codec in the same three methods, `measure` takes one image through them, `curves` averages and reads
and writes results, `bdrate` compares two curves. Nothing here imports torch, matplotlib, bjontegaard or
ray before it is used.
"""
