"""Who may send requests and how much: keys, tokens of issuers, quotas, priorities, deadlines, and TLS."""
