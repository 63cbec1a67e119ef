"""Studies: the same training with one or more options varied, over several seeds, and what comes of it.

arm       one way to train: a name and the options that are its own
baseline  the first arm, which the others are compared with
unit      one run: an arm, a seed, and how long it trains
verdict   whether an arm is better than the baseline, by how much, and how sure that is

verdict    the statistics, from numbers alone
"""
