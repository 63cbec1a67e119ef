"""The parts of ``bench_retention``: texts, what stores give back of them, students, and what was found."""
