"""Compare codecs on the user's own images: size of files, quality of pictures, time and memory.

    images --measure.py--> Measurement --curves.py--> Curve --bdrate.py--> BdRate
              | codecs.py, metrics.py                   |
                                                        +--report.py--> HTML, PNG

`codecs` gives each codec the same interface, `measure` encodes and decodes one image with each, `curves` averages
measurements and reads and writes results, and `bdrate` compares two curves. torch, matplotlib, bjontegaard and ray are
imported only where they are used.
"""
