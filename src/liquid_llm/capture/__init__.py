"""The offline job that scores samples with a teacher and fills a signal store."""
