"""Streams that go on at another engine after theirs has failed."""
