"""The Ray session: connect, check before the start, submit jobs."""
