"""Pages and pictures of the studies, one for each question, written from the results files."""
