"""What a data set's losses look like: figures, pictures, an HTML page."""

from flowdata.report.write import Report, plot_scores, write_report

__all__ = ["Report", "plot_scores", "write_report"]
