"""Helpers that do not depend on any stage: files, digests, columns, settings, processes, and the Hub."""
