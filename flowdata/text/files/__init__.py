"""Files of rows: where they are, and what their lines say."""
