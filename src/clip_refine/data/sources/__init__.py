"""Readers: one file a kind of source, all giving rows that one place checks."""
