"""The live page of the admin port: what happens now, and why, for people. It only reads."""
