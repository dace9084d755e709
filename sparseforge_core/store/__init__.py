"""The results database: what is planned, what is done, what was measured. It knows recipes only as JSON text."""
