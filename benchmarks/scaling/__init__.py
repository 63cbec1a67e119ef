"""What ``bench_scaling.py`` measures, and what it works out where there is nothing to measure."""
