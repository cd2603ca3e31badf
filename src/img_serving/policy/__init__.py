"""Pure decisions: given state, now and rng, return what to do. No I/O, no clock, no logging, no async."""
