"""What ``bench_growth.py`` looks at: how bytes, operations and seconds grow with the size of a job.

size       what grows: positions, vocabulary, context, samples, records, parameters, rows of metrics
amount     what it takes: seconds of the processor, bytes, operations
exponent   the slope of log(amount) over log(size), end to end: 0 does not grow, 1 doubles with the size
"""
