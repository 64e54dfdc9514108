"""How an engine's middleware marks the answers of a server whose core has died, and by what a gateway knows them.

vLLM's server outlives its core by some seconds, and answers with an error whose text differs between its versions.
The middleware asks vLLM's own client of the core, and marks such an answer: by a header, or, within a stream that has
begun, by a comment before the event with the error. The comment is a block of its own, because some clients take the
text between two blank lines for an event and look at its first line alone. A line break within a text of JSON is
escaped, so no text of a client's can make a line that looks like the mark.
"""

NAME, VALUE = b"moeserving-engine", b"dead"
# Comments of server-sent events begin with a colon.
COMMENT = b": %b: %b\n\n" % (NAME, VALUE)
