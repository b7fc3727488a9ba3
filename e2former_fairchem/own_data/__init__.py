"""Training on one's own structures: reading, checking, splitting, references, the run's file, the table of errors."""
