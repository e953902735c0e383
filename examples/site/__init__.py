"""The site of guides and reference: its configuration, its pictures and its links."""
