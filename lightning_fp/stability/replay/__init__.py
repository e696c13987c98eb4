"""A recorded batch once more, in other formats, without a trace left behind."""
