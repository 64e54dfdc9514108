"""Shared-memory records between an engine and its agent, and the notification that one has changed."""
