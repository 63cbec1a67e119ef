"""The demo: the whole pipeline on data and a teacher that every machine can get."""
