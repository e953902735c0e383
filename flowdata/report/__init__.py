"""What a data set's losses look like: figures, pictures, an HTML page."""

from flowdata.report.pictures import plot_losses
from flowdata.report.summary import summarize
from flowdata.report.write import Report, write_report

__all__ = ["Report", "plot_losses", "summarize", "write_report"]
