"""The shape advisor, `moeserving plan --advise`: simulates the shapes that fit a resource's GPUs."""
