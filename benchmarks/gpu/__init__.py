"""The parts of ``gpu_session.py``; each has a ``run(context)`` and is run in a process of its own."""
