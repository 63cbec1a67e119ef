"""What ``bench_speed.py`` compares: this project's steps, and those of others, each in a process of its own."""
