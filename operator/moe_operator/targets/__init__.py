"""The bounds of `scheduling.engine.targets` beside what gateways measure: the condition `TargetsMet`."""
