"""Kept so that a reference command line works; the program is liquid_llm."""
