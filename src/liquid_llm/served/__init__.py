"""A teacher behind a server: what it is asked over HTTP, and what of its answers is believed.

Written from the code of vLLM 0.33.0 (its OpenAI-compatible server) and tried against a server in the tests that answers
as that code does; not tried against vLLM itself.

    client     one server: requests, repeated where it may help, with bounds on what is read
    protocol   what is asked and how answers are read, as plain values; the one place that knows vLLM's names
    states     the hidden states that vLLM's connector leaves in files
"""
