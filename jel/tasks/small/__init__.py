"""Small tasks, many at once: episodes of one task train side by side on a leading axis, with flat parameters."""
